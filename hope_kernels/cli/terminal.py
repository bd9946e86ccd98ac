"""Standard input, output and error as a process may find them: closed, full, a terminal, or a pipe that has
no reader any more."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import sys
from typing import BinaryIO, TextIO


class _Notices:
    """Standard error. Nothing written there is worth an error: what cannot be written is dropped."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # full, closed, None
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(ValueError, AttributeError):
            return sys.stderr.isatty()
        return False

    def fileno(self) -> int:
        if sys.stderr is None:
            raise OSError("standard error is closed")
        return sys.stderr.fileno()


NOTICES = _Notices()


def notice(text: str) -> None:
    """One line on standard error."""
    print(text, file=NOTICES, flush=True)


class Output:
    """Bytes to a text stream's file at once: a write that fails raises OSError there and leaves nothing in a
    buffer.

    A terminal gets text, UTF-8 as far as it is, with line ends and tabs; of everything else (control
    characters, which would move its cursor, set its title or worse; broken UTF-8; bidirectional marks) it
    gets the escape that Python writes. Files and pipes get the bytes. Raises OSError for a stream that is
    closed or None.
    """

    def __init__(self, stream: TextIO | None):
        if stream is None or stream.closed:
            raise OSError("standard output is closed")
        stream.flush()
        self._file, self._encoding = getattr(stream.buffer, "raw", stream.buffer), stream.encoding or "ascii"
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace") if stream.isatty() else None

    def write(self, data: bytes, final: bool = False) -> None:
        """final: nothing follows, so what began a character is no character."""
        if self._decoder is not None:
            text = self._decoder.decode(data, final)
            shown = "".join(
                c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
            )
            data = shown.encode(self._encoding, "backslashreplace")
        while data:
            count = self._file.write(data)
            if count is None:  # a pipe that does not wait
                select.select([], [self._file], [])
            else:
                data = data[count:]


def standard_input() -> BinaryIO:
    """Raises OSError where it is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise OSError("standard input is closed")
    return sys.stdin.buffer


def hold_descriptors() -> None:
    """Opens what is closed of the descriptors 0 to 2, so that no file opened later is taken for one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def drop_unwritten() -> None:
    """What standard output does not take is dropped, so that the interpreter does not try it once more at its
    end."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            if sys.stdout is not None:
                os.dup2(null, sys.stdout.fileno())
            os.close(null)
