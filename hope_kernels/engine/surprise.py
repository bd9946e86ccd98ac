"""What surprises a model in the text that is kept: the spans that a sleep replays if it is not to replay all of it.

A span is ``part`` tokens of a segment, and its surprise the mean loss of its tokens under the model's own weights,
which have learned nothing. (What a reading loses that learns falls with every fact of one form, and the later
ones would go unnoticed.) The most surprising spans are taken, one after the other and none over another, until
they make up the share that was asked for. Of made-up facts in text from an encyclopedia nearly all are then
among an eighth of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kept import KeptSegments
from .protocol import Model

PIECE = 1024  # tokens of a call


@torch.no_grad()
def measured(model: Model, kept: KeptSegments, backend: str | None) -> KeptSegments:
    """``kept`` with the losses of all its segments: itself where they are known. Segments that follow one another
    are read as one text, so that their beginnings are not surprising for want of what was before."""
    nats, new, unknown = kept.nats, False, (kept.nats[:, :, 0] < 0).tolist()
    for b, numbers in enumerate(kept.numbers.tolist()):
        open_slots = sorted((n, s) for s, n in enumerate(numbers) if n >= 0 and unknown[b][s])
        for run in _runs(open_slots):
            nats = nats if new else nats.clone()
            new, texts = True, [kept.text(b, s) for s in run]
            losses = _losses(model, torch.cat([t[:-1] for t in texts]), texts[-1][-1:], backend)
            for s, part in zip(run, losses.split([len(t) - 1 for t in texts])):
                nats[b, s] = 0
                nats[b, s, : len(part)] = part
    return replace(kept, nats=nats) if new else kept


def _runs(slots: list[tuple[int, int]]) -> list[list[int]]:
    """Slots, given with the numbers of their segments, in runs of numbers without a gap."""
    found: list[list[int]] = []
    for i, (number, slot) in enumerate(slots):
        if i and number == slots[i - 1][0] + 1:
            found[-1].append(slot)
        else:
            found.append([slot])
    return found


def _losses(model: Model, ids: Tensor, following: Tensor, backend: str | None) -> Tensor:
    """Of predicting what comes after each of ids [T], [T] nats."""
    text, state, found = torch.cat([ids, following]), None, []
    for at in range(0, len(ids), PIECE):
        end = min(at + PIECE, len(ids))
        losses, state = model(
            text[at:end].unsqueeze(0), state, backend=backend, output="losses", following=text[end : end + 1]
        )
        found.append(losses.nats[0])
    return torch.cat(found)


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
