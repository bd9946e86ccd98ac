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

    good: for every block and level None, or a tensor [B, r, c] for every matrix, in the dtype of the model: what
    counts in the rows marked in ``kept``; the others go back to the model's own weights.
    """

    looked: Counters
    rollbacks: Counters
    kept: Counters
    mean: Tensor
    good: list = field(default_factory=list)

    INPUT_DTYPE = frozenset({"good"})

    def input_dtype(self) -> torch.dtype | None:
        return next((t.dtype for level in self._levels() for t in level.values()), None)

    def _levels(self) -> list[dict[str, Tensor]]:
        return [level for block in self.good for level in block or () if level is not None]

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
        if not torch.compiler.is_compiling():
            for name, high in (("pos", _MOST), ("looked", _MOST), ("rollbacks", _MOST), ("kept", 1)):
                check_counters(where, name, getattr(self, name), self.batch, 0, high)

    def draft(self) -> GuardState:
        """For a call to change: tensors of a draft are exchanged, never written."""
        names = ("pos", "looked", "rollbacks", "kept")
        counters = {n: Counters(getattr(self, n)) for n in names}
        return replace(self, good=[None if b is None else list(b) for b in self.good], **counters)

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
