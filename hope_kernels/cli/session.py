"""Long runs of the command that can be stopped: a prompt read as a stream, signals as a wish, a file that
says how far the run has come.

The note in the session file of an unfinished run, for one row:

    phase      "reading" or "writing"
    prompt     what the prompt was called
    bytes      of it, from its start, that the state has read
    sha256     of these bytes
    written    new tokens written
    unsent     true where one more has been chosen, the state's unread token, which the output did not take
    tail       hex of the last bytes written, where --stop may have to be found across the interruption

A run that has come to its end leaves no note, so the same command then reads its prompt as a new text.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import signal
import tempfile
import threading
import time
from typing import IO, Any, BinaryIO, TypeGuard

import torch
from torch import Tensor

from ..state import State
from .terminal import notice

BLOCK = 1 << 20


class Prompt:
    """The bytes of a file and of a text that follows it, handed out in order and never all in memory: a
    ``generation.Source`` of one row.

    lead: bytes handed out before the prompt and no part of it (the token a session has not read). ``bytes``
    and ``sha256`` tell what a reader has read of the prompt, as far as it ``confirm``ed.
    """

    def __init__(
        self, name: str, file: BinaryIO | None = None, text: bytes = b"", lead: bytes = b"",
        device: torch.device | str = "cpu",
    ):
        self.name, self.device = name, device
        self._file: IO[bytes] = file or io.BytesIO()
        self._text, self._lead, self._lead_size = io.BytesIO(text), lead, len(lead)
        self._begin()

    def _begin(self) -> None:
        self.bytes, self._hash, self._confirmed, self._handed, self._back = 0, hashlib.sha256(), 0, bytearray(), b""

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def more(self) -> bool:
        """Whether bytes have been handed out and not been read yet: as ``read`` asks for one piece ahead,
        whether there are any left."""
        return bool(self._handed)

    def _next(self, n: int) -> bytes:
        data, self._back = self._back[:n], self._back[n:]
        for part in (self._file, self._text):
            data += part.read(n - len(data))
        return data

    def __call__(self, n: int) -> Tensor:
        """The next n bytes as token ids [1, n] int64, fewer where the prompt ends."""
        lead, self._lead = self._lead[:n], self._lead[n:]
        data = self._next(n - len(lead))
        self._handed += data
        values = bytearray(lead + data)
        if values:
            ids = torch.frombuffer(values, dtype=torch.uint8)
        else:
            ids = torch.empty(0, dtype=torch.uint8, device="cpu")
        return ids.to(self.device, torch.long).unsqueeze(0)

    def confirm(self, tokens: int) -> None:
        """Of everything handed out, lead included, the first ``tokens`` have been read."""
        count = max(tokens - self._lead_size, 0) - self._confirmed
        self._hash.update(self._handed[:count])
        del self._handed[:count]
        self.bytes, self._confirmed = self.bytes + count, self._confirmed + count

    def skip(self, count: int, sha256: str) -> bool:
        """Passes over the first ``count`` bytes; whether they were there and have this hash."""
        while self.bytes < count and (data := self._next(min(BLOCK, count - self.bytes))):
            self._hash.update(data)
            self.bytes += len(data)
        return self.bytes == count and self.sha256 == sha256

    def ended(self) -> bool:
        """Whether nothing is left to hand out."""
        self._back = self._next(1)
        return not self._back

    def rewindable(self) -> None:
        """Makes ``rewind`` possible: a pipe is copied to a temporary file, which is removed with this process."""
        if not self._file.seekable():
            copy = tempfile.TemporaryFile()  # noqa: SIM115
            shutil.copyfileobj(self._file, copy)
            copy.seek(0)
            self._file = copy
        self._start = self._file.tell()

    def rewind(self) -> None:
        self._file.seek(self._start)
        self._text.seek(0)
        self._begin()


def ours(note: Any) -> TypeGuard[dict]:
    """Whether a note is one that ``SessionFile`` wrote."""
    kinds = {"phase": str, "prompt": str, "bytes": int, "sha256": str, "written": int}
    if not isinstance(note, dict) or not all(isinstance(note.get(k), t) for k, t in kinds.items()):
        return False
    return (
        note["phase"] in ("reading", "writing") and min(note["bytes"], note["written"]) >= 0
        and is_hex(note.get("tail", ""))
    )


def is_hex(text: Any) -> bool:
    try:
        return bytes.fromhex(text) is not None
    except (TypeError, ValueError):
        return False


def resume(note: dict | None, prompt: Prompt, path: str) -> dict | None:
    """The note, if this run goes on with the one that left it; ``prompt`` is then where that one stopped.
    None for a new run.

    A run that was reading goes on with its own prompt: raises ValueError, naming both, for one that does not
    begin with what was read (it may have grown since). One that was writing goes on if its whole prompt is
    given; any other is a new text, to read after it.
    """
    if not ours(note):
        return None  # none, or another program's
    if note["phase"] == "writing":
        prompt.rewindable()
        if prompt.skip(note["bytes"], note["sha256"]) and prompt.ended():
            return note
        prompt.rewind()
        return None
    same = prompt.skip(note["bytes"], note["sha256"])
    if same and not prompt.ended():
        return note
    if same or prompt.bytes < note["bytes"]:
        what = f"ends after {prompt.bytes} bytes"
    else:
        what = f"begins otherwise (sha256 {prompt.sha256[:16]})"
    raise ValueError(
        f"session {path} stopped after reading {note['bytes']} bytes of {note['prompt']} (sha256 "
        f"{note['sha256'][:16]}), and {prompt.name} {what}; give what it was reading, from its start, to go on, or "
        "--no-resume to read another text after it"
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

    def __init__(self, path: str | None, prompt: Prompt, every: float = 0.0):
        self.path, self.prompt, self.every, self._last = path, prompt, every, time.monotonic()

    def save(self, state: State, phase: str | None, written: int = 0, **more) -> None:
        """phase: "reading", "writing", or None at the end of the run. more: further entries of the note,
        where they are true."""
        assert self.path is not None
        note = {
            "phase": phase, "prompt": self.prompt.name, "bytes": self.prompt.bytes,
            "sha256": self.prompt.sha256, "written": written
        }
        state.save(self.path, note | {k: v for k, v in more.items() if v} if phase else None)
        self._last = time.monotonic()

    def save_if_due(self, state: State, phase: str, written: int = 0, **more) -> None:
        """``save``, if it is time. A failure is only reported: a disk that is full now may not be later."""
        if not (self.path and self.every) or time.monotonic() - self._last < self.every:
            return
        try:
            self.save(state, phase, written, **more)
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
