"""States of a model that ``tensor_parallel`` has divided: a process's share of a whole one, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layers.attention import AttentionState
from ..model_state import ModelState
from ..ops.cms.schedule import hidden_dim
from ..ops.cms.state import CMSState
from ..ops.shared.across import Across
from ..ops.titans.state import TitansState

_HEADS = {"delta2": 1, "delta1": 1, "delta1s": 1, "s2": 1, "s1": 1, "s1s": 1} | {
    f"pending_{name}": 2 for name in ("k", "v", "eta", "alpha", "beta")
}
_MATRICES = ("weights", "copies", "grads", "moments", "squares")  # [B, r, c]; left [B, R, r], right [B, R, c]
Change = Callable[[Tensor, int], Tensor]  # of a tensor that is cut along a dimension


def share(state: ModelState, across: Across) -> ModelState:
    """This process's share of a whole ``state``; independent of it."""
    return _changed(state, lambda t, dim: across.own(t, dim).clone(), across.size)


def whole(state: ModelState, across: Across) -> ModelState:
    """The whole state, of the shares that all processes have; all of them call this."""
    return _changed(state, lambda t, dim: torch.cat(tuple(across.parts(t)), dim), 1)


def _changed(state: ModelState, change: Change, parts: int) -> ModelState:
    new = state.clone()
    mixers, snapshot = ([_mixer(m, change, parts) for m in of] for of in (new.mixers, new.snapshot))
    cms = [c and _cms(c, change, parts) for c in new.cms]
    guard = new.guard
    if guard is not None:
        guard = replace(guard, good=[block and _levels(block, change, hidden_dim) for block in guard.good])
    return replace(new, mixers=mixers, snapshot=snapshot, cms=cms, guard=guard, parts=parts)


def _mixer(state: Any, change: Change, parts: int) -> Any:
    if isinstance(state, AttentionState):
        return replace(state, k=change(state.k, 2), v=change(state.v, 2), filled=[], parts=parts)
    assert isinstance(state, TitansState)
    held = {name: getattr(state, name) for name in _HEADS}
    cut = {name: None if t is None else change(t, _HEADS[name]) for name, t in held.items()}
    return replace(state, **cut, parts=parts)


def _cms(state: CMSState, change: Change, parts: int) -> CMSState:
    changed = {part: _levels(getattr(state, part), change, hidden_dim) for part in _MATRICES}
    changed["left"] = _levels(state.left, change, lambda name: None if name == "down" else 2)
    changed["right"] = _levels(state.right, change, lambda name: 2 if name == "down" else None)
    return replace(state, **changed, parts=parts)


def _levels(levels: list, change: Change, dim: Callable[[str], int | None]) -> list:
    """Of every level None, or its tensors by the name of their matrix."""
    def changed(name: str, t: Tensor) -> Tensor:
        at = dim(name)
        return t if at is None else change(t, at)

    return [level and {name: changed(name, t) for name, t in level.items()} for level in levels]
