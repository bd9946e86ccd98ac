"""What rows of a CMSState draft do with the gradient of a segment, for C++ that has yet to form it: ``absorb`` without
its arithmetic. The counters move, tensors become the draft's own, and what is to be done to which of them is a
``RowStep`` for every row and matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from operator import is_
from typing import NamedTuple

from torch import Tensor

from ...config import CMSConfig
from ..shared.cpu_library import POINTER, REAL, SIZE, address
from .absorb import Sizes, averages, grads_of, mark, own_weights, reset
from .cpp_step import ADAM, AS_IT_IS, GD, MOMENTUM, NORMALISED, ORTHOGONAL
from .level import ADAM_EPS, Adam
from .muon import step_size
from .precondition import inverses_of, ridge
from .relative import normalises, rate
from .schedule import due, matrices
from .state import CMSState

Shared = Callable[[], dict[str, Tensor]]  # a level's matrices in the layer, where they are asked for
Scale = Callable[[int], float] | None  # of the rates of a row


class RowStep(ctypes.Structure):
    """``SegmentStep`` of csrc/cpu/segment.h."""

    _fields_ = [
        ("rule", SIZE), ("whole", SIZE), *((n, REAL) for n in ("lr", "mu", "beta2", "first", "second", "root", "eps")),
        *((n, POINTER) for n in ("total", "weight", "moment", "square")),
    ]


class RowInverse(ctypes.Structure):
    """``RowInverse`` of csrc/cpu/precondition.h."""

    _fields_ = [("how", SIZE), ("ridge", REAL), ("now", POINTER), ("next", POINTER)]


class Plan(NamedTuple):
    """Of one level. steps: by matrix and row of the batch. inverses: by a matrix of ``precondition.SOURCE`` and row.
    held: the tensors that they point to. back: rows that ``take_back`` resets."""

    steps: dict[tuple[str, int], RowStep]
    inverses: dict[tuple[str, int], RowInverse]
    held: list[Tensor]
    back: list[int]


AT_ONCE, LATER, BY_THE_SUM = 1, 2, 3  # ``Preconditioning``
Known = dict[tuple, Plan]  # plans of one level: by what rows do


def planned(
    state: CMSState, config: CMSConfig, shared: Shared, l: int, rows: list[int], counts: list[int] | None,
    tokens: list[int], sizes: Sizes | None, scale: Scale, known: Known
) -> Plan:
    """``absorb`` of a segment of ``tokens`` [B] in ``rows`` of the draft ``state``, which holds no pending factors.

    known: earlier plans, for the same batch and configuration, which hold as long as their tensors do."""
    step, back, wait = due(config, l, rows, counts)
    for b in rows:
        state.tokens[l][b] += tokens[b]
    dirty = [b for b in step if state.dirty[l][b] or _whole(config)]
    if step and (state.weights[l] is None or not all([state.own[l][b] for b in step])):
        own_weights(state, shared(), l, step)
    parts = (
        state.writable("weights", l) if step else {}, averages(state, config, l, "moments") if step else {},
        averages(state, config, l, "squares") if step else {}, _sums(state, shared, l) if wait or dirty else {},
        # a copy of P that later segments take up is made before any segment is learned that is planned beside them
        *(inverses_of(state, config, l, shared, wait or dirty or config.chunks[l] > max(tokens, default=0))
          if step or wait else ({}, {})),
    )
    for b in step if parts[2] else ():
        state.steps[l][b] += 1
    rates = [1.0 if scale is None else scale(b) for b in step]
    key, held = (tuple(wait), tuple(step), tuple(dirty), tuple(rates)), [t for of in parts for t in of.values()]
    plan = known.get(key)
    if plan is None or parts[2] or len(held) != len(plan.held) or not all(map(is_, held, plan.held)):
        known[key] = plan = Plan({}, {}, held, [])
        _add(plan, parts[3], wait)
        _take(plan, state, config, l, step, rates, dirty, parts[:4], sizes)
        for how, of in ((AT_ONCE, [b for b in step if b not in dirty]), (LATER, wait), (BY_THE_SUM, dirty)):
            _take_up(plan, config, l, how, of, *parts[4:])
    if wait:
        mark(state.dirty[l], wait, 1)
    for counters in (state.dirty, state.tokens) if step else ():
        mark(counters[l], step, 0)
    return plan._replace(back=back) if back else plan


def take_back(state: CMSState | None, plans: dict[int, Plan]) -> None:
    """What ``plans``, by level, leave to be done to ``state`` once their steps are done."""
    for l, plan in plans.items():
        if plan.back and state is not None:
            reset(state, l, plan.back)


def _whole(config: CMSConfig) -> int:
    """What a step asks of its gradient as a whole, which therefore is in the level's sum."""
    return ORTHOGONAL if config.optimizer == "muon" else NORMALISED if normalises(config) else AS_IT_IS


def _sums(state: CMSState, shared: Shared, l: int) -> dict[str, Tensor]:
    return grads_of(state, {} if state.grads[l] is not None else shared(), l)


def _add(plan: Plan, sums: dict[str, Tensor], rows: list[int]) -> None:
    """The gradient of ``rows`` joins their sums."""
    for name, t in sums.items() if rows else ():
        at = _rows_of(t)
        for b in rows:
            plan.steps[name, b] = RowStep(rule=GD, lr=-1, weight=at(b))


def _take(
    plan: Plan, state: CMSState, config: CMSConfig, l: int, rows: list[int], rates: list[float], dirty: list[int],
    parts: tuple[dict[str, Tensor], ...], sizes: Sizes | None
) -> None:
    """``rows`` take a step, in those that are ``dirty`` with what they have summed up."""
    weights, moments, squares, sums = parts
    whole = _whole(config)
    for name in matrices(config) if rows else ():
        w, m, v, g = (_rows_of(part.get(name)) for part in (weights, moments, squares, sums))
        lr = rate(config, l, name, None if sizes is None else sizes[name])
        for b, factor in zip(rows, rates):
            size = step_size(factor * lr, *weights[name].shape[1:]) if whole == ORTHOGONAL else factor * lr
            numbers: tuple = (MOMENTUM if moments else GD, whole, size, config.momentum, 0, 0, 0, 0, 0)
            if squares:
                adam = Adam(squares[name], config.betas, state.steps[l][b], state.tokens[l][b])
                first, root = adam.rates(factor * lr)
                numbers = (ADAM, whole, first, *adam.betas, *adam.shares, root, ADAM_EPS)
            plan.steps[name, b] = RowStep(*numbers, g(b) if b in dirty else None, w(b), m(b), v(b))


def _take_up(
    plan: Plan, config: CMSConfig, l: int, how: int, rows: list[int], now: dict[str, Tensor], later: dict[str, Tensor]
) -> None:
    """What the P of ``rows`` do with a segment's inputs."""
    for name, P in now.items() if rows else ():
        at, behind = _rows_of(P), _rows_of(later.get(name))
        for b in rows:
            plan.inverses[name, b] = RowInverse(how, ridge(config, l), at(b), behind(b))


def _rows_of(t: Tensor | None) -> Callable[[int], int | None]:
    """The address of a row of t [B, r, c]."""
    if t is None:
        return lambda b: None
    first, size = address(t, t.numel()), 4 * t[0].numel()
    assert first is not None
    return lambda b: first + size * b
