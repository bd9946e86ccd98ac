"""Which calls have a state in hand, and what is written into it.

An interrupt (an exception of a signal handler) may come between any two steps of the interpreter, the entrance and
the exit of a context among them. So that a call was cut short is not noted by itself: it is seen from its frame, which
is on no thread's stack any more.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from .identity import checksum


def on_stack(thread: int, frame: FrameType | None) -> bool:
    """Whether the call whose frame that is goes on."""
    found = sys._current_frames().get(thread)
    while found is not None and found is not frame:
        found = found.f_back
    return found is not None


class InHand:
    """The context of a call that reads ``state`` with ``module`` and, if it ``advances``, changes it: see
    ``State.reading``, which lists the errors."""

    def __init__(self, where: str, state: Any, module: Any, advances: bool):
        self.where, self.state, self.module, self.advances = where, state, module, advances
        self.thread = threading.get_ident()
        self.frame: FrameType | None = None
        self.before: tuple | None = None  # fingerprint and changes of the state as the call found it

    def __enter__(self) -> None:
        state, mark = self.state, checksum(self.module)
        self.frame = sys._getframe(1)
        try:
            holders = state.__dict__.setdefault("_holders", [])
            holders.append(self)  # whoever is behind another one gives way to it
            if holders[0] is not self:
                self._give_way(holders)
            self.before = state.fingerprint, state._changes
            state.owned_by(self.module)
            state.fingerprint = mark
        except BaseException:
            self.close(True)
            raise

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(kind is not None)

    def close(self, failed: bool) -> None:
        """The call is over: a state that it has not changed belongs to the weights it belonged to before."""
        state = self.state
        if self.before is not None and (not self.advances or failed and state._changes == self.before[1]):
            state.fingerprint = self.before[0]
        if self in state._holders:
            state._holders.remove(self)
        self.frame = None

    def _give_way(self, holders: list[InHand]) -> None:
        close_dead(holders)
        for other in list(holders):
            if other is self:
                return
            if self.advances or other.advances:
                self.before = None
                raise ValueError(f"{self.where}: argument state is in use by another call; one call at a time may "
                                 "advance a state, state.clone() makes one for each thread")


def close_dead(holders: list[InHand]) -> None:
    """Does what calls that were cut short at their exit, or at their entrance, would have done there."""
    for holder in list(holders):
        if not on_stack(holder.thread, holder.frame):
            holder.close(True)


class WrittenWhole:
    """A base of states: what is written into one is prepared before, and written by a function that leads to the same
    from wherever an interrupt has left it."""

    # the calls that have it in hand, the oldest first; how often it has been written; and what is being written
    _holders = ()
    _changes = 0
    _unwritten = None

    def written(self, write: Callable[[], Any]) -> None:
        """Calls ``write``, which changes this state and returns False where it has changed nothing; and where that
        raises, once more before raising."""
        try:
            self._unwritten = write
            self._end()
        except BaseException:
            self._end()
            raise

    def settle(self) -> None:
        """Ends what a call has left that an interrupt has cut short, and another one while it ended that. Whoever takes
        the state up asks for it; nothing happens while a call has it in hand."""
        if not (self._owes() or self._holders) or torch.compiler.is_compiling():
            return
        close_dead(list(self._holders))
        if not self._holders:
            self._end()
            self._left()

    def _owes(self) -> bool:
        return self._unwritten is not None

    def _left(self) -> None:
        """For what a state owes beside that."""

    def _end(self) -> None:
        write = self._unwritten
        if write is not None:
            self._changes += write() is not False
            self._unwritten = None
