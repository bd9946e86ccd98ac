"""A CMS level on the C++ backend: products and norm as those of a projection (``ops/linear/cpp.py``), and one pass
over the tokens for what is between them (csrc/cpu/cms.cpp); the backward's products are PyTorch's.

The functions are those of ``level.py``, for levels without a gate in fp32 on the CPU and without a graph: call under
no_grad. The activation and its derivative come from one exponential, so the backward multiplies by what the
forward kept. Other levels: ``cpp_gated.py``.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import CMSConfig
from ..linear.cpp import layer_norm, linear, rms_norm
from ..shared.cpu_library import POINTER, REAL, SIZE, Function, address
from .cpp_step import newton_schulz, normalise_, outer_add_, refresh_
from .level import Factors, Level, norm_backward
from .matrix import Matrix, by_rows, times

__all__ = ["level_backward", "level_forward", "newton_schulz", "normalise_", "outer_add_", "refresh_", "unserved"]

_gelu_forward = Function("hope_cms_gelu", "cms gelu", *[SIZE] * 2, ctypes.c_int32, *[POINTER] * 3)
_norm_backward = Function("hope_cms_norm_backward", "cms norm_backward", *[SIZE] * 3, REAL, *[POINTER] * 6)


class Saved(NamedTuple):
    """x, n, a: as in ``level.Saved``.  slope: sigma' at the pre-activations, [B, T, N]."""

    x: Tensor
    n: Tensor
    slope: Tensor
    a: Tensor


def unserved(config: CMSConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the backend cannot serve a level, or None."""
    if config.gated:
        return f'serves mlp="gelu" and "gelu_erf", not "{config.mlp}"'
    if config.post_norm:
        return "serves levels without post_norm"
    return placed(config, dtype, device)


def placed(config: CMSConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no level of such a dtype, device and width can be served, or None."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"serves float32 on the CPU, not {dtype} on {device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "serves float32, which products under autocast are not"
    if config.d_model % 8 or config.hidden % 8:
        return f"serves widths and hidden widths that are multiples of 8, not {config.d_model} and {config.hidden}"
    return None


def level_forward(
    x: Tensor, level: Level, config: CMSConfig, eps: float, *, residual: bool, keep: bool
) -> tuple[Tensor, Saved | None]:
    """``level.level_forward``."""
    n = inner_norm(x, level, config, eps)
    z = product(n, level["up"], level.get("up_bias"))
    a, slope = torch.empty_like(z), torch.empty_like(z) if keep else None
    gelu(z, a, slope, config.mlp == "gelu_erf")
    y = product(a, level["down"], level.get("down_bias"), x if residual else None)
    return y, None if slope is None else Saved(x, n, slope, a)


def level_backward(
    dy: Tensor, saved: Saved, level: Level, config: CMSConfig, eps: float, *, residual: bool, need_dx: bool
) -> tuple[Tensor | None, Factors]:
    """``level.level_backward``."""
    d_up = times(dy, level["down"]) * saved.slope
    factors = {"up": (d_up, saved.n), "down": (dy, saved.a)}
    if not need_dx:
        return None, factors
    dn = times(d_up, level["up"])
    if config.norm != "rmsnorm":
        dx = norm_backward(dn, saved.x, level["norm_gain"], config.norm, eps)
        return dx + dy if residual else dx, factors
    return norm_gradients(saved.x, level["norm_gain"], dn, dy if residual else None, eps, gain=False)[0], factors


def inner_norm(x: Tensor, level: Level, config: CMSConfig, eps: float) -> Tensor:
    """norm(x) of a level."""
    if config.norm == "rmsnorm":
        return rms_norm(x, level["norm_gain"], eps)
    return layer_norm(x, level["norm_gain"], level["norm_bias"], eps)


def norm_gradients(
    x: Tensor, weight: Tensor, dn: Tensor, dy: Tensor | None, eps: float, *, gain: bool
) -> tuple[Tensor, Tensor | None]:
    """dL/dx = dy + rms_norm'(x)^T dn, and with ``gain`` dL/dweight [d], for dn = dL/d(rms_norm(x) weight)."""
    x, weight, dn, dy = x.contiguous(), weight.contiguous(), dn.contiguous(), None if dy is None else dy.contiguous()
    dx, dgain, every, d = torch.empty_like(x), torch.empty_like(weight) if gain else None, x.numel(), x.shape[-1]
    tensors = ((x, every), (weight, d), (dn, every), (dy, every), (dx, every), (dgain, d))
    _norm_backward(every // d, d, torch.get_num_threads(), eps, *(address(*t) for t in tensors))
    return dx, dgain


def product(x: Tensor, W: Matrix, bias: Tensor | None, more: Tensor | None = None) -> Tensor:
    """more + (x W^T + bias): x [B, T, c] -> [B, T, r]; None: without."""
    shared = W.shared
    if shared is not None and bias is None and W.left is None and not any(W.rows):
        return linear(x, shared, more)

    def with_shared(w: Tensor, rows) -> Tensor:
        return linear(x[torch.tensor(list(rows), dtype=torch.long, device=x.device)], w)

    def with_own(w: Tensor, rows) -> Tensor:
        return torch.cat([linear(x[b : b + 1], matrix) for b, matrix in zip(rows, w)])

    y = by_rows(W, x.shape[0], with_shared, with_own)
    if W.left is not None and W.right is not None:
        parts = [linear(linear(t.unsqueeze(0), right), left.mT.contiguous())
                 for t, left, right in zip(x, W.left, W.right)]
        y = torch.add(y, torch.cat(parts), alpha=W.scale)
    y = y if bias is None else y + bias
    return y if more is None else more + y


def gelu(z: Tensor, a: Tensor, slope: Tensor | None, erf: bool = False) -> None:
    """a becomes sigma(z), slope sigma'(z): of gelu's tanh form, or with ``erf`` of gelu itself."""
    count = z.numel()
    _gelu_forward(count, torch.get_num_threads(), erf, *(address(t, count) for t in (z, a, slope)))
