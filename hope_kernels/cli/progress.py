"""A bar on standard error, and figures for the line at the end of a run."""

from __future__ import annotations

import math

from tqdm import tqdm

from ..model_state import ModelState
from .meter import megabytes, resident_bytes
from .terminal import NOTICES


class Progress:
    """A bar over what is read, with speed and memory. unit: "bytes" or "tokens"."""

    def __init__(self, total: int | None, initial: int, unit: str, quiet: bool, what: str = "reading"):
        self.initial = initial
        short = "B" if unit == "bytes" else f" {unit}"
        self.bar = tqdm(
            total=total, initial=initial, unit=short, unit_scale=True, desc=what, disable=quiet, file=NOTICES
        )

    def read(self, at: int, total: int | None, **figures: str) -> None:
        """at: of what this run reads; total: of everything, as far as known by now."""
        self.bar.n, self.bar.total = self.initial + at, total
        self.bar.set_postfix({"memory": megabytes(resident_bytes()), **figures})

    def close(self) -> None:
        self.bar.close()


def bits(nats: float, predicted: int) -> float:
    """Per predicted token."""
    return nats / math.log(2) / max(predicted, 1)


def guarded(state: ModelState) -> str:
    """What the guard against divergence has done, for the end of a line; "" where it had nothing to do."""
    count = sum(state.rollbacks)
    return f", guard: {count} rollbacks" if count else ""
