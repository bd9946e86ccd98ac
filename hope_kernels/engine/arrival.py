"""A token of every row on its way from a decoder into a state: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..model_state import TAINTED, MixerState, ModelState
from ..ops.titans.state import TitansState
from . import segments


class Arrival:
    """What ``state`` is once it has read ``tokens`` [B, 1], as a function that writes it (``State.written``).

    learned: the state with what is due before the token; None: nothing is. opened: its snapshot, where segments begin.
    C: of the model, where it learns; else 0. logits: what is made of the tokens. mixers: as they are after them; None:
    ``advance`` moves them where they lie, which cannot be done twice; it says whether it has. Where an interrupt takes
    the answer away, ``count`` has it; and attention, which has none, has no token that nobody has counted. ended: is
    told whether the token is read.
    """

    def __init__(
        self, state: ModelState, tokens: Tensor, learned: ModelState | None, opened: list[Any] | None, C: int,
        logits: Tensor, mixers: list[MixerState] | None, advance: Callable[[], bool] = bool,
        ended: Callable[[bool], Any] = bool,
    ):
        self.state, self.tokens, self.learned, self.opened, self.logits = state, tokens, learned, opened, logits
        self.mixers, self.advance, self.ended = mixers, advance, ended
        self.begun = self.read = mixers is not None
        self.pos = after = [p + 1 for p in state.pos]
        self.place: int | None = None  # of the token in the open segment, where it is one for all rows
        self.ids: Tensor | None = None
        if C:
            of = state if learned is None else learned
            first = of.seen[0] if of.seen else 0
            if first != TAINTED and of.seen.count(first) == len(of.seen):
                self.place, self.seen = first, [first + 1] * len(after)
            else:
                count = len(after)
                self.ids, self.seen = segments.recorded(of, tokens, [1] * count, [False] * count, C)
        else:
            width = state.ids.shape[1]
            self.seen = [TAINTED if p % width else 0 for p in after] if width else list(state.seen)

    def __call__(self) -> bool:
        if not self.begun:
            self.begun = True
            self.read = self.advance()
        elif not self.read:
            self.read = self._counted()
        self.ended(self.read)
        if self.read:
            self._write()
        return self.read

    def _counted(self) -> bool:
        counts = [m.count for m in self.state.mixers if isinstance(m, TitansState)]
        return bool(counts) and all(c.tolist() == self.pos for c in counts)

    def _write(self) -> None:
        state, after = self.state, self.pos
        for old, new in zip(state.mixers, self.mixers or ()):
            old._take(new)
        if self.learned is not None:
            state._take(self.learned)
        if self.opened is not None:
            state.snapshot[:] = self.opened
        if self.place is not None:
            state.ids[:, self.place].copy_(self.tokens[:, 0])
        elif self.ids is not None:
            state.ids.copy_(self.ids)
        state.seen[:] = self.seen
        for part in (*state.mixers, *state.cms, state):
            if part is not None:
                part.pos[:] = after
        state.unread = None
        if state._told is not None:
            state._told.hear(after, self.logits)
