"""Adam's steps in work that is recorded to be done again: what changes from step to step is read from the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model_state import ModelState
from ..ops.cms.level import Adam
from ..ops.cms.schedule import due, learning_levels


class RecordedSteps:
    """The numbers of Adam's steps in a segment that ends at ``counts``. state: whose levels step, all rows at the
    same ones. at_once: they are written as they are asked for: the same work, not recorded."""

    def __init__(self, state: ModelState, counts: list[int], dtype: torch.dtype, at_once: bool = False):
        of = [(i, c.config) for i, c in enumerate(state.cms) if c is not None]
        places, rows = sum(3 * c.num_levels for _, c in of), list(range(state.batch))
        self.state, self.at_once = state, at_once
        self._asked: list[tuple[int, int, Adam, float]] = []
        self._back = [(i, l) for i, c in of for l in learning_levels(c) if due(c, l, rows, counts).reset]
        self._on_device = torch.zeros(places, 4, dtype=dtype, device=state.ids.device)

    def used_by(self, draft: ModelState) -> ModelState:
        """``draft``, whose levels step with them."""
        for block, cms in enumerate(draft.cms):
            if cms is not None and cms.private is not None:
                cms.private.late = self._places(block)
        return draft

    def _places(self, block: int) -> Callable[[int, Adam, float], Tensor]:
        def place(l: int, step: Adam, lr: float) -> Tensor:
            # the averages themselves are the state's
            self._asked.append((block, l, step._replace(square=self._on_device), lr))
            if self.at_once:
                self._write([step.numbers(lr)], len(self._asked) - 1)
            return self._on_device[len(self._asked) - 1]

        return place

    def take(self) -> None:
        """The next ones; the host counts the steps."""
        for block, l in self._back:
            self._count(block, l)[:] = [0] * self.state.batch
        for block, l in {(block, l) for block, l, *_ in self._asked}:
            steps = self._count(block, l)
            steps[:] = [n + 1 for n in steps]
        self._write([
            step._replace(step=self._count(block, l)[0]).numbers(lr) for block, l, step, lr in self._asked
        ], 0)

    def _write(self, numbers: list[tuple[float, ...]], at: int) -> None:
        if numbers:
            to, pinned = self._on_device[at : at + len(numbers)], self._on_device.is_cuda
            of = torch.tensor(numbers, dtype=to.dtype, device="cpu", pin_memory=pinned)
            to.copy_(of, non_blocking=True)

    def _count(self, block: int, l: int) -> list[int]:
        cms = self.state.cms[block]
        assert cms is not None
        return cms.steps[l]
