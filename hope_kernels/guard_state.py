"""GuardState: what the guard over learning keeps of each sequence (``engine/guard.py``)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .check import check_counters, check_part
from .config import HopeConfig
from .state import Counters, State

_MOST = 2**62  # of a counter


@dataclass(eq=False)
class GuardState(State):
    """Of B sequences: ``pos`` segments judged, ``looked`` of them at the last look, ``rollbacks`` so often a row
    went back to good weights (its rates are halved each time), ``mean`` [B] fp64, the running mean of the loss
    per token in nats.

    good: for every block and level None, or a tensor [B, r, c] for every matrix, in the dtype of the model.
    kept: 1 in rows that have been found good. held: for every block and level 1 in the rows of which ``good``
    has weights; the others go back to the model's own.
    """

    looked: Counters
    rollbacks: Counters
    kept: Counters
    mean: Tensor
    good: list = field(default_factory=list)
    held: list = field(default_factory=list)

    def __setstate__(self, fields: dict) -> None:
        super().__setstate__(fields)
        self.__dict__.setdefault("held", [])  # of earlier pickles
        self.__post_init__()

    def __post_init__(self) -> None:
        if not self.held:  # new, or from a file written before there were such marks
            none = [0] * self.batch
            self.held = [block and [Counters(none if level is None else self.kept) for level in block]
                         for block in self.good]

    INPUT_DTYPE = frozenset({"good"})

    def input_dtype(self) -> torch.dtype | None:
        return next((t.dtype for level in self._levels() for t in level.values()), None)

    def _levels(self) -> list[dict[str, Tensor]]:
        return [level for block in self.good for level in block or () if level is not None]

    def _levels_by_place(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        """By block and level."""
        return {(i, l): level for i, block in enumerate(self.good) for l, level in enumerate(block or ())
                if level is not None}

    def to(self, device=None, dtype: torch.dtype | None = None):
        new = super().to(device, dtype)
        return replace(new, mean=new.mean.double())

    def _check(self, where: str, dtype: torch.dtype | None, device: torch.device, values: bool) -> None:
        check_part(where, "mean", self.mean, (self.batch,), torch.float64, device)
        for block in self.good:
            if block is not None and not isinstance(block, list):
                raise ValueError(f"{where}: state.guard.good is no list of levels for every block")
        for level in self._levels():
            for name, t in level.items():
                check_part(where, f"good.{name}", t, (self.batch, *t.shape[1:]), dtype, device)
        shape = [None if block is None else len(block) for block in self.good]
        if not isinstance(self.held, list) or [None if of is None else len(of) for of in self.held] != shape:
            raise ValueError(f"{where}: state.guard.held is no list of levels for every block")
        if not torch.compiler.is_compiling():
            for level in (level for block in self.held for level in block or ()):
                check_counters(where, "held", level, self.batch, 0, 1)
            for name, high in (("pos", _MOST), ("looked", _MOST), ("rollbacks", _MOST), ("kept", 1)):
                check_counters(where, name, getattr(self, name), self.batch, 0, high)

    def draft(self) -> GuardState:
        """For a call to change: tensors of a draft are exchanged, never written."""
        names = ("pos", "looked", "rollbacks", "kept")
        counters = {n: Counters(getattr(self, n)) for n in names}
        held = [block and [Counters(rows) for rows in block] for block in self.held]
        return replace(self, good=[None if b is None else list(b) for b in self.good], held=held, **counters)

    @classmethod
    def _alike(cls, states: list[GuardState]) -> list[GuardState]:
        """With tensors of every level of which one of them has any."""
        levels = [s._levels_by_place() for s in states]
        like = {place: level for of in levels for place, level in of.items()}

        def filled(state: GuardState, of: dict[tuple[int, int], dict[str, Tensor]]) -> list:
            rows = {p: {n: t.new_zeros(state.batch, *t.shape[1:]) for n, t in level.items()}
                    for p, level in like.items() if p not in of}
            return [block and [{**rows, **of}.get((i, l)) for l in range(len(block))]
                    for i, block in enumerate(state.good)]

        return [replace(s, good=filled(s, of)) for s, of in zip(states, levels)]

    def _lean(self):
        """Without tensors of levels in which no row has any."""
        good = [block and [level if any(rows) else None for level, rows in zip(block, held)]
                for block, held in zip(self.good, self.held)]
        return replace(self, good=good)

    def rate(self, row: int) -> float:
        """Factor of the learning rates."""
        return 0.5 ** self.rollbacks[row]


def new_guard(config: HopeConfig, batch: int, device: torch.device) -> GuardState:
    """Of sequences that have learned nothing under a guard."""
    zero = [0] * batch
    good = [None if c is None else [None] * c.num_levels for c in config.block_cms]
    return GuardState(
        Counters(zero), config, Counters(zero), Counters(zero), Counters(zero),
        torch.zeros(batch, dtype=torch.float64, device=device), good,
    )
