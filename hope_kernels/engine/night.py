"""What a sleep replays, and in which order: the turns of a row's passes.

A pass takes every kept segment of a row once, cut into parts, or the spans that ``surprise.py`` chose, as many at
once as make up a segment. Orders, cuts and dreams are drawn by hashes of the seed, the pass and the segment's
number, so that they depend neither on other rows nor on where a sleep was stopped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from ..kept import KeptSegments, hashed
from .apart import Parts, beside, cut
from .dreams import SHARE, Dreams
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
        self.width = min(self.part, self.C)  # of a span, and of a dream
        self.spans = None if how.share == 1 else spans(kept, row, how.share, self.width)
        self._beside = max(1, round(SHARE * self.C / self.width))  # dreams in a replay
        self.dreamt = min(how.dreams, len(self) * self._beside)  # of a pass
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
            at = self.C if self.how.part == 0 else 1 + self._drawn(p, self.numbers[slot], 1) % self.part
            return cut(kept.text(self.row, slot), at, self.part)
        first, found = turn.place * self._together, []
        for slot, segment, start in self._orders[p][first : first + self._together]:
            text = kept.text(self.row, slot)
            n = min(self.width, len(text) - 1)
            moved = start + self._drawn(p, segment, start, 1) % (self.width // 2 + 1) - self.width // 4
            a = min(max(moved, 0), len(text) - 1 - n)
            found.append(text[a : a + n + 1])
        return beside(found)

    def dreams(self, turn: Turn, night: Dreams) -> Dreams:
        """The dreams beside a turn: the ones after that which its numbers draw."""
        D = self.dreamt
        place = turn.place if self.spans is not None else self.numbers[self._orders[turn.number][turn.place]]
        first = self._drawn(turn.number, place, 2) % D
        return night.some([(first + i) % D for i in range(min(self._beside, D))])

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
