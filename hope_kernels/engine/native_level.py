"""What a CMS level has beside its matrices, as csrc/cpu/cms.h is handed it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import CMSConfig
from ..model_state import ModelState
from ..ops.cms import low_rank
from ..ops.cms.level import Level
from ..ops.shared.cpu_library import POINTER, SIZE

KINDS = {"gelu": 0, "swiglu": 1, "geglu": 2, "gelu_erf": 3}  # ``LevelKind``
_VECTORS = ("norm_gain", "norm_bias", "post_gain", "up_bias", "gate_bias", "down_bias")


class LevelVectors(ctypes.Structure):
    """``LevelVectors``."""

    _fields_ = [(n, POINTER) for n in ("gain", "shift", *_VECTORS[2:])]


class LevelLowRank(ctypes.Structure):
    """``LevelLowRank``."""

    _fields_ = [("rank", SIZE), *((n, POINTER) for n in ("across", "across_down", "up", "gate", "down"))]


def vectors_of(level: Level, config: CMSConfig, at: Callable[[Any, int], int | None]) -> LevelVectors:
    """at(tensor, count): the address of a tensor of so many numbers, None for None."""
    hidden = ("up_bias", "gate_bias")
    return LevelVectors(*[at(level.get(n), config.hidden if n in hidden else config.d_model) for n in _VECTORS])


def low_rank_of(config: CMSConfig, l: int, like: Tensor | None, at: Callable[[Tensor], int | None]) -> LevelLowRank:
    """Of level ``l``, but for what rows have learned. at: the address of a matrix S, in the dtype of ``like``."""
    if config.rank is None:
        return LevelLowRank()
    assert like is not None
    across, down = (at(low_rank.signs(config, l, name, like)) for name in ("up", "down"))
    return LevelLowRank(rank=config.rank, across=across, across_down=down)


def settled(state: ModelState) -> bool:
    """Whether no factors wait to be folded into what rows have learned."""
    return not any([cms is not None and any(map(any, cms.rank)) for cms in state.cms])


def mixes(cms: Any) -> bool:
    """Whether the levels of a ContinuumMemory all read what the first one does."""
    return cms is not None and cms.mix is not None


def shares(cms: Any) -> list[float]:
    """Of what each level of a ContinuumMemory adds to the stream; none without one."""
    if mixes(cms):
        return torch.softmax(cms.mix.detach(), 0).tolist()
    return [] if cms is None else [1.0] * len(cms.levels)
