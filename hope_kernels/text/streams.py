"""Token ids to text and text to token ids as they come, with the result of doing it in one go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# A character has at most four bytes, and a token may be a single one. What a byte token does to those next to
# it is certain once one more character has begun: four bytes of the last one, three of the next.
UNCERTAIN = 7


class TextStream:
    """``push(id)`` gives the text that has become certain: whole characters, the first bytes of one being
    kept until it is whole; ``end()`` gives the rest. All of it is ``decode`` of all ids.

    context: ids before the first one, whose text is not given: some decoders begin a text otherwise than they
    go on. hidden: ids without a text. ``note()`` is the state as JSON has it, for ``TextStream(..., note=)``.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], context: Sequence[int] = (),
        hidden: frozenset[int] = frozenset(), note: dict | None = None,
    ):
        self._decode, self._hidden = decode, hidden
        self._ids = [i for i in context if i not in hidden]
        self._whole = len(self._ids)  # so many of the ids made whole characters before the last text
        text = decode(self._ids) if self._ids else ""
        self._given = len(text) - _open(text)  # characters of their text
        if note is not None:
            self._ids, self._whole, self._given = list(note["ids"]), note["whole"], note["given"]

    def push(self, token: int) -> str:
        if token in self._hidden:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = len(text) - _open(text)
        new = text[self._given : certain]
        self._given = max(self._given, certain)
        if new and certain == len(text):
            # the ids that gave the text before this one are context enough
            self._ids = self._ids[self._whole :]
            self._whole, self._given = len(self._ids), len(self._decode(self._ids))
        return new

    def end(self) -> str:
        text = self._decode(self._ids) if self._ids else ""
        new, self._given = text[self._given :], len(text)
        return new

    def note(self) -> dict[str, Any]:
        return {"ids": list(self._ids), "whole": self._whole, "given": self._given}


def _open(text: str) -> int:
    """Characters at the end that may be the beginning of another one."""
    return min(len(text) - len(text.rstrip("\ufffd")), UNCERTAIN)


class IdStream:
    """``push(text)`` gives token ids, ``end()`` the last ones: those of the whole text, while no more than a
    window of it is held. How the text is cut into pushes makes no difference.

    encode: text to ids and each id's (first, past the last) character. A window is encoded with characters to
    spare on both sides, and cut where a line begins, or else a token: there the windows agree.
    """

    def __init__(
        self, encode: Callable[[str], tuple[list[int], list[tuple[int, int]]]], window: int = 1 << 16,
        spare: int = 1 << 10,
    ):
        self._encode, self._window, self._spare = encode, window, spare
        self._text, self._known = "", 0  # what is held, and how much of it has been encoded before

    def push(self, text: str) -> list[int]:
        parts = range(0, len(text), self._window)
        return [i for at in parts for i in self._more(text[at : at + self._window])]

    def _more(self, text: str) -> list[int]:
        self._text += text
        ids: list[int] = []
        size = self._window + self._spare
        while len(self._text) - self._known > size:
            part = self._text[: self._known + size]
            found, spans = self._fresh(part)
            n = self._cut(part, spans)
            ids += found[:n]
            at = spans[n][0]
            # as context, at least a spare of characters, from where a line begins if one does
            start = max(part.rfind("\n", max(at - 4 * self._spare, 0), max(at - self._spare, 0)) + 1, 0)
            start = start or max(at - self._spare, 0)
            self._text, self._known = self._text[start:], at - start
        return ids

    def end(self) -> list[int]:
        ids, _ = self._fresh(self._text) if len(self._text) > self._known else ([], [])
        self._text, self._known = "", 0
        return ids

    def _fresh(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids past the context, and their spans."""
        known = self._known
        ids, spans = self._encode(text)
        n = next((i for i, (start, _) in enumerate(spans) if start >= known), len(ids))
        if known and n and spans[n - 1][1] > known:  # a token across the cut: the context is left out
            ids, spans = self._encode(text[known:])
            return ids, [(a + known, b + known) for a, b in spans]
        return ids[n:], spans[n:]

    def _cut(self, text: str, spans: list[tuple[int, int]]) -> int:
        """The index of the token where the next window begins."""
        last, fallback = len(text) - self._spare, 0
        for i in range(len(spans) - 1, 0, -1):
            start = spans[i][0]
            if start > last or spans[i - 1][1] > start:  # within a character
                continue
            fallback = fallback or i
            before, here = text[start - 2 : start], text[start]
            if before.endswith("\n") and not before[:1].isspace() and not here.isspace():
                return i
        return fallback or len(spans) - 1
