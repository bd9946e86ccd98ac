"""The levels of a Continuum Memory System as one function, with fixed weights and in the pass that learns (Nested Learning eq 70-74).

    sequential, nested:  y = MLP_K(... MLP_1(x))        independent:  y = x + sum_l softmax(mix)_l branch_l(x)

``cms_forward`` is differentiable in everything. ``cms_learn`` is what learning while reading uses: its graph runs from y to x alone, and
when the backward has passed a level, that level's factors go to a ``sink``, which may change the level's weights at once. So the
activations of a segment are kept, and its gradients never are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import CMSConfig
from . import chunked
from .chunked import Factors, Level, Saved, master_dtype
from .matrix import Matrix
from .schedule import learning_levels, matrices

NORM_EPS = 1e-6
Sink = Callable[[int, Factors], None]  # (index of the level, its factors)


def cms_forward(
    x: Tensor, levels: list[dict], config: CMSConfig, mix: Tensor | None = None, eps: float = NORM_EPS, ops=chunked
) -> Tensor:
    """All levels at fixed weights; differentiable on the chunked backend.

    x: [B, T, d].  levels: level 1 first, in the dtype of x; a matrix is [rows, cols], [B, rows, cols] or a ``Matrix``.  mix: [K],
    independent only.  ops: the backend's functions.  Returns [B, T, d].
    Raises ValueError for a number of levels other than K, or the independent variant without ``mix``.
    Source: Nested Learning eq 72-74.
    """
    def level(l: int, x: Tensor, residual: bool) -> Tensor:
        return ops.level_forward(x, levels[l], config, eps, residual=residual, keep=False)[0]

    levels = _checked(levels, config, mix)
    return _chain(x, config, mix, level)


def cms_learn(
    x: Tensor, levels: list[dict], config: CMSConfig, sink: Sink, anchor: Tensor, mix: Tensor | None = None, eps: float = NORM_EPS,
    ops=chunked,
) -> Tensor:
    """``cms_forward`` whose backward gives dL/dx and calls ``sink(l, factors)`` for every level l with lr > 0, the last level first.

    anchor: a scalar that requires a gradient; differentiate with respect to it (x itself may be a constant). Its gradient is zero.
    """
    levels = [{n: t.detach() for n, t in level.items()} for level in _checked(levels, config, mix)]
    share = None if config.variant != "independent" else torch.softmax(mix.detach().to(x.dtype), 0)
    return _Learning.apply(x, anchor, _Pass(levels, config, sink, share, eps, ops))


def cms_gradients(
    x: Tensor, error: Tensor, levels: list[dict], config: CMSConfig, mix: Tensor | None = None, eps: float = NORM_EPS
) -> list[dict[str, Tensor] | None]:
    """g_b = d sum_t <error_bt, y_bt> / d theta_b for one segment: the gradient that a refresh accumulates, per row.

    x, error: [B, C1, d], the segment's inputs and dL/dy.  levels, mix: as in ``cms_forward``.
    Returns, per level, None (lr = 0) or a dict name -> [B, rows, cols] in the master dtype. Works under any grad or inference
    mode of the caller and is detached from every outer graph. Source: Nested Learning eq 71.
    """
    grads: list[dict[str, Tensor] | None] = [None] * config.num_levels

    def sink(l: int, factors: Factors) -> None:
        wide = {n: [t.to(master_dtype(x.dtype)) for t in pair] for n, pair in factors.items()}
        grads[l] = {n: torch.bmm(wide[n][0].mT, wide[n][1]) for n in matrices(config)}

    pass_back(x, error, levels, config, sink, mix, eps)
    return grads


def pass_back(
    x: Tensor, error: Tensor, levels: list[dict], config: CMSConfig, sink: Sink, mix: Tensor | None = None, eps: float = NORM_EPS,
    ops=chunked,
) -> None:
    """Reads a segment again and takes ``error`` [B, C1, d] = dL/dy back through it, into ``sink``. In any mode of the caller."""
    if not learning_levels(config):
        return
    with torch.inference_mode(False), torch.enable_grad():
        x, error = (t.clone() if t.is_inference() else t.detach() for t in (x, error))
        anchor = torch.zeros((), dtype=torch.float32, device=x.device, requires_grad=True)
        y = cms_learn(x, levels, config, sink, anchor, mix, eps, ops)
        torch.autograd.grad(y, anchor, error)


class _Pass(NamedTuple):
    """Everything constant about one pass of ``cms_learn``."""

    levels: list[Level]
    config: CMSConfig
    sink: Sink
    share: Tensor | None  # [K] of the independent variant
    eps: float
    ops: ModuleType

    def forward(self, l: int, x: Tensor) -> tuple[Tensor, Saved]:
        return self.ops.level_forward(x, self.levels[l], self.config, self.eps, residual=self.share is None, keep=True)

    def backward(self, l: int, dy: Tensor, saved: Saved, need_dx: bool) -> Tensor | None:
        dx, factors = self.ops.level_backward(
            dy, saved, self.levels[l], self.config, self.eps, residual=self.share is None, need_dx=need_dx
        )
        if self.config.learning_rates[l] > 0:
            self.sink(l, factors)  # dx is known: from here on nobody needs the weights the segment was read with
        return dx


class _Learning(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, work):
        ctx.work, ctx.saved, y = work, [], x
        for l in range(len(work.levels)):
            if work.share is None:
                y, saved = work.forward(l, y)
            else:
                branch, saved = work.forward(l, x)
                y = y + work.share[l] * branch
            ctx.saved.append(saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        work, dx = ctx.work, dy
        lowest = min(learning_levels(work.config), default=0)  # below it nothing learns
        for l in reversed(range(len(work.levels))):
            saved, wanted = ctx.saved.pop(), ctx.needs_input_grad[0]
            if work.share is None:
                if l >= lowest or wanted:
                    dx = work.backward(l, dx, saved, wanted or l > lowest)
            elif wanted or work.config.learning_rates[l] > 0:
                part = work.backward(l, work.share[l] * dy, saved, wanted)
                dx = dx + part if wanted else None
        return dx if ctx.needs_input_grad[0] else None, dy.new_zeros(()), None


def _chain(x: Tensor, config: CMSConfig, mix: Tensor | None, level: Callable[[int, Tensor, bool], Tensor]) -> Tensor:
    if config.variant != "independent":
        for l in range(config.num_levels):
            x = level(l, x, True)
        return x
    share = torch.softmax(mix.to(x.dtype), 0)
    # The shares sum to 1, so the residual of the mixture is x itself.
    return x + sum(share[l] * level(l, x, False) for l in range(config.num_levels))


def _checked(levels: list[dict], config: CMSConfig, mix: Tensor | None) -> list[Level]:
    if len(levels) != config.num_levels:
        raise ValueError(f"cms_forward: argument levels has {len(levels)} entries, expected {config.num_levels}")
    if config.variant == "independent" and mix is None:
        raise ValueError("cms_forward: argument mix is None, expected [K] for variant='independent'")
    names = matrices(config)
    return [{n: Matrix.of(t) if n in names else t for n, t in level.items()} for level in levels]
