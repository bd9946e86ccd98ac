"""What a level of a CMSState draft does with a segment: accumulate its gradient, take a step, keep its
factors pending, fold them, go back to the shared weights. In place, level by level, row by row of a batch.

At a boundary every row of a level either waits (its gradient joins the accumulator), takes a step, or is
reset (``schedule.py``). A step of a row whose accumulator is empty never forms a gradient: the segment's
factors are multiplied into the weights or the momentum, or, for small periods, kept as they are
(``pending.py``) and multiplied in several refreshes later. In real arithmetic that is the same.

Everywhere: l is the level's index, 0 for level 1, and ``ops`` the functions of ``level.py`` on a backend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...config import CMSConfig
from ...state import master_dtype
from . import level
from .level import Adam, Factors
from .muon import muon_step_
from .precondition import forget_, forget_later_, precondition_total_, preconditioned, take_up_later_
from .relative import normalise_, normalises, rate
from .schedule import due, hidden_dim, matrices
from .state import CMSState

Shared = dict[str, Tensor]  # a level's matrices in the layer: name -> [r, c]
Sizes = dict[str, float]  # the RMS of their elements, by name


def absorb(
    state: CMSState, config: CMSConfig, shared: Shared, l: int, factors: Factors | None, rows: list[int],
    counts: list[int] | None, pending: int = 0, ops=level, tokens: list[int] | None = None,
    sizes: Sizes | None = None, scale: float = 1.0,
) -> None:
    """Level ``l`` of the draft ``state`` learns one segment in ``rows`` of the batch (ascending), and commits
    in those that are due at ``counts``.

    factors: [B, C, r] and [B, C, c] for each matrix, or None: there is no new segment. counts: tokens each
    row has read; None: nothing commits. pending: tokens whose factors a row may hold before they are folded
    (optimizer="gd"). tokens: how many of the segment count, for each row of the batch (None: all C); the
    factors of the others, errors and inputs, are zero. sizes: what relative rates are relative to.
    scale: of all rates.
    """
    if config.learning_rates[l] == 0:
        return
    step, back, wait = due(config, l, rows, counts)
    if factors is not None:
        C = factors["down"][0].shape[1]
        for b in rows:
            state.tokens[l][b] += C if tokens is None else tokens[b]
        whole = getattr(ops, "whole_segments", None)
        if whole is not None and whole(config.chunks[0]):
            factors = _filled_up(factors, config.chunks[0])
    if wait and factors is not None:
        _accumulate(state, config, shared, l, factors, wait, ops)
    if step:
        _step(state, config, shared, l, factors, step, pending, ops, sizes, scale)
        mark(state.tokens[l], step, 0)
    if back:
        reset(state, l, back)


def add_gradients(
    state: CMSState, config: CMSConfig, l: int, grads: dict[str, Tensor], rows: list[int]
) -> None:
    """Gradients [B, r, c] by the name of their matrix, of a segment of C1 tokens, join the accumulator in
    ``rows``."""
    total = grads_of(state, {n: g[0] for n, g in grads.items()}, l)
    for name, g in grads.items():
        for b in rows:
            total[name][b].add_(g[b])
    mark(state.dirty[l], rows, 1)
    for b in rows:
        state.tokens[l][b] += config.chunks[0]


def fold(state: CMSState, config: CMSConfig, shared: Shared, l: int, rows: list[int], ops=level) -> None:
    """Pending factors of ``rows`` become part of weights of their own."""
    own_weights(state, shared, l, rows)
    held = [b for b in rows if state.rank[l][b]]
    if not held:
        return
    weights, copies = state.writable("weights", l), _copies(state, l)
    left, right = state.writable("left", l), state.writable("right", l)
    for name, w in weights.items():
        ops.refresh_(w, copies.get(name), left[name], right[name], held, config.matrix_rates(l)[name])
    _zero(left, held)
    _zero(right, held)
    mark(state.rank[l], held, 0)


def own_weights(state: CMSState, shared: Shared, l: int, rows: list[int]) -> None:
    """Copy on write: ``rows`` get weights of their own, equal to the layer's where they had none."""
    new = [b for b in rows if not state.own[l][b]]
    if state.weights[l] is None:
        wide = {n: p.detach().to(master_dtype(p.dtype)).expand(state.batch, -1, -1) for n, p in shared.items()}
        state.put("weights", l, {n: t.clone(memory_format=torch.contiguous_format) for n, t in wide.items()})
    elif new:
        for name, w in state.writable("weights", l).items():
            for b in new:
                w[b].copy_(shared[name].detach())
    dtype = next(iter(shared.values())).dtype
    if dtype == master_dtype(dtype):
        pass
    elif state.copies[l] is None:
        state.put("copies", l, {n: w.to(dtype) for n, w in state.weights[l].items()})
    elif new:
        for name, copy in state.writable("copies", l).items():
            for b in new:
                copy[b].copy_(state.weights[l][name][b])
    mark(state.own[l], new, 1)


def share(state: CMSState, l: int, rows: list[int]) -> None:
    """``rows`` have the layer's weights again; pending factors are forgotten, momentum and gradients are not."""
    for part in ("left", "right"):
        if getattr(state, part)[l] is not None:
            _zero(state.writable(part, l), rows)
    for counters in (state.own, state.rank):
        mark(counters[l], rows, 0)


def reset(state: CMSState, l: int, rows: list[int]) -> None:
    """``rows`` have the layer's weights again, and have learned and accumulated nothing."""
    share(state, l, rows)
    for part in ("grads", "moments", "squares"):
        if getattr(state, part)[l] is not None:
            _zero(state.writable(part, l), rows)
    forget_(state, l, rows)
    for counters in (state.dirty, state.tokens, state.steps):
        mark(counters[l], rows, 0)


def good_weights(
    state: CMSState, shared: Shared, l: int, rows: list[int], before: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """A copy of what ``rows`` have learned in level ``l``, in the dtype of the layer: [B, r, c] by name, the other
    rows as in ``before``."""
    fold(state, state.config, shared, l, rows)
    dtype = next(iter(shared.values())).dtype
    held = state.weights[l] if state.copies[l] is None else state.copies[l]
    found = {}
    for name, t in held.items():
        found[name] = t.to(dtype, copy=True) if before is None else before[name].clone()
        for b in rows:
            found[name][b].copy_(t[b])
    return found


def go_back(
    state: CMSState, shared: Shared, l: int, rows: list[int], kept: list[int], good: dict[str, Tensor] | None
) -> None:
    """``rows`` have in level ``l`` the weights ``good`` (those of ``rows`` in ``kept``), or the layer's; what
    they have accumulated, and the direction they moved in, is forgotten."""
    kept = [] if good is None else kept
    share(state, l, [b for b in rows if b not in kept])
    if kept and good is not None:
        fold(state, state.config, shared, l, kept)
        weights, copies = state.writable("weights", l), _copies(state, l)
        for name, t in good.items():
            for b in kept:
                for held in (weights, copies) if copies else (weights,):
                    held[name][b].copy_(t[b])
    for part in ("grads", "moments"):
        if getattr(state, part)[l] is not None:
            _zero(state.writable(part, l), rows)
    forget_later_(state, l, rows)
    for counters in (state.dirty, state.tokens):
        mark(counters[l], rows, 0)


def _step(
    state: CMSState, config: CMSConfig, shared: Shared, l: int, factors: Factors | None, rows: list[int],
    pending: int, ops, sizes: Sizes | None, scale: float
) -> None:
    """An optimizer step in ``rows``; for those that have accumulated nothing no gradient is formed, but where
    the optimizer needs its size or its singular values."""
    dirty = [b for b in rows if state.dirty[l][b]]
    clean = [b for b in rows if b not in dirty]
    rates = {n: scale * rate(config, l, n, None if sizes is None else sizes[n]) for n in matrices(config)}
    normalised = normalises(config)
    rest = factors  # what is new in dirty rows
    if config.optimizer == "muon" or normalised:
        dirty, clean = rows, []
    if config.optimizer == "muon" or normalised or config.precondition is not None and dirty:
        if factors is not None:
            _accumulate(state, config, shared, l, factors, dirty, ops)
        if normalised and state.grads[l] is not None:
            for g in grads_of(state, shared, l).values():
                normalise_(g, dirty, ops)
        if config.precondition is not None and state.grads[l] is not None:
            precondition_total_(state, l, grads_of(state, shared, l), dirty)
        rest = None
    if config.precondition is not None and factors is not None and clean:
        factors = preconditioned(state, config, l, factors, clean)
    if clean and factors is not None and config.optimizer == "gd" and pending >= factors["down"][0].shape[1]:
        waiting = factors if scale == 1 else {n: (scale * left, right) for n, (left, right) in factors.items()}
        _keep(state, config, shared, l, waiting, clean, pending, ops)
        rows, clean = dirty, []
    if not rows or (factors is None and state.grads[l] is None and state.moments[l] is None):
        return
    fold(state, config, shared, l, rows, ops)
    weights, copies = state.writable("weights", l), _copies(state, l)
    if config.optimizer == "muon":
        total = grads_of(state, shared, l)
        for name, w in weights.items():
            muon_step_(w, copies.get(name), total[name], rows, rates[name], ops, hidden_dim(name))
    else:
        moments, squares = averages(state, config, l, "moments"), averages(state, config, l, "squares")
        for b in rows if squares else ():
            state.steps[l][b] += 1
        sums = grads_of(state, shared, l) if dirty else {}
        for group, new, total in ((clean, factors, {}), (dirty, rest, sums)):
            for same in _at_one_step(state, l, group) if squares else [group] if group else []:
                at = state.steps[l][same[0]], state.tokens[l][same[0]]
                for name, w in weights.items():
                    left, right = (None, None) if new is None else new[name]
                    adam = Adam(squares[name], config.betas, *at) if squares else None
                    if adam is not None and state.private is not None and state.private.late is not None:
                        adam = adam._replace(late=state.private.late(l, adam, rates[name]))
                    ops.refresh_(w, copies.get(name), left, right, same, rates[name], moment=moments.get(name),
                                 mu=config.momentum, total=total.get(name), adam=adam)
    mark(state.dirty[l], rows, 0)


def alike(rows: list[int], scale: Callable[[int], float] | None) -> dict[float, list[int]]:
    """``rows`` by the factor of their rates."""
    groups: dict[float, list[int]] = {}
    for b in rows:
        groups.setdefault(1.0 if scale is None else scale(b), []).append(b)
    return groups


def _at_one_step(state: CMSState, l: int, rows: list[int]) -> list[list[int]]:
    """``rows`` by the number of Adam's step that they take, and of the tokens that it is for."""
    groups: dict[tuple[int, int], list[int]] = {}
    for b in rows:
        groups.setdefault((state.steps[l][b], state.tokens[l][b]), []).append(b)
    return list(groups.values())


def _filled_up(factors: Factors, C: int) -> Factors:
    """Those of ``C`` tokens, zeros after the last one: a backend's bits may depend on how many there are, and
    rows that learn side by side come with as many as the longest of them has."""
    missing = C - factors["down"][0].shape[1]
    if missing <= 0:
        return factors
    longer = lambda t: torch.cat([t, t.new_zeros(t.shape[0], missing, t.shape[2])], 1)
    return {name: (longer(left), longer(right)) for name, (left, right) in factors.items()}


def _keep(
    state: CMSState, config: CMSConfig, shared: Shared, l: int, factors: Factors, rows: list[int],
    pending: int, ops
) -> None:
    """The segment's factors wait beside those of earlier segments; rows without room fold theirs first."""
    tokens, rank = factors["down"][0].shape[1], state.rank[l]
    held = state.left[l]
    if held is not None and next(iter(held.values())).shape[1] != pending:  # kept under another limit
        fold(state, config, shared, l, [b for b in range(state.batch) if rank[b]], ops)
        held = None
    if held is None:
        for part, side in (("left", 0), ("right", 1)):
            pairs = {n: factors[n][side] for n in matrices(config)}
            state.put(part, l, {n: t.new_zeros(state.batch, pending, t.shape[2]) for n, t in pairs.items()})
    full = [b for b in rows if rank[b] + tokens > pending]
    if full:
        fold(state, config, shared, l, full, ops)
    left, right = state.writable("left", l), state.writable("right", l)
    for name in left:
        for b in rows:
            for kept, new in zip((left[name], right[name]), factors[name]):
                kept[b, rank[b] : rank[b] + tokens] = new[b]
    for b in rows:
        rank[b] += tokens


def _accumulate(
    state: CMSState, config: CMSConfig, shared: Shared, l: int, factors: Factors, rows: list[int], ops
) -> None:
    for name, t in grads_of(state, shared, l).items():
        ops.outer_add_(t, *factors[name], rows)
    if config.precondition is not None:
        take_up_later_(state, config, l, factors, rows)
    mark(state.dirty[l], rows, 1)


def grads_of(state: CMSState, like: Shared, l: int) -> dict[str, Tensor]:
    """The sums of a level, for a draft to write into."""
    if state.grads[l] is not None:
        return state.writable("grads", l)
    zero = {n: t.new_zeros(state.batch, *t.shape, dtype=master_dtype(t.dtype)) for n, t in like.items()}
    return state.put("grads", l, zero)


def averages(state: CMSState, config: CMSConfig, l: int, part: str) -> dict[str, Tensor]:
    """``moments`` or ``squares`` of a level whose optimizer has any."""
    if config.optimizer not in {"moments": ("momentum", "adam"), "squares": ("adam",)}[part]:
        return {}
    if getattr(state, part)[l] is not None:
        return state.writable(part, l)
    return state.put(part, l, {n: torch.zeros_like(w) for n, w in state.weights[l].items()})


def _copies(state: CMSState, l: int) -> dict[str, Tensor]:
    if state.copies[l] is None:
        return {}
    return state.writable("copies", l)


def _zero(tensors: dict[str, Tensor], rows: list[int]) -> None:
    for t in tensors.values():
        for b in rows:
            t[b].zero_()


def mark(counters: list[int], rows: list[int], value: int) -> None:
    for b in rows:
        counters[b] = value
