"""How a kernel that advances a state in place serves a call: on copies of what it will write, or on the state
itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...config import TitansConfig
from .state import FastWeights, TitansState, on_device

# (config, w_init, inputs, state, pos, lengths, update) -> o
Scan = Callable[[TitansConfig, FastWeights, object, TitansState, Tensor, Tensor, bool], Tensor]


def call(
    scan: Scan, written: tuple[str, ...], chunk: int, config: TitansConfig, w_init: FastWeights, inputs,
    state: TitansState, lengths: list[int], update: bool, reads: Tensor | None = None,
) -> tuple[Tensor, TitansState]:
    """(o, new state). written: the state's tensors that ``scan`` may write; chunk: tokens between commits,
    before which it writes pending tokens only. reads [B] int64: ``lengths`` on the device, where they are
    there already. A state that is to be advanced in place (``TitansState.in_place``) is returned itself."""
    if state._reads is not None:
        return scan(config, w_init, inputs, state, state.count, state._reads, update), state
    new = state
    reads = on_device(lengths, state.count.device) if reads is None else reads
    if update:
        commits = any(p // chunk != (p + n) // chunk for p, n in zip(state.pos, lengths))
        parts = {n: getattr(state, n) for n in written if commits or n.startswith("pending")}
        parts = {n: None if t is None else t.detach().clone() for n, t in parts.items()}
        new = state.advanced(lengths, count=state.count + reads, **parts)
    return scan(config, w_init, inputs, new, state.count, reads, update), new
