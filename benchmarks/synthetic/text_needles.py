"""Needles in text: strings of four bytes, a mark, a key of two letters and a value of one, told once in the place of as
many bytes somewhere in a text, and asked at its end.

The mark stands nowhere else. Keys and values are drawn anew for every sequence, so nothing about a pair can be stored
in weights: chance is 1 / 26, of what a model says that has learned no more than that a letter follows a key. ``close``
bytes of text stand between the last that may be a needle and the first question.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.synthetic.needles import NEEDLES

MARK = b"@"
LETTERS = 26
WIDTH = 4  # bytes of a needle
FIRST = ord("a")


def hay(text: bytes) -> Tensor:
    """Bytes of a text without the mark, [n] uint8."""
    return torch.frombuffer(bytearray(text.replace(MARK, b"")), dtype=torch.uint8)


def spelled(keys: Tensor) -> Tensor:
    """[..., 3]: the mark and the two letters of keys, numbers below LETTERS^2."""
    return torch.stack([torch.full_like(keys, MARK[0]), FIRST + keys // LETTERS, FIRST + keys % LETTERS], -1)


def text_needles(text: Tensor, rows: int, T: int, close: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [rows, T + close + WIDTH NEEDLES] int64, and the places [NEEDLES] of the bytes that ask, the last ones of the
    keys; the byte after each is the right answer. Needles stand at multiples of WIDTH of the hay, which is of ``text``
    (``hay``). Raises ValueError for a T without room, and for a text that is too short."""
    if T < WIDTH * NEEDLES:
        raise ValueError(f"text_needles: argument T is {T}, expected at least {WIDTH * NEEDLES}, room for {NEEDLES} "
                         "needles")
    if len(text) < T + close:
        raise ValueError(f"text_needles: argument text has {len(text)} bytes, expected at least T + close, {T + close}")
    starts = torch.randint(0, len(text) - T - close + 1, (rows,), generator=g).tolist()
    ids = torch.stack([text[i : i + T + close] for i in starts]).long()
    keys = torch.rand(rows, LETTERS**2, generator=g).argsort(1)[:, :NEEDLES]
    values = torch.randint(0, LETTERS, (rows, NEEDLES), generator=g)
    told = torch.cat([spelled(keys), FIRST + values[..., None]], -1)
    places = WIDTH * torch.rand(rows, T // WIDTH, generator=g).argsort(1)[:, :NEEDLES]
    for i in range(WIDTH):
        ids.scatter_(1, places + i, told[..., i])
    order = torch.rand(rows, NEEDLES, generator=g).argsort(1)
    asked = told.gather(1, order[..., None].expand_as(told)).flatten(1)
    return torch.cat([ids, asked], 1), T + close + WIDTH - 2 + WIDTH * torch.arange(NEEDLES)


# keys, those of few different letters first, and values, for lessons
TOLD = (spelled(torch.tensor(sorted(range(LETTERS**2), key=lambda k: max(k // LETTERS, k % LETTERS)))),
        FIRST + torch.arange(LETTERS))
