"""Answer: the text of new tokens, in whole characters, up to a stop."""

from __future__ import annotations

from collections.abc import Sequence

from ..text import Tokenizer


class Answer:
    """``push(token)`` gives the text that has become certain, ``close()`` the rest. ended: None, or "stop"
    once a stop or one of the tokens ``ends`` has come; neither is part of the text. What may be the beginning
    of a stop is kept back until it is certain. context: ids before the first one."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], ends: Sequence[int], context: Sequence[int]
    ):
        known = list(context)
        while known and tokenizer.decode(known).endswith("\ufffd"):  # of a character that was never whole
            known.pop()
        self._stream, self._stops, self._ends = tokenizer.stream(known), list(stops), set(ends)
        self._kept = self.text = ""
        self.ended: str | None = None

    def push(self, token: int) -> str:
        if token in self._ends:
            self.ended = "stop"
            return ""
        return self._given(self._kept + self._stream.push(token))

    def close(self) -> str:
        if self.ended and not self._kept:
            return ""
        new = self._kept + self._stream.end()
        self._kept, found = "", self._first(new)
        new = new if found is None else new[:found]
        self.text += new
        return new

    def _first(self, text: str) -> int | None:
        """Where the first stop begins."""
        return min([i for s in self._stops if (i := text.find(s)) >= 0], default=None)

    def _given(self, text: str) -> str:
        found = self._first(text)
        if found is None:
            begun = max([n for s in self._stops for n in range(1, len(s)) if text.endswith(s[:n])], default=0)
            new, self._kept = text[: len(text) - begun], text[len(text) - begun :]
        else:
            new, self._kept, self.ended = text[:found], "", "stop"
        self.text += new
        return new
