"""Pairs (key, value) told once, twice or with a correction, and asked for once all of them have been told.

Keys and values are drawn anew for every sequence, from KEYS and VALUES, so nothing about a pair can be stored in
weights: chance is 1 / VALUES. The order of tellings is random. Fillers lead to a multiple of CLOSED tokens, so that
every chunk that divides it has ended when the questions begin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KEYS = VALUES = 32
FILLER = KEYS + VALUES
VOCABULARY = FILLER + 1
CLOSED = 16  # tokens
KINDS = ("once", "repeated", "updated", "updated in a chunk")


class Counts(NamedTuple):
    """Keys of a sequence: told once, twice with one value, twice with two values, of which the newer counts."""

    once: int
    repeated: int = 0
    updated: int = 0


def pairs(rows: int, counts: Counts, chunk: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """ids [rows, T] int64; the places [n] of the keys that ask, one for each of n = sum(counts) keys, the token after
    each is the right answer; the kind [rows, n] of each question, of KINDS, where ``chunk`` tokens are a chunk."""
    if CLOSED % chunk:
        raise ValueError(f"pairs: argument chunk is {chunk}, expected a divisor of {CLOSED}")
    distinct, single = sum(counts), counts.once
    if distinct > KEYS:
        raise ValueError(f"pairs: argument counts asks for {distinct} keys, expected at most {KEYS}")
    keys = torch.rand(rows, KEYS, generator=g).argsort(1)[:, :distinct]
    values = KEYS + torch.randint(0, VALUES, (rows, 2, distinct), generator=g)
    newer = torch.where(torch.arange(distinct) >= single + counts.repeated, values[:, 1], values[:, 0])
    # tellings: the first of every key, then the second of those that have one; ``when`` is the rank of each
    key = torch.cat([torch.arange(distinct), torch.arange(single, distinct)])
    value = torch.cat([values[:, 0], newer[:, single:]], 1)
    draw = torch.rand(rows, len(key), generator=g)
    first, second = draw[:, single:distinct], draw[:, distinct:]
    draw = torch.cat([draw[:, :single], torch.minimum(first, second), torch.maximum(first, second)], 1)
    order = draw.argsort(1)
    when = order.argsort(1)
    told = torch.stack([keys.gather(1, key[order]), value.gather(1, order)], -1).flatten(1)
    start = -(-told.shape[1] // CLOSED) * CLOSED
    filler = torch.full((rows, start - told.shape[1]), FILLER)
    asked = torch.rand(rows, distinct, generator=g).argsort(1)
    questions = torch.stack([keys.gather(1, asked), newer.gather(1, asked)], -1).flatten(1)
    within = 2 * when // chunk
    together = F.pad(within[:, single:distinct] == within[:, distinct:], (single, 0))
    kind = (asked >= single).long() + (asked >= single + counts.repeated).long()
    kind += ((kind == 2) & together.gather(1, asked)).long()
    return torch.cat([told, filler, questions], 1), start + 2 * torch.arange(distinct), kind
