"""What a sequence has learned in a level, taken out of its state, or made the weights that all sequences
start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..check import check_index, check_state
from ..ops.cms import low_rank
from ..ops.cms.absorb import fold, reset, share
from ..ops.cms.matrix import Matrix
from ..ops.cms.schedule import matrices
from ..ops.cms.state import CMSState
from ..state import master_dtype
from .cms_level import CMSLevel
from .wrapped import write_weight

NAME = "ContinuumMemory"


@torch.no_grad()
def detach_level(layer, state: CMSState, level: int, row: int) -> dict[str, Tensor]:
    """The matrices of ``level`` as ``row`` has them; in place, the row then shares the layer's, with nothing
    learned or accumulated."""
    _check(layer, state, level, row, "detach_level")
    _settle(layer, state)
    found = _in_force(layer, state, level, row)
    draft = state.draft()
    reset(draft, level, [row])
    state.assign(draft.finished())
    return found


@torch.no_grad()
def consolidate(layer, state: CMSState, row: int, levels: Sequence[int] | None) -> None:
    """The parameters of ``levels`` become what ``row`` has learned, and the row shares them; in place. Its
    accumulators and momentum stay, and rows that shared the old parameters keep them as weights of their
    own."""
    levels = range(layer.config.num_levels) if levels is None else list(levels)
    check_consolidation(layer, state, row, levels)
    _settle(layer, state)
    draft = state.draft()
    for level in _learned(state, row, levels):
        learned = _in_force(layer, state, level, row)
        others = [b for b in range(state.batch) if b != row]
        fold(draft, layer.config, layer.start(level), level, others)
        if layer.config.rank is not None:
            low_rank.rebase(draft, level, row, others)
        for name, value in learned.items():
            write_weight(f"{NAME}.consolidate", layer.levels[level], name, value)
        share(draft, level, [row])
    draft.base = None  # what they deviated from is no more: what rows have is theirs
    state.assign(draft.finished())


@torch.no_grad()
def check_consolidation(layer, state: CMSState, row: int, levels: Sequence[int] | None) -> None:
    """Raises what ``consolidate`` would, and changes nothing."""
    levels = range(layer.config.num_levels) if levels is None else levels
    for level in levels:
        _check(layer, state, level, row, "consolidate")
    for level in _learned(state, row, levels):
        if type(layer.levels[level]) is not CMSLevel:
            for name, value in _in_force(layer, state, level, row).items():
                write_weight(f"{NAME}.consolidate: levels[{level}]", layer.levels[level], name, value, keep=False)


def _settle(layer, state: CMSState) -> None:
    """A checked ``state`` has the layer's settings from here on, in place."""
    new = layer.continued(state)
    if new is not state:
        state.assign(new)


def _learned(state: CMSState, row: int, levels: Sequence[int]) -> list[int]:
    """Of ``levels``, those in which ``row`` has learned anything."""
    return [l for l in levels if state.own[l][row] or state.rank[l][row]]


def _in_force(layer, state: CMSState, level: int, row: int) -> dict[str, Tensor]:
    """[rows, cols] per matrix, in the master dtype."""
    now = layer.effective_levels(state.select([row]), master_dtype(layer._like.dtype))[level]
    return {n: Matrix.of(now[n]).dense(1)[0].clone() for n in matrices(layer.config)}


def _check(layer, state: CMSState, level: int, row: int, call: str) -> None:
    where, weight = f"{NAME}.{call}", layer._like
    check_state(where, state, CMSState, layer.config, state.batch)
    state.validate(where, weight.dtype, weight.device)
    check_index(where, "level", level, layer.config.num_levels)
    check_index(where, "row", row, state.batch)
