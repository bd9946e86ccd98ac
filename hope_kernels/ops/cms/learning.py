"""How the levels of a CMSState draft learn: accumulate, step, fold, reset. In place, level by level, row by
row of a batch.

At a boundary every row of a level either waits (its gradient joins the accumulator), steps, or is reset
(``ops/cms/schedule.py``). A step of a row whose accumulator is empty never forms a gradient: the segment's
factors are multiplied into the weights or the momentum, or, for small periods, kept as they are (``pending``)
and multiplied in several refreshes later. In real arithmetic that is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import CMSConfig
from ...state import master_dtype
from . import level as chunked
from .level import Factors
from .muon import muon_step_
from .schedule import due, matrices
from .state import CMSState

Shared = dict[str, Tensor]  # a level's matrices in the layer: name -> [rows, cols]


def absorb(
    state: CMSState, config: CMSConfig, shared: Shared, level: int, factors: Factors | None, rows: list[int],
    counts: list[int] | None, pending: int = 0, ops=chunked,
) -> None:
    """``level`` of the draft ``state`` learns one segment in ``rows`` (ascending), and commits in those that
    are due at ``counts``.

    factors: per matrix [B, C, rows] and [B, C, cols], or None: there is no new segment. counts: per row of
    the batch; None: nothing commits. pending: tokens whose factors a row may hold before they are folded
    (optimizer="gd").
    """
    if config.learning_rates[level] == 0:
        return
    step, back, wait = due(config, level, rows, counts)
    if wait and factors is not None:
        _accumulate(state, shared, level, factors, wait, ops)
    if step:
        _step(state, config, shared, level, factors, step, pending, ops)
    if back:
        reset(state, level, back)


def accumulate(state: CMSState, level: int, grads: dict[str, Tensor], rows: list[int]) -> None:
    """Gradients [B, rows, cols] that somebody else has computed join the accumulator in ``rows``."""
    total = _grads(state, {n: g[0] for n, g in grads.items()}, level)
    for name, g in grads.items():
        for b in rows:
            total[name][b].add_(g[b])
    _mark(state.dirty[level], rows, 1)


def fold(state: CMSState, config: CMSConfig, shared: Shared, level: int, rows: list[int], ops=chunked) -> None:
    """Pending factors of ``rows`` become part of weights of their own."""
    own_weights(state, shared, level, rows)
    held = [b for b in rows if state.rank[level][b]]
    if not held:
        return
    weights, copies = state.writable("weights", level), _copies(state, level)
    left, right = state.writable("left", level), state.writable("right", level)
    for name, w in weights.items():
        ops.refresh_(w, copies.get(name), left[name], right[name], held, config.learning_rates[level])
    _zero(left, held)
    _zero(right, held)
    _mark(state.rank[level], held, 0)


def own_weights(state: CMSState, shared: Shared, level: int, rows: list[int]) -> None:
    """Copy on write: ``rows`` get weights of their own, equal to the layer's where they had none."""
    new = [b for b in rows if not state.own[level][b]]
    if state.weights[level] is None:
        wide = {n: p.detach().to(master_dtype(p.dtype)).expand(state.batch, -1, -1) for n, p in shared.items()}
        state.put("weights", level, {n: t.clone(memory_format=torch.contiguous_format) for n, t in wide.items()})
    elif new:
        for name, w in state.writable("weights", level).items():
            for b in new:
                w[b].copy_(shared[name].detach())
    dtype = next(iter(shared.values())).dtype
    if dtype == master_dtype(dtype):
        pass
    elif state.copies[level] is None:
        state.put("copies", level, {n: w.to(dtype) for n, w in state.weights[level].items()})
    elif new:
        for name, copy in state.writable("copies", level).items():
            for b in new:
                copy[b].copy_(state.weights[level][name][b])
    _mark(state.own[level], new, 1)


def share(state: CMSState, level: int, rows: list[int]) -> None:
    """``rows`` have the layer's weights again; pending factors are forgotten, momentum and gradients are not."""
    for part in ("left", "right"):
        if getattr(state, part)[level] is not None:
            _zero(state.writable(part, level), rows)
    for counters in (state.own, state.rank):
        _mark(counters[level], rows, 0)


def reset(state: CMSState, level: int, rows: list[int]) -> None:
    """``rows`` have the layer's weights again, and have learned and accumulated nothing."""
    share(state, level, rows)
    for part in ("grads", "moments"):
        if getattr(state, part)[level] is not None:
            _zero(state.writable(part, level), rows)
    _mark(state.dirty[level], rows, 0)


def _step(
    state: CMSState, config: CMSConfig, shared: Shared, level: int, factors, rows: list[int], pending: int, ops
) -> None:
    lr, dirty = config.learning_rates[level], [b for b in rows if state.dirty[level][b]]
    clean = [b for b in rows if b not in dirty]
    if clean and factors is not None and config.optimizer == "gd" and pending >= factors["down"][0].shape[1]:
        _keep(state, config, shared, level, factors, clean, pending, ops)
        rows, clean = dirty, []
    if not rows or (factors is None and state.grads[level] is None and state.moments[level] is None):
        return
    fold(state, config, shared, level, rows, ops)
    weights, copies = state.writable("weights", level), _copies(state, level)
    if config.optimizer == "muon":
        total = (
            _accumulate(state, shared, level, factors, rows, ops) if factors is not None
            else _grads(state, shared, level)
        )
        for name, w in weights.items():
            muon_step_(w, copies.get(name), total[name], rows, lr, ops)
    else:
        moments = _moments(state, config, level)
        for group, total in ((clean, {}), (dirty, _grads(state, shared, level) if dirty else {})):
            for name, w in weights.items() if group else ():
                left, right = (None, None) if factors is None else factors[name]
                ops.refresh_(w, copies.get(name), left, right, group, lr, moment=moments.get(name),
                             mu=config.momentum,
                             total=total.get(name))
    _mark(state.dirty[level], rows, 0)


def _keep(
    state: CMSState, config: CMSConfig, shared: Shared, level: int, factors: Factors, rows: list[int],
    pending: int, ops
) -> None:
    """The segment's factors wait beside those of earlier segments; rows without room fold theirs first."""
    tokens, rank = factors["down"][0].shape[1], state.rank[level]
    held = state.left[level]
    if held is not None and next(iter(held.values())).shape[1] != pending:  # from a machine with another limit
        fold(state, config, shared, level, [b for b in range(state.batch) if rank[b]], ops)
        held = None
    if held is None:
        for part, side in (("left", 0), ("right", 1)):
            pairs = {n: factors[n][side] for n in matrices(config)}
            state.put(part, level, {n: t.new_zeros(state.batch, pending, t.shape[2]) for n, t in pairs.items()})
    full = [b for b in rows if rank[b] + tokens > pending]
    if full:
        fold(state, config, shared, level, full, ops)
    left, right = state.writable("left", level), state.writable("right", level)
    for name in left:
        for b in rows:
            for kept, new in zip((left[name], right[name]), factors[name]):
                kept[b, rank[b] : rank[b] + tokens] = new[b]
    for b in rows:
        rank[b] += tokens


def _accumulate(
    state: CMSState, shared: Shared, level: int, factors: Factors, rows: list[int], ops
) -> dict[str, Tensor]:
    total = _grads(state, shared, level)
    for name, t in total.items():
        ops.outer_add_(t, *factors[name], rows)
    _mark(state.dirty[level], rows, 1)
    return total


def _grads(state: CMSState, like: Shared, level: int) -> dict[str, Tensor]:
    if state.grads[level] is not None:
        return state.writable("grads", level)
    zero = {n: t.new_zeros(state.batch, *t.shape, dtype=master_dtype(t.dtype)) for n, t in like.items()}
    return state.put("grads", level, zero)


def _moments(state: CMSState, config: CMSConfig, level: int) -> dict[str, Tensor]:
    if config.optimizer != "momentum":
        return {}
    if state.moments[level] is not None:
        return state.writable("moments", level)
    return state.put("moments", level, {n: torch.zeros_like(w) for n, w in state.weights[level].items()})


def _copies(state: CMSState, level: int) -> dict[str, Tensor]:
    if state.copies[level] is None:
        return {}
    return state.writable("copies", level)


def _zero(tensors: dict[str, Tensor], rows: list[int]) -> None:
    for t in tensors.values():
        for b in rows:
            t[b].zero_()


def _mark(counters: list[int], rows: list[int], value: int) -> None:
    for b in rows:
        counters[b] = value
