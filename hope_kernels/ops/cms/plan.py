"""What rows of a CMSState draft do with the gradient of a segment, for C++ that has yet to form it: ``absorb`` without
its arithmetic. The counters move, tensors become the draft's own, and what is to be done to which of them is a
``RowStep`` for every row and matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...config import CMSConfig
from ..shared.cpu_library import POINTER, REAL, SIZE, address
from .absorb import Sizes, averages, grads_of, mark, own_weights, reset, step_from_total
from .cpp_step import ADAM, GD, MOMENTUM
from .level import ADAM_EPS, Adam
from .relative import normalises, rate
from .schedule import due, matrices
from .state import CMSState

Shared = Callable[[], dict[str, Tensor]]  # a level's matrices in the layer, where they are asked for


class RowStep(ctypes.Structure):
    """``SegmentStep`` of csrc/cpu/segment.h."""

    _fields_ = [
        ("rule", SIZE), *((n, REAL) for n in ("lr", "mu", "beta2", "first", "second", "root", "eps")),
        *((n, POINTER) for n in ("total", "weight", "moment", "square")),
    ]


class Plan:
    """Of one level. steps: by matrix and row of the batch. held: what they point to."""

    def __init__(self) -> None:
        self.steps: dict[tuple[str, int], RowStep] = {}
        self.held: list[Any] = []
        self._after: list[Callable[[], None]] = []

    def finish(self) -> None:
        """What is left to do once the steps are done."""
        for act in self._after:
            act()

    def then(self, act: Callable[[], None]) -> None:
        self._after.append(act)

    def at(self, t: Tensor | None) -> Callable[[int], int | None]:
        """The address of a row of t [B, r, c]."""
        if t is None:
            return lambda b: None
        self.held.append(t)
        first, size = address(t, t.numel()), 4 * t[0].numel()
        assert first is not None
        return lambda b: first + size * b


def planned(
    state: CMSState, config: CMSConfig, shared: Shared, l: int, rows: list[int], counts: list[int] | None,
    tokens: list[int], ops: Any, sizes: Sizes | None, scale: Callable[[int], float] | None
) -> Plan:
    """``absorb`` of a segment of ``tokens`` [B] in ``rows`` of the draft ``state``, which holds no pending factors."""
    plan = Plan()
    step, back, wait = due(config, l, rows, counts)
    for b in rows:
        state.tokens[l][b] += tokens[b]
    summed = config.optimizer == "muon" or normalises(config)  # these ask for the gradient as a whole
    adding = wait + step if summed else wait
    if adding:
        for name, t in _sums(state, shared, l).items():
            at = plan.at(t)
            for b in adding:
                plan.steps[name, b] = RowStep(rule=GD, lr=-1, weight=at(b))
        mark(state.dirty[l], adding, 1)
    if step and summed:
        plan.then(lambda: step_from_total(state, config, shared(), l, step, ops, sizes, scale))
    elif step:
        _take(plan, state, config, shared, l, step, sizes, scale)
    if back:
        reset(state, l, back)
    return plan


def _sums(state: CMSState, shared: Shared, l: int) -> dict[str, Tensor]:
    return grads_of(state, {} if state.grads[l] is not None else shared(), l)


def _take(
    plan: Plan, state: CMSState, config: CMSConfig, shared: Shared, l: int, rows: list[int], sizes: Sizes | None,
    scale: Callable[[int], float] | None
) -> None:
    if state.weights[l] is None or not all([state.own[l][b] for b in rows]):
        own_weights(state, shared(), l, rows)
    weights = state.writable("weights", l)
    moments, squares = averages(state, config, l, "moments"), averages(state, config, l, "squares")
    dirty = [b for b in rows if state.dirty[l][b]]
    sums = _sums(state, shared, l) if dirty else {}
    for b in rows if squares else ():
        state.steps[l][b] += 1
    for name in matrices(config):
        w, m, v, g = (plan.at(t.get(name)) for t in (weights, moments, squares, sums))
        lr = rate(config, l, None if sizes is None else sizes[name])
        for b in rows:
            own = lr if scale is None else scale(b) * lr
            numbers: tuple = (MOMENTUM if moments else GD, own, config.momentum, 0, 0, 0, 0, 0)
            if squares:
                adam = Adam(squares[name], config.betas, state.steps[l][b], state.tokens[l][b])
                first, root = adam.rates(own)
                numbers = (ADAM, first, *adam.betas, *adam.shares, root, ADAM_EPS)
            plan.steps[name, b] = RowStep(*numbers, g(b) if b in dirty else None, w(b), m(b), v(b))
    for counters in (state.dirty, state.tokens):
        mark(counters[l], rows, 0)
