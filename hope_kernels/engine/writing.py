"""The tokens that ``generate`` draws, and how its state goes on from each of them, whatever is raised in between."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

import torch
from torch import Tensor

from ..in_hand import on_stack
from ..model_state import ModelState
from .sampling import draw


class Writing:
    """The rows of one ``generate``, which calls this; stops: token sequences that end a row.

    From ``listen`` to ``write`` a call that reads the newest tokens into the state says before what it makes of them.
    So where an interrupt takes its answer away, the next ones are drawn all the same: the state has read a token, and
    has its successor unread, or neither.
    """

    def __init__(self, rows: int, stops: list[list[int]], **how: Any):
        """how: ``draw``'s arguments between logits and pos."""
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.ended = [False] * rows
        self.newest: Tensor | None = None  # the tokens drawn last, [B, 1]
        self._stops, self._how = stops, how
        self._at: list[int] | None = None  # where the state stands that has not read these
        self._heard: tuple[list[int], Tensor] | None = None
        self._thread, self._frame = threading.get_ident(), sys._getframe(1)

    def listen(self, state: ModelState) -> None:
        state.tell(self)

    def hear(self, pos: list[int], logits: Tensor) -> None:
        """logits [B, 1, vocab_size] of the newest tokens; pos: where the state stands once it has read them."""
        self._heard = list(pos), logits

    def write(self, state: ModelState, logits: Tensor) -> list[int | None]:
        """The next token of every row from logits [B, vocab_size]; None in rows that have ended."""
        values = self._draw(state, logits)
        fresh = [None if e else v for e, v in zip(self.ended, values)]
        for b, v in enumerate(fresh):
            if v is not None:
                row = self.rows[b]
                row.append(v)
                self.ended[b] = any(row[-len(s) :] == s for s in self._stops)
        state.tell(None)
        return fresh

    def catch_up(self, state: ModelState) -> None:
        """Draws what follows the newest tokens, if ``state`` has read them and nothing is drawn yet."""
        if self._heard is not None and self._heard[0] == state.pos and self._at != state.pos:
            with contextlib.suppress(ValueError):  # of logits that are no distribution
                self._draw(state, self._heard[1][:, -1])
        state.tell(None)

    def left(self, state: ModelState) -> None:
        """Somebody takes ``state`` up: ``catch_up``, unless ``generate`` is at it."""
        if not on_stack(self._thread, self._frame):
            self.catch_up(state)

    def _draw(self, state: ModelState, logits: Tensor) -> list[int]:
        values = draw(logits, pos=state.pos, **self._how)
        tokens = [[row[-1] if e else v] for e, v, row in zip(self.ended, values, self.rows)]
        # before anyone is told: whatever happens from here on, the state knows how it goes on
        state.unread = self.newest = torch.tensor(tokens, dtype=torch.long, device=logits.device)
        self._at = list(state.pos)
        return values
