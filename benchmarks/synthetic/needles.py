"""Needles in noise: pairs (key, value) told once, somewhere among T tokens that mean nothing, and asked at the end.

Keys and values are drawn anew for every sequence, from KEYS and VALUES, so nothing about a pair can be stored in
weights: chance is 1 / VALUES. Between the last token of the hay and the first question stand ``close`` tokens of
noise, so that every chunk with a needle has ended when it is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEYS = VALUES = 32
NOISE = 64
VOCABULARY = KEYS + VALUES + NOISE
NEEDLES = 4


def needles(rows: int, T: int, close: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [rows, T + close + 2 NEEDLES] int64, and the places [NEEDLES] of the keys that ask; the token after each
    is the right answer. Needles stand at even places of the hay, T >= 2 NEEDLES."""
    if T < 2 * NEEDLES:
        raise ValueError(f"needles: argument T is {T}, expected at least {2 * NEEDLES}, room for {NEEDLES} pairs")
    ids = torch.randint(KEYS + VALUES, VOCABULARY, (rows, T + close), generator=g)
    keys = torch.rand(rows, KEYS, generator=g).argsort(1)[:, :NEEDLES]
    values = KEYS + torch.randint(0, VALUES, (rows, NEEDLES), generator=g)
    places = 2 * torch.rand(rows, T // 2, generator=g).argsort(1)[:, :NEEDLES]
    ids.scatter_(1, places, keys).scatter_(1, places + 1, values)
    order = torch.rand(rows, NEEDLES, generator=g).argsort(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    return torch.cat([ids, asked], 1), T + close + 2 * torch.arange(NEEDLES)
