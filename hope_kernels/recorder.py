"""Work on a device recorded once, to be done again at the price of a call: CUDA graphs.

What is recorded is fixed: kernels, their order, and the addresses of what they read and write. Numbers that
the host knows are part of it. So it must ask the host for nothing, and bring nothing from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Part = Callable[[], object]


class Recorder(Protocol):
    def record(self, parts: Sequence[Part]) -> list[Part]:
        """Records ``parts``, which follow one another and share memory: what does each again. Nothing is
        executed. Between a part and the next one, nothing else that this recorder has recorded may be
        done."""
        ...


_recording = threading.Lock()


class CudaRecorder:
    """A graph a part, all of them in one pool of memory, recorded on a stream of its own; one thread at a time. No GPU
    has run it yet."""

    def __init__(self, device: torch.device):
        self.device, self._pool, self._stream = device, None, None

    def record(self, parts: Sequence[Part]) -> list[Part]:
        graphs = []
        with _recording, torch.cuda.device(self.device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._stream = self._stream or torch.cuda.Stream()
            before = torch.cuda.current_stream()
            try:
                for part in parts:
                    graph = torch.cuda.CUDAGraph()
                    # other threads (one that pins memory, say) may go on meanwhile
                    with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                        part()
                    graphs.append(graph)
            finally:
                torch.cuda.set_stream(before)  # where a capture has failed, PyTorch is still on its stream
        return [graph.replay for graph in graphs]


def recorder_for(device: torch.device) -> Recorder | None:
    """None: work on this device cannot be recorded."""
    return CudaRecorder(device) if device.type == "cuda" else None


def alike(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Whether all bits agree; waits for the device once."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    bits = lambda t: t.detach().contiguous().view(kinds[t.element_size()])
    return bool(torch.stack([(bits(a) == bits(b)).all() for a, b in pairs]).all())
