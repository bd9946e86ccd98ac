"""One ``forward_with_updates``: kernels where one serves, the chunked loop for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...state import master_dtype
from .chunked import Chunked
from .config import engine
from .kernels import kernel, kernel_call
from .state import SelfModifyingTitansState, layout_of, stacked, unstack

if TYPE_CHECKING:
    from .layer import SelfModifyingTitans


def read_and_write(
    layer: SelfModifyingTitans, x: Tensor, q: Tensor | None, state: SelfModifyingTitansState,
    other: int, memory: int,
) -> Tensor:
    """The outputs [B, T, dim] of the convolved x [B, T, dim] and the static q [B, T, dim] (None with
    adaptive_q); advances ``state``, which is batched.

    The open chunk is flushed at the end. To a kernel that is a call of its own, with chunks as long as what
    remains.
    """
    dtype, out_dtype = master_dtype(state.memory.w1.dtype), x.dtype if q is None else q.dtype
    x, q = x.to(dtype), None if q is None else q.to(dtype)
    config = engine(layer.config)
    layout = layout_of(config, config.memories, layer.config.dim)
    w = stacked(state, layout, dtype)
    s = None if config.momentum is None else stacked(state, layout, dtype, "m_")
    learned = [(layout, w, s)]
    T, at, outputs = x.shape[1], 0, []
    while at < T:
        chunks = min(other, T - at), min(memory, T - at)
        serves = kernel(layer.config, *chunks, dtype, x.device)
        if serves is None or q is None:
            loop = Chunked(layer, x[:, at:], None if q is None else q[:, at:], w, s, *chunks)
            outputs.append(loop.run())
            learned = [(g.layout, g.w, g.s) for g in loop.groups]
            break
        end = T - (T - at) % max(chunks)
        o, w = kernel_call(serves, engine(layer.config, *chunks), x[:, at:end], q[:, at:end], w)
        outputs.append(o)
        learned, at = [(layout, w, s)], end
    for part, weights, momentum in learned:
        unstack(state, part, weights)
        if momentum is not None:
            unstack(state, part, momentum, "m_")
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).to(out_dtype)
