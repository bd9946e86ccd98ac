"""What a command reads: the bytes of a file and of a text after it, as the ids of a model, in order and never
all in memory."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from typing import IO, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..text import Tokenizer
from .terminal import standard_input

BLOCK, RECENT = 1 << 20, 8


class Prompt:
    """A ``generation.Source`` of one row: the bytes of a file, then of a text, as ids.

    lead: ids handed out before the prompt and no part of it (the token a session has not read, what begins
    every text). ``count`` and ``sha256`` tell what a reader has read of the prompt, as far as it
    ``confirm``ed: so many ids, and the hash of them as little-endian numbers of ``width`` bytes.
    """

    unit, width = "bytes", 1

    def __init__(
        self, name: str, file: BinaryIO | None = None, text: bytes = b"", lead: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ):
        self.name, self.device = name, device
        self._file: IO[bytes] = file or io.BytesIO()
        self._text, self._lead, self._lead_size = io.BytesIO(text), self._packed(lead), len(lead)
        self.size = _size(file, text)
        self._begin()

    def _begin(self) -> None:
        self.count, self._hash, self._confirmed = 0, hashlib.sha256(), 0
        self._handed, self._back = bytearray(), b""
        self.consumed = 0  # bytes taken from file and text
        self.recent: list[int] = []  # the ids handed out last

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def more(self) -> bool:
        """Whether ids have been handed out and not been read yet: as ``read`` asks for one piece ahead,
        whether there are any left."""
        return bool(self._handed)

    @property
    def expected(self) -> int | None:
        """How many ids there are in all, by what has been seen; None where that cannot be told."""
        return self.size

    def _packed(self, ids: Sequence[int]) -> bytes:
        return np.array(list(ids), dtype=f"<u{self.width}").tobytes()

    def _raw(self, n: int) -> bytes:
        """The next n bytes, fewer where the prompt ends."""
        data = b""
        for part in (self._file, self._text):
            data += part.read(n - len(data))
        self.consumed += len(data)
        return data

    def _fresh(self, n: int) -> bytes:
        """The next n ids, packed, fewer where the prompt ends."""
        return self._raw(n)

    def _next(self, n: int) -> bytes:
        size = n * self.width
        data, self._back = self._back[:size], self._back[size:]
        return data + self._fresh(n - len(data) // self.width)

    def __call__(self, n: int) -> Tensor:
        """The next n ids [1, n] int64, fewer where the prompt ends."""
        lead, self._lead = self._lead[: n * self.width], self._lead[n * self.width :]
        data = self._next(n - len(lead) // self.width)
        self._handed += data
        values = np.frombuffer(lead + data, dtype=f"<u{self.width}").astype(np.int64)
        self.recent = [*self.recent, *values[-RECENT:].tolist()][-RECENT:]
        return torch.from_numpy(values).to(self.device).unsqueeze(0)

    def confirm(self, tokens: int) -> None:
        """Of everything handed out, lead included, the first ``tokens`` have been read."""
        count = max(tokens - self._lead_size, 0) - self._confirmed
        self._hash.update(self._handed[: count * self.width])
        del self._handed[: count * self.width]
        self.count, self._confirmed = self.count + count, self._confirmed + count

    def skip(self, count: int, sha256: str | None = None) -> bool:
        """Passes over the first ``count`` ids; whether they were there and have this hash."""
        while self.count < count and (data := self._next(min(BLOCK, count - self.count))):
            self._hash.update(data)
            self.count += len(data) // self.width
        return self.count == count and sha256 in (None, self.sha256)

    def ended(self) -> bool:
        """Whether nothing is left to hand out."""
        self._back = self._next(1)
        return not self._back

    def rewindable(self) -> None:
        """Makes ``rewind`` possible: a pipe is copied to a temporary file, which goes with this process."""
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


class TokenPrompt(Prompt):
    """The same through a tokenizer: the bytes are UTF-8 (what is not becomes U+FFFD), the ids its tokens."""

    unit, width = "tokens", 4

    def __init__(self, tokenizer: Tokenizer, *args, **options):
        self._tokenizer = tokenizer
        super().__init__(*args, **options)

    def _begin(self) -> None:
        super()._begin()
        self._ready, self._ids, self._whole = bytearray(), self._tokenizer.id_stream(), False
        self._decoder, self._made = codecs.getincrementaldecoder("utf-8")("replace"), 0

    @property
    def expected(self) -> int | None:
        if self.size is None or not self.consumed:
            return None
        return round(self._made * self.size / self.consumed)

    def _fresh(self, n: int) -> bytes:
        size = n * self.width
        while len(self._ready) < size and not self._whole:
            data = self._raw(BLOCK // 16)
            ids = self._ids.push(self._decoder.decode(data, final=not data))
            if not data:
                ids, self._whole = [*ids, *self._ids.end()], True
            self._made += len(ids)
            self._ready += self._packed(ids)
        data = bytes(self._ready[:size])
        del self._ready[:size]
        return data


def prompt_for(tokenizer: Tokenizer, *args, **options) -> Prompt:
    return Prompt(*args, **options) if tokenizer.reads_bytes else TokenPrompt(tokenizer, *args, **options)


def _size(file: BinaryIO | None, text: bytes) -> int | None:
    """Bytes there are to read, None where that is not known beforehand."""
    if file is None:
        return len(text)
    try:
        status = os.fstat(file.fileno())
    except OSError:  # no file of the system's
        return None
    return status.st_size + len(text) if stat.S_ISREG(status.st_mode) else None


def opened(name: str | None):
    """The file of that name, standard input for "-", or nothing, as a context."""
    if name == "-":
        return contextlib.nullcontext(standard_input())
    return contextlib.nullcontext() if name is None else open(name, "rb")


def encoded(text: str | None) -> bytes:
    """The bytes of an argument, also where they are no text."""
    return (text or "").encode("utf-8", "surrogateescape")


def prompt_name(file: str | None, text: str | None) -> str:
    names = {None: [], "-": ["standard input"]}.get(file, [file])
    return " and ".join([*names, *(["--prompt"] if text else [])]) or "no prompt"
