"""Where a reading was surprised: the spans of kept text that a sleep replays if it is not to replay all of it.

A span is ``part`` tokens of a segment, and its surprise the mean loss that its tokens had when they were learned
first. The most surprising spans are taken, one after the other and none over another, until they make up the
share that was asked for. Made-up facts in text from an encyclopedia are among its most surprising twentieth.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..kept import KeptSegments


class Span(NamedTuple):
    """Tokens of a slot from ``start`` on. segment: its number among those of its row."""

    slot: int
    segment: int
    start: int


def spans(kept: KeptSegments, row: int, share: float, part: int) -> list[Span]:
    """Of ``row``, the most surprising first."""
    tokens = ((kept.ids[row] >= 0).sum(-1) - 1).clamp(min=0).tolist()
    numbers = kept.numbers[row].tolist()
    wanted = math.ceil(share * sum(tokens) / part)
    means, places = [], []
    for slot in sorted((s for s, n in enumerate(tokens) if n), key=lambda s: numbers[s]):
        n = tokens[slot]
        nats = kept.nats[row, slot, :n].double().nan_to_num(0.0, 0.0, 0.0)
        means.append(nats.unfold(0, min(part, n), 1).mean(-1))
        places += [Span(slot, numbers[slot], start) for start in range(len(means[-1]))]
    found: list[Span] = []
    taken: dict[int, list[int]] = {}
    order = torch.cat(means).argsort(descending=True, stable=True).tolist() if means else []
    for i in order:
        if len(found) >= wanted:
            break
        span = places[i]
        if all(abs(span.start - other) >= part for other in taken.get(span.slot, ())):
            found.append(span)
            taken.setdefault(span.slot, []).append(span.start)
    return found
