"""How a text is read: what ``read`` and ``generate`` are asked for, checked, and handed on as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..check import check_integer
from ..model_state import ModelState
from ..recorder import recorder_for
from .protocol import Model
from .segment_graphs import SegmentGraphs, unserved

PIECE = 4096  # tokens read per forward call: bounds activations and logits, whatever the prompt's length

OnPiece = Callable[[int, float], None]  # (tokens read so far, their summed loss in nats)


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """Arguments of ``read`` and ``generate``, which explains them, in whose names (``op``) errors are raised.

    Raises ValueError for a value out of range.
    """

    op: str
    learn: str
    backend: str | None
    piece: int
    on_piece: OnPiece | None
    check_finite: bool
    should_stop: Callable[[], bool] | None
    unread: str | None
    guard: bool
    graph: bool
    # of ``read`` alone
    last: Tensor | None = None
    wavefront: int | None = None
    replay: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        op = self.op
        if not isinstance(self.learn, str) or self.learn not in ("off", "next_token"):
            raise ValueError(f"{op}: argument learn is {self.learn!r}, expected 'off' or 'next_token'")
        for name, least, expected in (
            ("piece", 1, "a positive integer"), ("replay", 0, "an integer >= 0"), ("seed", None, "an integer")
        ):
            object.__setattr__(self, name, check_integer(op, name, getattr(self, name), least, expected))
        if self.replay and self.learn != "next_token":
            raise ValueError(f"{op}: argument replay is {self.replay}, expected 0 with learn={self.learn!r}: what "
                             "is kept is what has been learned")
        check_flags(op, check_finite=self.check_finite, guard=self.guard, graph=self.graph)
        if self.unread not in (None, "before", "included"):
            raise ValueError(f"{op}: argument unread is {self.unread!r}, expected 'before', 'included' or "
                             "None")
        check_callbacks(op, on_piece=self.on_piece, should_stop=self.should_stop)

    def stopped(self) -> bool:
        return self.should_stop is not None and self.should_stop()

    def graphs(self, model: Model, state: ModelState) -> SegmentGraphs | None:
        """What reads whole segments from graphs; None: nothing does."""
        recorder = recorder_for(state.ids.device) if self.graph and self.learn == "next_token" else None
        if recorder is None or unserved(model, self.backend) is not None:
            return None
        return SegmentGraphs(model, state, self.backend, recorder)

    def call(
        self, model: Model, ids: Tensor, state: ModelState, lengths: list[int], **more: Any
    ) -> tuple[Any, ModelState]:
        """A call of the model with these options, and ``more`` of its own. Where nothing is to be learned, the
        state keeps the guard that it has."""
        return model(
            ids, state, lengths, learn=self.learn, backend=self.backend, check_finite=self.check_finite,
            guard=self.guard if self.learn == "next_token" else None, **more
        )


def check_flags(op: str, **flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{op}: argument {name} is {value!r}, expected True or False")


def check_callbacks(op: str, **callbacks: Any) -> None:
    for name, value in callbacks.items():
        if value is not None and not callable(value):
            raise ValueError(f"{op}: argument {name} is {value!r}, expected a function or None")
