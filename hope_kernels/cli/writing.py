"""What a command writes: new tokens as they come, until a stop, so that another run can go on with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..text import Tokenizer
from .terminal import Output


class Writer(Protocol):
    """Puts tokens on an output. ``ended``: whether one of the stops has come. ``write`` raises OSError where
    the output takes no more, and the token then counts as not written. ``note``: what the next run needs."""

    ended: bool

    def write(self, token: int) -> None: ...

    def close(self, last: str = "") -> None: ...

    def note(self) -> dict[str, Any]: ...


class ByteWriter:
    """Of a byte model: a token is a byte, on the output as it is. stops are found across runs: ``tail`` is
    the hex of the last bytes written."""

    def __init__(self, output: Output, stops: Sequence[str], note: dict):
        self._output, self._stops = output, [s.encode("utf-8", "surrogateescape") for s in stops]
        self._longest = max(map(len, self._stops), default=0)
        self._tail = bytes.fromhex(note.get("tail", ""))
        self.ended = False  # a stop may have begun before this run

    def write(self, token: int) -> None:
        self._output.write(bytes([token]))
        if self._stops:
            self._tail = (self._tail + bytes([token]))[-self._longest :]
            self.ended = any(self._tail.endswith(s) for s in self._stops)

    def close(self, last: str = "") -> None:
        self._output.write(last.encode(), final=True)

    def note(self) -> dict[str, Any]:
        return {"tail": self._tail.hex()} if self._tail else {}


class TextWriter:
    """Of a model with a tokenizer: whole characters, up to the end of a stop (which may lie inside a token;
    the state has the token as it is) or to one of the tokens ``ends``. The note: {"text": {"tail": the last
    characters written, ...}}, the rest as ``TextStream.note`` has it. context: gives the ids before the first
    one."""

    def __init__(
        self, output: Output, tokenizer: Tokenizer, stops: Sequence[str], ends: Sequence[int], note: dict,
        context: Callable[[], Sequence[int]] = tuple,
    ):
        self._output, self._tokenizer, self._stops, self._ends = output, tokenizer, list(stops), set(ends)
        self._longest = max(map(len, stops), default=0)
        if "" in stops:
            raise ValueError("argument --stop is empty, expected text")
        kept = note.get("text")
        self._context, self._stream = context, None if kept is None else tokenizer.stream(note=kept)
        self._tail = kept["tail"] if kept else ""
        self.ended = self._cut_short = False

    def write(self, token: int) -> None:
        if self._stream is None:
            self._stream = self._tokenizer.stream(self._context())
        before = self._stream.note()
        text, found = self._cut(self._stream.push(token))
        try:
            self._output.write(text.encode("utf-8", "replace"))
        except OSError:
            self._stream = self._tokenizer.stream(note=before)
            raise
        self._tail = (self._tail + text)[-self._longest :] if self._longest else ""
        self._cut_short = found
        self.ended = found or token in self._ends

    def _cut(self, new: str) -> tuple[str, bool]:
        """The text up to the end of the first stop in it, which may have begun before."""
        text = self._tail + new
        ends = [i + len(s) for s in self._stops if (i := text.find(s)) >= 0 and i + len(s) > len(self._tail)]
        return (text[len(self._tail) : min(ends)], True) if ends else (new, False)

    def close(self, last: str = "") -> None:
        """last: what follows where a text has come to its end; else what began a character waits."""
        rest = self._stream.end() if last and self._stream is not None and not self._cut_short else ""
        self._output.write((rest + last).encode("utf-8", "replace"), final=True)

    def note(self) -> dict[str, Any]:
        return {} if self._stream is None else {"text": {**self._stream.note(), "tail": self._tail}}


def is_note(note: dict) -> bool:
    """Whether what a writer takes from a note is what one has left there."""
    text = note.get("text")
    try:
        bytes.fromhex(note.get("tail", ""))
    except (TypeError, ValueError):
        return False
    if text is None:
        return True
    return (
        isinstance(text, dict) and isinstance(text.get("tail"), str) and isinstance(text.get("ids"), list)
        and all(type(i) is int and 0 <= i < 2**31 for i in text["ids"])
        and all(type(text.get(k)) is int and text[k] >= 0 for k in ("whole", "given"))
    )


def writer_for(
    output: Output, tokenizer: Tokenizer, stops: Sequence[str], ends: Sequence[int], note: dict,
    context: Callable[[], Sequence[int]] = tuple,
) -> Writer:
    if tokenizer.reads_bytes:
        return ByteWriter(output, stops, note)
    return TextWriter(output, tokenizer, stops, ends, note, context)
