"""What a sleep replays, and in which order: the turns of a row's passes.

A pass takes every kept segment of a row once, cut into parts, or the spans that ``surprise.py`` chose, as many at
once as make up a segment. Orders, cuts and what is joined are drawn by hashes of the seed, the pass and the
segment's number, so that they depend neither on other rows nor on where a sleep was stopped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..kept import KeptSegments, hashed
from .apart import Parts, beside, cut, in_a_row
from .dreams import beside_a_replay
from .protocol import Model
from .surprise import spans

if TYPE_CHECKING:
    from .replay import Replays

PART, PART_OF_BYTES, BYTES = 24, 96, 1024  # tokens of a part; with a vocabulary of up to BYTES


class Turn(NamedTuple):
    """A replay: of which row, in which pass, the how manieth of it."""

    row: int
    number: int
    place: int


class Night:
    """What a row replays in every pass: each kept segment, or as many of its spans as make up one."""

    def __init__(self, model: Model, kept: KeptSegments, row: int, how: Replays):
        self.row, self.how, self.part, self.C = row, how, part_of(model, how), model.segment
        self.numbers: list[int] = kept.numbers[row].tolist()
        self.slots = [s for s, n in enumerate(self.numbers) if n >= 0]
        self.width = min(self.part, self.C)  # of a span
        self.spans = None if how.share == 1 else spans(kept, row, how.share, self.width)
        self._orders: dict[int, list] = {}

    def __len__(self) -> int:
        """Replays of a pass."""
        return len(self.slots) if self.spans is None else math.ceil(len(self.spans) / self._together)

    @property
    def _together(self) -> int:
        return self.C // self.width

    def parts(self, kept: KeptSegments, turn: Turn) -> Parts:
        p = turn.number
        if p not in self._orders:
            self._orders = {p: self._ordered(p)}
        if self.spans is None:
            slot = self._orders[p][turn.place]
            name, text = self.numbers[slot], kept.text(self.row, slot)
            at = self.C if self.how.part == 0 else 1 + self._drawn(p, name, 1) % self.part
            parts = cut(text, at, self.part)
        else:
            name, parts = turn.place, beside(self._moved_spans(kept, turn))
        if self._drawn(p, name, 2) % 1000 >= 1000 * self.how.joined:
            return parts
        return in_a_row(parts, sorted(range(len(parts.lengths)), key=lambda i: self._drawn(p, name, 3, i)))

    def _moved_spans(self, kept: KeptSegments, turn: Turn) -> list[Tensor]:
        p, first, found = turn.number, turn.place * self._together, []
        for slot, segment, start in self._orders[p][first : first + self._together]:
            text = kept.text(self.row, slot)
            n = min(self.width, len(text) - 1)
            moved = start + self._drawn(p, segment, start, 1) % (self.width // 2 + 1) - self.width // 4
            a = min(max(moved, 0), len(text) - 1 - n)
            found.append(text[a : a + n + 1])
        return found

    def dreams(self, turn: Turn) -> tuple[int, list[int]] | None:
        """Which set of ``how.dreams`` a turn's dreams are of, and which of it: every replay has others, until a set
        has been dreamt to its end."""
        each, D = beside_a_replay(self.C)[0], self.how.dreams
        if not D:
            return None
        number, place = divmod(turn.number * len(self) + turn.place, max(1, D // each))
        return number, [i for i in range(place * each, (place + 1) * each) if i < D]

    def _drawn(self, *numbers: int) -> int:
        return hashed(self.how.seed, *numbers)

    def _ordered(self, p: int) -> list:
        if self.spans is None:
            def key(s: int) -> tuple[int, ...]:
                number = self.numbers[s]
                return (self._drawn(p, number), s) if self.how.shuffle else (number, s)

            return sorted(self.slots, key=key)
        if self.how.shuffle:
            return sorted(self.spans, key=lambda s: (self._drawn(p, s.segment, s.start), s))
        return sorted(self.spans, key=lambda s: (s.segment, s.start))


def part_of(model: Model, how: Replays) -> int:
    """Tokens of a part."""
    if how.part is None:
        return PART_OF_BYTES if model.config.vocab_size <= BYTES else PART
    return how.part or model.segment
