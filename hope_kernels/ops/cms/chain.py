"""The levels of a Continuum Memory System as one function, with fixed weights and in the pass that learns (Nested Learning eq 70-74).

    sequential, nested:  y = MLP_K(... MLP_1(x))        independent:  y = x + sum_l softmax(mix)_l branch_l(x)

``cms_forward`` is differentiable in everything. ``cms_learn`` is what learning while reading uses: its graph runs from y to x alone, and
when the backward has passed a level, that level's factors go to a ``sink``, which may change the level's weights at once. So the
activations of a segment are kept, and its gradients never are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...config import CMSConfig
from . import chunked
from .chunked import Factors, Level, master_dtype
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
    learning = learning_levels(config)

    def level(l: int, x: Tensor, residual: bool) -> Tensor:
        return _LearningLevel.apply(x, anchor if l in learning else None, levels[l], config, eps, residual, lambda f: sink(l, f), ops)

    levels = [{n: t.detach() for n, t in level.items()} for level in _checked(levels, config, mix)]
    return _chain(x, config, None if mix is None else mix.detach(), level)


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
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        y = cms_learn(x, levels, config, sink, anchor, mix, eps, ops)
        torch.autograd.grad(y, anchor, error)


class _LearningLevel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, level, config, eps, residual, sink, ops):
        keep = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        y, ctx.saved = ops.level_forward(x, level, config, eps, residual=residual, keep=keep)
        ctx.level, ctx.config, ctx.eps, ctx.residual, ctx.sink, ctx.ops = level, config, eps, residual, sink, ops
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        saved, ctx.saved = ctx.saved, None
        dx, factors = ctx.ops.level_backward(
            dy, saved, ctx.level, ctx.config, ctx.eps, residual=ctx.residual, need_dx=ctx.needs_input_grad[0]
        )
        if not ctx.needs_input_grad[1]:
            return dx, *[None] * 7
        ctx.sink(factors)  # dx is known: from here on nobody needs the weights the segment was read with
        return dx, dy.new_zeros(()), *[None] * 6


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
