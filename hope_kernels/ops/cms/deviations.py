"""Weights of rows that have learned, as deviations from weights that an outer optimizer moves:

    W_b = W_0 + sg(Delta_b)        Delta_b: what row b has learned, sg: a constant of the outer graph

so that W_0 keeps its gradient after a row's first refresh, and learned rates get one:

    dL/dW_0 = sum_b dL/dW_b        dL/dlog(lr) = sum_b <dL/dW_b, Delta_b>

the latter since Delta_b is linear in its rate where the gradients that it was made of are constants. A state holds
W_b itself, so that reading and learning are bit for bit those without an outer graph, and ``Base``: the W_0 of its
latest call. ``followed`` moves W_b by what W_0 has moved since.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...identity import Checksum
from .schedule import learning_levels
from .state import CMSState

Shared = dict[str, Tensor]  # a level's matrices in the layer: name -> [r, c]


class Base(NamedTuple):
    """The layer's matrices as they were, by level (None: lr = 0); nobody writes into them. mark: of the layer's
    parameters."""

    mark: Checksum | None
    levels: list[Shared | None]


class _Straight(torch.autograd.Function):
    """(W_0 or None, log(lr) or None, W_b [B, r, c], deviation() -> [B, r, c], rows that have learned) -> W_b."""

    @staticmethod
    def forward(ctx, shared, log_rate, held, deviation, own):
        ctx.deviation, ctx.own, ctx.like = deviation, own, (shared, log_rate)
        return held.view_as(held)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        shared, log_rate = ctx.like
        if not all(ctx.own):
            grad = grad[[b for b, o in enumerate(ctx.own) if o]]
        by_shared = grad.sum(0).to(shared.dtype) if ctx.needs_input_grad[0] else None
        by_rate = None
        if ctx.needs_input_grad[1]:
            delta = ctx.deviation()
            delta = delta if all(ctx.own) else delta[[b for b, o in enumerate(ctx.own) if o]]
            by_rate = (grad.to(delta.dtype) * delta).sum().to(log_rate.dtype)
        return by_shared, by_rate, None, None, None


def straight(state: CMSState, l: int, name: str, held: Tensor, shared: Tensor, log_rate: Tensor | None) -> Tensor:
    """``held`` [B, r, c], bit for bit, as a function of ``shared`` [r, c] and of the scalar ``log_rate``.

    held: the weights of ``state``, which has a base, in the dtype that is read. shared: W_0. log_rate: None where
    rates are not learned. With ``rank``, held is a deviation itself (L), and W_0 gets its gradient elsewhere.
    """
    assert state.base is not None and state.weights[l] is not None
    master, low = state.weights[l][name].detach(), state.config.rank is not None
    base = None if low else state.base.levels[l][name]
    delta = lambda: master if base is None else master - base.to(master.device, master.dtype)
    return _Straight.apply(None if low else shared, log_rate, held, delta, tuple(state.own[l]))


def based(state: CMSState, mark: Checksum | None, matrices: list[Shared]) -> CMSState:
    """``state``, which stands at the layer's ``matrices`` [r, c] (by level) as they are now, with these as its base."""
    base = state.base
    if base is not None and mark is not None and base.mark is mark:
        return state
    learning = learning_levels(state.config)
    levels = [{n: t.detach().clone() for n, t in m.items()} if l in learning else None for l, m in enumerate(matrices)]
    return replace(state, base=Base(mark, levels))


@torch.no_grad()
def followed(state: CMSState, mark: Checksum | None, matrices: list[Shared]) -> CMSState:
    """``state``, which has a base, at the layer's ``matrices`` [r, c] (by level) as they are now. It stays as it is and
    shares what is the same: ``weights`` where no row has to move. With ``rank``, W_b = W_0 + L_b S follows by itself.
    """
    base = state.base
    assert base is not None
    if mark is not None and base.mark is mark or state.config.rank is not None:
        return state
    draft, moved = state.draft("none"), False
    for l, before in enumerate(base.levels):
        held, now = draft.weights[l], matrices[l]
        if before is None or held is None or not any(draft.own[l]):
            continue
        shift = {n: now[n].to(t) - before[n].to(t) for n, t in held.items()}
        if not any(bool(t.any()) for t in shift.values()):
            continue
        moved, copies = True, draft.copies[l]
        draft.weights[l] = {n: t + shift[n] for n, t in held.items()}
        if copies is not None:
            draft.copies[l] = {n: draft.weights[l][n].to(t.dtype) for n, t in copies.items()}
    return based(draft.finished() if moved else state, mark, matrices)
