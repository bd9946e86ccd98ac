"""A gated CMS level, or one with a norm behind it, on the C++ backend: the forward's numbers are bit-identical in any
company, as those of ``cpp.py``; the backward is PyTorch's.

Such levels come from models whose every bit is promised, so this serves only where the backend is asked for by name.
Whole models of their own that learn are read in C++ unasked (csrc/cpu/segment.h).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...config import CMSConfig
from ..linear.cpp import rms_norm
from ..shared.cpu_library import POINTER, SIZE, Function, address
from .cpp import gelu, inner_norm, placed, product
from .cpp_step import newton_schulz, normalise_, outer_add_, refresh_
from .level import Level, Saved, level_backward

__all__ = ["level_backward", "level_forward", "newton_schulz", "normalise_", "outer_add_", "refresh_", "unserved"]

_gate = Function("hope_cms_gate", "cms gate", *[SIZE] * 2, ctypes.c_int32, *[POINTER] * 3)


def unserved(config: CMSConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the backend cannot serve a level, or None."""
    return placed(config, dtype, device)


def level_forward(
    x: Tensor, level: Level, config: CMSConfig, eps: float, *, residual: bool, keep: bool
) -> tuple[Tensor, Saved | None]:
    """``level.level_forward``."""
    n = inner_norm(x, level, config, eps)
    z, g = product(n, level["up"], level.get("up_bias")), None
    if config.gated:
        g = product(n, level["gate"], level.get("gate_bias"))
        a = gated(g, z, config.mlp == "swiglu")
    else:
        a = torch.empty_like(z)
        gelu(z, a, None, config.mlp == "gelu_erf")
    if config.post_norm:
        out = product(a, level["down"], level.get("down_bias"))
        y = rms_norm(out, level["post_gain"], eps)
        y = x + y if residual else y
    else:
        out, y = None, product(a, level["down"], level.get("down_bias"), x if residual else None)
    return y, Saved(x, n, z, g, a, out) if keep else None


def gated(g: Tensor, z: Tensor, silu: bool) -> Tensor:
    """silu(g) z, or gelu(g) z."""
    a, count = torch.empty_like(z), z.numel()
    _gate(count, torch.get_num_threads(), silu, *(address(t, count) for t in (g, z, a)))
    return a
