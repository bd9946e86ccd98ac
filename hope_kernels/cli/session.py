"""Long runs of the command that can be stopped: signals as a wish, a file that says how far the run has come.

The note in the session file of an unfinished run of ``generate``, for one row:

    phase      "reading" or "writing"
    prompt     what the prompt was called
    bytes      of it, from its start, that the state has read; "tokens" for a model with a tokenizer
    sha256     of these bytes, or of the tokens as little-endian numbers of 32 bits
    written    new tokens written
    unsent     true where one more has been chosen, the state's unread token, which the output did not take
    tail, text what was written last, where a text goes on across the interruption (``writing.py``)

A run that has come to its end leaves no note, so the same command then reads its prompt as a new text. The
notes of ``read`` and ``chat`` are in ``read.py`` and ``chat.py``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from ..state import State
from .prompt import Prompt
from .terminal import notice
from .writing import is_note

BROKEN_PIPE = 13  # SIGPIPE, a number that Windows does not name

def ours(note: Any, unit: str) -> bool:
    """Whether a note is one that ``generate`` wrote for a prompt of this unit."""
    kinds = {"phase": str, "prompt": str, unit: int, "sha256": str, "written": int}
    if not isinstance(note, dict) or not all(isinstance(note.get(k), t) for k, t in kinds.items()):
        return False
    return note["phase"] in ("reading", "writing") and min(note[unit], note["written"]) >= 0 and is_note(note)


def resume(note: dict | None, prompt: Prompt, path: str) -> dict | None:
    """The note, if this run goes on with the one that left it; ``prompt`` is then where that one stopped.
    None for a new run.

    A run that was reading goes on with its own prompt: raises ValueError, naming both, for one that does not
    begin with what was read (it may have grown since). One that was writing goes on if its whole prompt is
    given; any other is a new text, to read after it.
    """
    if note is None or not ours(note, prompt.unit):
        return None  # none, or another program's
    count = note[prompt.unit]
    if note["phase"] == "writing":
        prompt.rewindable()
        if prompt.skip(count, note["sha256"]) and prompt.ended():
            return note
        prompt.rewind()
        return None
    same = prompt.skip(count, note["sha256"])
    if same and not prompt.ended():
        return note
    if same or prompt.count < count:
        what = f"ends after {prompt.count} {prompt.unit}"
    else:
        what = f"begins otherwise (sha256 {prompt.sha256[:16]})"
    raise ValueError(
        f"session {path} stopped after reading {count} {prompt.unit} of {note['prompt']} (sha256 "
        f"{note['sha256'][:16]}), and {prompt.name} {what}; give what it was reading, from its start, to go "
        "on, or --no-resume to read another text after it"
    )


def session_path(name: str) -> str:
    """Where a session is kept: links are followed. Raises OSError or ValueError now rather than after hours
    of reading."""
    path = os.path.realpath(name)
    if not name:
        raise ValueError("argument --session is empty, expected the name of a file")
    if not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(f"session {name}: its folder does not exist")
    if os.path.isdir(path):
        raise ValueError(f"session {name} is a folder, expected a file")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(
            f"session {name} is no regular file (a pipe, a device or a circle of links), expected a file"
        )
    return path


class SessionFile:
    """Where a run keeps its state; ``path`` None: nowhere, and ``save`` is not called. ``every``: seconds
    between periodic saves, 0 for none."""

    def __init__(self, path: str | None, every: float = 0.0):
        self.path, self.every, self._last = path, every, time.monotonic()

    def save(self, state: State, note: dict | None) -> None:
        assert self.path is not None
        state.save(self.path, note)
        self._last = time.monotonic()

    def save_if_due(self, state: State, note: Callable[[], dict | None]) -> None:
        """``save``, if it is time. A failure is only reported: a disk that is full now may not be later."""
        if not (self.path and self.every) or time.monotonic() - self._last < self.every:
            return
        try:
            self.save(state, note())
        except OSError as error:
            self._last = time.monotonic()
            notice(f"\nhope_kernels: session not saved, going on ({error})")


class Interrupt:
    """``with Interrupt() as interrupt:`` the first SIGINT or SIGTERM is only noted, ``interrupt()`` is then
    True and ``signal`` its number; the next one raises KeyboardInterrupt. Outside the main thread, where
    Python allows no handlers, signals do what they always do."""

    def __init__(self):
        self.signal: int | None = None
        self._old = {}

    def __call__(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, _frame) -> None:
        if self():
            raise KeyboardInterrupt
        self.signal = number
        # not through sys.stderr, which the interrupted code may be writing to
        with contextlib.suppress(OSError):
            os.write(2, b"\nhope_kernels: stopping after this piece; once more to abort at once, without saving\n")

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._old = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def stopped_code(failed: OSError | None, interrupt: Interrupt | None) -> int:
    """The exit code of a run that an error or a signal has ended before its time."""
    if failed is not None:
        return 128 + BROKEN_PIPE if isinstance(failed, BrokenPipeError) else 2
    assert interrupt is not None and interrupt.signal is not None  # nothing else stops a run
    return 128 + interrupt.signal
