"""A segment learned in parts: each read from empty mixers, or one behind another in an order of their own.

A text that is always replayed in the same surroundings is recognized by them, and what it says is then learned
as what follows them: after 16 replays a model knows every word of it, and cannot answer when it is asked. So a
replay cuts a segment, at places that differ from pass to pass. Parts side by side, as rows of a batch, are learned
as what stands at the beginning of a text; parts in one row, in an order drawn anew, as what comes after whatever
other text. Every token of them keeps its own target, also where that is the first token of another part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..model_state import ModelState
from ..ops.cms.chain import Sink
from ..ops.cms.level import Factors
from .dreams import WEIGHT, Dreams
from .head import Targets, drift, mask, read_head
from .protocol import Model
from .segments import Segment, judged, read_graph, sinks_of


class Parts(NamedTuple):
    """ids, targets [R, n], right-padded with 0; lengths: tokens of each row."""

    ids: Tensor
    targets: Tensor
    lengths: list[int]


def cut(text: Tensor, at: int, part: int) -> Parts:
    """``text`` [n + 1], a segment's tokens and the one after them, as parts: the first of ``at`` tokens, the others
    of ``part``, the last of what is left."""
    n = len(text) - 1
    starts = [0, *range(at, n, part)]
    return beside([text[a : b + 1] for a, b in zip(starts, [*starts[1:], n])])


def beside(texts: list[Tensor]) -> Parts:
    """Each of ``texts`` [n + 1], tokens and the one after them, as a part."""
    lengths = [len(t) - 1 for t in texts]
    ids = texts[0].new_zeros(2, len(texts), max(lengths))
    for i, (text, m) in enumerate(zip(texts, lengths)):
        for side in (0, 1):
            ids[side, i, :m] = text[side : side + m]
    return Parts(ids[0], ids[1], lengths)


def in_a_row(parts: Parts, order: list[int]) -> Parts:
    """``parts`` as one row, in that order: each is read in the light of those before it."""
    ids, targets = (torch.cat([t[i, : parts.lengths[i]] for i in order]).unsqueeze(0) for t in parts[:2])
    return Parts(ids, targets, [sum(parts.lengths)])


def learn_apart(
    model: Model, state: ModelState, row: int, parts: Parts, counts: list[int], backend: str | None,
    dreams: Dreams | None = None, *, least: float = 0.0, rate: float = 1.0
) -> Tensor:
    """Descends the loss of ``parts`` in ``row`` of the draft ``state``, and the divergence of ``dreams``: the losses
    [R, n] in nats. counts: as ``segments.learn_segment`` has them. least: a token is learned where its loss is that
    many nats or more. rate: factor of the rates."""
    (R, n), known, device = parts.ids.shape, sum(parts.lengths), parts.ids.device
    learners, before = [row], [b.mixer.init_state(R, device) for b in model.blocks]
    read = Segment(before, parts.ids, Targets(parts.targets, parts.lengths), parts.lengths, backend, True)
    real = mask(parts.lengths, n, device).view(1, -1)
    with torch.inference_mode(False), torch.enable_grad():
        dreamt = None
        if dreams is not None:
            # a row's loss is the sum over the replayed tokens, or what its optimizer makes of that
            dreamt = _dreamt(model, state, row, dreams, WEIGHT * known, backend)
            real = torch.cat([real, real.new_ones(1, dreams.ids.numel())], 1)
        sinks = sinks_of(model, state, learners, counts, backend, [row], [known], real, rate)
        if dreamt is not None:
            sinks = [sink and _with(sink, found) for sink, found in zip(sinks, dreamt)]
        mixers = [m.snapshot() for m in before]
        h, _, anchor = read_graph(model, state, mixers, parts.ids.clone(), parts.lengths, backend, sinks, [row], True)
        heads = read_head(
            model, h.detach(), parts.lengths, read.targets, logits=False, learners=[True] * R, least=least,
            backend=backend
        )
        assert heads.slopes is not None and heads.nats is not None
        slopes = judged(model, state, read, list(range(R)), learners, heads.nats, heads.slopes)
        torch.autograd.grad(h, anchor, slopes)
    return heads.nats


def _dreamt(
    model: Model, state: ModelState, row: int, dreams: Dreams, weight: float, backend: str | None
) -> list[dict[int, Factors]]:
    """Of each block and level, the factors of ``weight`` times the mean divergence of ``dreams`` from what they
    were, under the weights of ``row``."""
    D, m = dreams.ids.shape
    empty = [b.mixer.init_state(D, dreams.ids.device) for b in model.blocks]
    found: list[dict[int, Factors]] = [{} for _ in model.blocks]
    sinks: list[Sink | None] = [None if c is None else into.__setitem__ for c, into in zip(state.cms, found)]
    h, _, anchor = read_graph(model, state, empty, dreams.ids.clone(), [m] * D, backend, sinks, [row], True)
    _, back = drift(model, h.detach(), dreams.h, backend)
    torch.autograd.grad(h, anchor, back * (weight / (D * m)))
    return found


def _with(sink: Sink, more: dict[int, Factors]) -> Sink:
    """``sink``, which takes those factors as well: as of more tokens."""

    def both(l: int, factors: Factors) -> None:
        other = more.pop(l)
        sink(l, {
            n: (torch.cat([e, other[n][0]], 1), torch.cat([x, other[n][1]], 1)) for n, (e, x) in factors.items()
        })

    return both
