"""Reading with the blocks as a wavefront: block l reads piece c beside block l - 1 reading piece c + 1, each
block on a CUDA stream.

                  piece 0   1   2   3
        block 0        1   2   3   4
        block 1            2   3   4   5
        block 2                3   4   5   6

A cell (l, c) needs h of cell (l - 1, c) and the mixer's state of cell (l, c - 1). Cells with the same number
need nothing of each other: with L blocks up to L of them run at a time, and C pieces take C + L - 1 steps.
One long sequence leaves no other exact concurrency: inside a memory every chunk is written from what the one
before it has left.

A mixer's states stay on its block's stream, which keeps their order. h passes from stream to stream by an
event, and ``record_stream`` tells the allocator to wait for the stream that reads it before its memory is
used again. The caller's stream waits for all of them, so what comes back is like any other tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from ..config import HopeConfig
from ..model_state import MixerState
from .protocol import CMSWeights, Model


def run(
    model: Model, h: Tensor, mixers: list[MixerState], cms: Sequence[CMSWeights], lengths: list[int],
    piece: int, backend: str | None = None,
) -> tuple[Tensor, list[MixerState]]:
    """``model.run`` under no_grad, over pieces of ``piece`` tokens: (h [B, T, d_model], new mixer states), as
    for any split into calls.

    Without CUDA the same cells are read in the same order, one after another. It can only help where a piece
    of one block does not fill the device (few rows and heads), and the persistent kernel of backend "triton"
    sits on every multiprocessor while it runs. No GPU has run it.
    Raises ValueError in grad mode, and for a piece that is no positive multiple of the memory's chunk.
    """
    name, chunk = "wavefront", chunk_of(model.config)
    if isinstance(piece, bool) or not isinstance(piece, int) or piece < 1 or piece % chunk:
        raise ValueError(
            f"{name}: argument piece is {piece!r}, expected a positive multiple of the memory's chunk, {chunk}"
        )
    if torch.is_grad_enabled():
        raise ValueError(f"{name}: reads only; call it under torch.no_grad()")
    T, mixers = h.shape[1], list(mixers)
    # pieces end where the chunks of row 0 do
    first = piece - (mixers[0].pos[0] % chunk if mixers and lengths else 0)
    edges = [0, *range(first, T, piece), T] if T else [0]
    parts = [h[:, a:b] for a, b in zip(edges, edges[1:])]
    with _Lanes(h.device, len(mixers)) as lanes:
        for l, c in cells(len(mixers), len(parts)):
            step = [min(max(n - edges[c], 0), parts[c].shape[1]) for n in lengths]
            with lanes.cell(l, c, parts[c]):
                parts[c], mixers[l] = model.blocks[l](parts[c], mixers[l], cms[l], step, backend)
    for t in (*parts, *(t for m in mixers for t in m.tensors())):
        lanes.hand_over(t)
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0] if parts else h, mixers


def chunk_of(config: HopeConfig) -> int:
    """Tokens after which all memories of a mixer stand at the end of a chunk; 1 for attention."""
    titans = None if config.mixer == "attention" else config.titans
    return 1 if titans is None else max(titans.chunk_memory, titans.chunk_other)


def cells(blocks: int, pieces: int) -> Iterator[tuple[int, int]]:
    """All (block, piece), diagonal after diagonal; what a cell needs comes before it."""
    for number in range(blocks + pieces - 1):
        for l in range(max(0, number - pieces + 1), min(blocks, number + 1)):
            yield l, number - l


class _Lanes:
    """A stream per block between two points of the caller's stream; on a CPU nothing."""

    def __init__(self, device: torch.device, blocks: int):
        self.streams = _streams(device, blocks) if device.type == "cuda" else ()
        self.here = torch.cuda.current_stream(device) if self.streams else None
        self._read: dict[int, torch.Event] = {}  # per piece, when its last block so far is done with it

    def __enter__(self) -> _Lanes:
        if self.here is not None:
            for stream in self.streams:
                stream.wait_stream(self.here)
        return self

    def __exit__(self, *_) -> None:
        if self.here is not None:
            for stream in self.streams:  # also after an error: what the caller frees may still be being read
                self.here.wait_stream(stream)

    @contextlib.contextmanager
    def cell(self, l: int, c: int, h: Tensor) -> Iterator[None]:
        """The work inside runs on block l's stream, once piece c has left block l - 1."""
        if not self.streams:
            yield
            return
        stream = self.streams[l]
        if c in self._read:
            stream.wait_event(self._read[c])
        h.record_stream(stream)
        with torch.cuda.stream(stream):
            yield
            self._read[c] = stream.record_event()

    def hand_over(self, t: Tensor) -> None:
        if self.here is not None:
            t.record_stream(self.here)


@cache
def _streams(device: torch.device, blocks: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(blocks))
