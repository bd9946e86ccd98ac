"""The levels of a Continuum Memory System as one function, with fixed weights and in the pass that learns
(Nested Learning eq 70-74).

    sequential, nested:  y = MLP_K(... MLP_1(x))        independent:  y = x + sum_l softmax(mix)_l branch_l(x)

``cms_forward`` is differentiable in everything. ``cms_learn`` is what learning while reading uses: its graph
runs from y to x alone, and when the backward has passed a level, that level's factors go to a ``sink``, which
may change the level's weights at once. So the activations of a segment are kept, and its gradients never are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import CMSConfig
from ...state import master_dtype
from . import level
from .level import Factors, Level
from .matrix import Matrix
from .schedule import learning_levels, matrices

NORM_EPS = 1e-6
Sink = Callable[[int, Factors], None]  # (index of the level, its factors)


class Work(NamedTuple):
    """How the levels are read. eps: of the norm. ops: the functions of ``level.py`` on a backend. sink,
    anchor: in the pass that learns; see ``cms_learn``."""

    config: CMSConfig
    eps: float = NORM_EPS
    ops: ModuleType = level
    sink: Sink | None = None
    anchor: Tensor | None = None


def read_level(l: int, x: Tensor, tensors: dict, work: Work, residual: bool) -> Tensor:
    """Level l alone, from its tensors: branch(x), or x + branch(x) with ``residual``. In the pass that learns
    its graph runs to x and to the anchor."""
    names = matrices(work.config)
    tensors = {n: Matrix.of(t) if n in names else t for n, t in tensors.items()}
    if work.sink is None:
        return work.ops.level_forward(x, tensors, work.config, work.eps, residual=residual, keep=False)[0]
    tensors = {n: t.detach() for n, t in tensors.items()}
    # neither this level nor any before it learns: no graph, no backward
    if work.config.learning_rates[l] == 0 and not x.requires_grad:
        with torch.no_grad():
            return work.ops.level_forward(x, tensors, work.config, work.eps, residual=residual, keep=True)[0]
    return _Learning.apply(x, work.anchor, _Pass(l, tensors, work, residual))


def read_levels(
    x: Tensor, config: CMSConfig, mix: Tensor | None, read: Callable[[int, Tensor, bool], Tensor], learns: bool
) -> Tensor:
    """All levels of a CMS, by ``read(l, x, residual)``. learns: in the pass that learns, where ``mix`` is a
    constant."""
    if config.variant != "independent":
        for l in range(config.num_levels):
            x = read(l, x, True)
        return x
    assert mix is not None
    share = torch.softmax((mix.detach() if learns else mix).to(x.dtype), 0)
    # all branches before the sum: its backward begins with dL/dy and adds the levels' parts, the last level first
    branches, y = [read(l, x, False) for l in range(config.num_levels)], x
    for l, branch in enumerate(branches):
        y = y + share[l] * branch  # the shares sum to 1, so the residual of the mixture is x itself
    return y


def cms_forward(
    x: Tensor, levels: list[dict], config: CMSConfig, mix: Tensor | None = None, eps: float = NORM_EPS, ops=level
) -> Tensor:
    """All levels at fixed weights; differentiable on the chunked backend.

    x: [B, T, d].  levels: level 1 first, in the dtype of x; a matrix is [r, c], [B, r, c] or a ``Matrix``.
    mix: [K], independent only.  ops: the functions of ``level.py`` on a backend.  Returns [B, T, d].
    Raises ValueError for a number of levels other than K, or the independent variant without ``mix``.
    Source: Nested Learning eq 72-74.
    """
    return _read(x, levels, mix, Work(config, eps, ops))


def cms_learn(
    x: Tensor, levels: list[dict], config: CMSConfig, sink: Sink, anchor: Tensor, mix: Tensor | None = None,
    eps: float = NORM_EPS, ops=level,
) -> Tensor:
    """``cms_forward`` whose backward gives dL/dx and calls ``sink(l, factors)`` for every level l with lr >
    0, the last level first.

    anchor: a scalar that requires a gradient; differentiate with respect to it (x itself may be a constant).
    Its gradient is zero.
    """
    return _read(x, levels, mix, Work(config, eps, ops, sink, anchor))


def _read(x: Tensor, levels: list[dict], mix: Tensor | None, work: Work) -> Tensor:
    config = work.config
    if len(levels) != config.num_levels:
        raise ValueError(f"cms_forward: argument levels has {len(levels)} entries, expected {config.num_levels}")
    if config.variant == "independent" and mix is None:
        raise ValueError("cms_forward: argument mix is None, expected [K] for variant='independent'")
    return read_levels(
        x, config, mix, lambda l, x, residual: read_level(l, x, levels[l], work, residual), work.sink is not None
    )


def cms_gradients(
    x: Tensor, error: Tensor, levels: list[dict], config: CMSConfig, mix: Tensor | None = None,
    eps: float = NORM_EPS
) -> list[dict[str, Tensor] | None]:
    """g_b = d sum_t <error_bt, y_bt> / d theta_b for one segment: what a refresh accumulates, per row.

    x, error: [B, C1, d], the segment's inputs and dL/dy.  levels, mix: as in ``cms_forward``.
    Returns, per level, None (lr = 0) or a dict name -> [B, r, c] in the master dtype. Works under any grad or
    inference mode of the caller and is detached from every outer graph. Source: Nested Learning eq 71.
    """
    grads: list[dict[str, Tensor] | None] = [None] * config.num_levels

    def sink(l: int, factors: Factors) -> None:
        wide = {n: [t.to(master_dtype(x.dtype)) for t in pair] for n, pair in factors.items()}
        grads[l] = {n: torch.bmm(wide[n][0].mT, wide[n][1]) for n in matrices(config)}

    pass_back(x, error, levels, config, sink, mix, eps)
    return grads


def pass_back(
    x: Tensor, error: Tensor, levels: list[dict], config: CMSConfig, sink: Sink, mix: Tensor | None = None,
    eps: float = NORM_EPS, ops=level,
) -> None:
    """Reads a segment again and takes ``error`` [B, C1, d] = dL/dy back through it: every learning level's
    factors go to ``sink``. In any grad or inference mode of the caller."""
    pull_back(x, error, config, lambda x, anchor: cms_learn(x, levels, config, sink, anchor, mix, eps, ops))


def pull_back(x: Tensor, error: Tensor, config: CMSConfig, read: Callable[[Tensor, Tensor], Tensor]) -> None:
    """``pass_back`` for any ``read(x, anchor)`` that reads the levels as ``cms_learn`` does."""
    if not learning_levels(config):
        return
    with torch.inference_mode(False), torch.enable_grad():
        x, error = (t.clone() if t.is_inference() else t.detach() for t in (x, error))
        anchor = torch.zeros((), dtype=torch.float32, device=x.device, requires_grad=True)
        torch.autograd.grad(read(x, anchor), anchor, error)


class _Pass(NamedTuple):
    """Everything constant about one level's part in the pass that learns."""

    l: int
    tensors: Level
    work: Work
    residual: bool


class _Learning(torch.autograd.Function):
    """One level in the pass that learns: the backward gives dL/dx, and the factors to the sink."""

    @staticmethod
    def forward(ctx, x, anchor, part):
        work = part.work
        y, saved = work.ops.level_forward(x, part.tensors, work.config, work.eps, residual=part.residual, keep=True)
        ctx.part, ctx.saved = part, saved
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (l, tensors, work, residual), saved, ctx.saved = ctx.part, ctx.saved, None
        need_dx = ctx.needs_input_grad[0]
        dx, factors = work.ops.level_backward(
            dy, saved, tensors, work.config, work.eps, residual=residual, need_dx=need_dx
        )
        if work.config.learning_rates[l] > 0:
            work.sink(l, factors)  # dx is known: the weights that the segment was read with may change
        return dx, dy.new_zeros(()), None
