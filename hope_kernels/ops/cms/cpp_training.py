"""A CMS level under training on the C++ backend: the passes of ``cpp.py`` behind an autograd function, with the
gradients of all parameters.

One node of the graph in place of twelve: it keeps the input, its norm, the hidden units and their slopes, and its
backward is three products a matrix and one pass over the tokens between them. Gradients of gradients are those of
``level.py``, which such a backward goes through again. What a row has learned, and weights that are not plain
tensors, are read in PyTorch.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import CMSConfig
from ..shared.again import gradients_again
from ..shared.cpu_library import NO_GRAPH, has_autograd, is_plain
from . import cpp, level
from .level import Factors, Level
from .matrix import Matrix, times

__all__ = ["level_backward", "level_forward", "newton_schulz", "outer_add_", "refresh_", "unserved"]

level_backward, newton_schulz = level.level_backward, level.newton_schulz
outer_add_, refresh_ = level.outer_add_, level.refresh_
_NAMES: tuple[str, ...] = ("norm_gain", "up", "up_bias", "down", "down_bias")


class Part(NamedTuple):
    """Everything constant about a level's part in a reading."""

    config: CMSConfig
    eps: float
    residual: bool


def unserved(config: CMSConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why training with such levels cannot be served, or None."""
    if not has_autograd():
        return NO_GRAPH
    if config.norm != "rmsnorm":
        return f'trains levels with norm="rmsnorm", not "{config.norm}"'
    return cpp.unserved(config, dtype, device)


def level_forward(
    x: Tensor, tensors: Level, config: CMSConfig, eps: float, *, residual: bool, keep: bool
) -> tuple[Tensor, Any]:
    """``level.level_forward``; differentiable, and so without ``keep``."""
    held = [tensors.get(n) for n in _NAMES]
    shared = [t.shared if isinstance(t, Matrix) else t for t in held]
    learned = any(isinstance(t, Matrix) and (t.own is not None or t.left is not None) for t in held)
    if keep or learned or not is_plain(x, *shared):
        return level.level_forward(x, tensors, config, eps, residual=residual, keep=keep)
    return _Level.apply(Part(config, eps, residual), x, *shared), None


def _level(held: list[Tensor | None]) -> Level:
    return {n: Matrix.of(t) if t.dim() == 2 else t for n, t in zip(_NAMES, held) if t is not None}


class _Level(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Part, x: Tensor, *held: Tensor | None):
        y, saved = cpp.level_forward(
            x, _level(list(held)), part.config, part.eps, residual=part.residual, keep=True)
        assert saved is not None
        ctx.part = part
        ctx.save_for_backward(x, *held, saved.n, saved.slope, saved.a)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        # a backward inside autocast, of a level that was read in its own dtype
        with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
            return None, *_gradients(ctx.part, ctx.saved_tensors, dy, ctx.needs_input_grad[1:])


def _gradients(
    part: Part, saved: tuple[Tensor | None, ...], dy: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """By x and by ``_NAMES``, where they are wanted."""
    x, *held, n, slope, a = saved
    assert x is not None and n is not None and slope is not None and a is not None
    if torch.is_grad_enabled():
        return _again(part, x, held, dy, wanted)
    tensors, by = _level(held), dict(zip(_NAMES, wanted[1:]))
    d_up = times(dy, tensors["down"]).mul_(slope)
    factors: Factors = {"up": (d_up, n), "down": (dy, a)}
    grads: dict[str, Tensor | None] = {}
    for name, (left, right) in factors.items():
        rows = left.reshape(-1, left.shape[-1])
        grads[name] = rows.t() @ right.reshape(-1, right.shape[-1]) if by[name] else None
        grads[f"{name}_bias"] = rows.sum(0) if by[f"{name}_bias"] else None
    dx = None
    if wanted[0] or by["norm_gain"]:
        dx, grads["norm_gain"] = cpp.norm_gradients(
            x, tensors["norm_gain"], times(d_up, tensors["up"]), dy if part.residual else None, part.eps,
            gain=by["norm_gain"],
        )
    return [dx if wanted[0] else None, *(grads.get(name) for name in _NAMES)]


def _again(
    part: Part, x: Tensor, held: list[Tensor | None], dy: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients that can be differentiated again."""
    def read(x: Tensor, *held: Tensor | None) -> tuple[Tensor]:
        y, _ = level.level_forward(x, _level(list(held)), part.config, part.eps, residual=part.residual, keep=False)
        return (y,)

    return gradients_again(read, (x, *held), wanted, (dy,))
