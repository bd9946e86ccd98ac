"""What a CMS level has beside its matrices, as csrc/cpu/cms.h is handed it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from ..config import CMSConfig
from ..ops.cms.level import Level
from ..ops.shared.cpu_library import POINTER

KINDS = {"gelu": 0, "swiglu": 1, "geglu": 2}  # ``LevelKind``
_VECTORS = ("norm_gain", "norm_bias", "post_gain", "up_bias", "gate_bias", "down_bias")


class LevelVectors(ctypes.Structure):
    """``LevelVectors``."""

    _fields_ = [(n, POINTER) for n in ("gain", "shift", *_VECTORS[2:])]


def vectors_of(level: Level, config: CMSConfig, at: Callable[[Any, int], int | None]) -> LevelVectors:
    """at(tensor, count): the address of a tensor of so many numbers, None for None."""
    hidden = ("up_bias", "gate_bias")
    return LevelVectors(*[at(level.get(n), config.hidden if n in hidden else config.d_model) for n in _VECTORS])


def mixes(cms: Any) -> bool:
    """Whether the levels of a ContinuumMemory all read what the first one does."""
    return cms is not None and cms.mix is not None


def shares(cms: Any) -> list[float]:
    """Of what each level of a ContinuumMemory adds to the stream; none without one."""
    if mixes(cms):
        return torch.softmax(cms.mix.detach(), 0).tolist()
    return [] if cms is None else [1.0] * len(cms.levels)
