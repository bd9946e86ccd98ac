"""A segment learned in parts that are read apart, each from empty mixers, with a dream beside them.

A text that is always replayed in the same surroundings is recognized by them, and what it says is then learned
as what follows them: after 16 replays a model knows every word of it, and cannot answer when it is asked. So a
replay cuts a segment, at places that differ from pass to pass, and reads the parts side by side as rows of a
batch. Every token of them keeps its own target, also where that is the first token of the next part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_state import ModelState
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


def learn_apart(
    model: Model, state: ModelState, row: int, parts: Parts, counts: list[int], backend: str | None,
    dreams: Dreams | None = None, *, least: float = 0.0, rate: float = 1.0
) -> Tensor:
    """Descends the loss of ``parts`` in ``row`` of the draft ``state``, and the divergence of ``dreams``: the losses
    [R, n] in nats. counts: as ``segments.learn_segment`` has them. least: a token is learned where its loss is that
    many nats or more. rate: factor of the rates."""
    R, lengths, known = len(parts.lengths), list(parts.lengths), sum(parts.lengths)
    ids, D, m = parts.ids, 0, 0
    if dreams is not None:
        D, m = dreams.ids.shape
        width = max(ids.shape[1], m)
        ids = torch.cat([F.pad(t, (0, width - t.shape[1])) for t in (ids, dreams.ids)])
        lengths += [m] * D
    learners, device = [row], ids.device
    empty, apart = (
        [b.mixer.init_state(n, device) for b in model.blocks] for n in (len(lengths), R)
    )
    read = Segment(apart, parts.ids, Targets(parts.targets, parts.lengths), parts.lengths, backend, True)
    real = mask(lengths, ids.shape[1], device).view(1, -1)
    with torch.inference_mode(False), torch.enable_grad():
        sinks = sinks_of(model, state, learners, counts, backend, [row], [known], real, rate)
        h, _, anchor = read_graph(model, state, empty, ids.clone(), lengths, backend, sinks, [row], True)
        n = parts.ids.shape[1]
        heads = read_head(
            model, h.detach()[:R, :n], parts.lengths, read.targets, logits=False, learners=[True] * R, least=least
        )
        assert heads.slopes is not None and heads.nats is not None
        slopes = h.new_zeros(h.shape)
        slopes[:R, :n] = heads.slopes
        if dreams is not None:
            # a row's loss is the sum over the replayed tokens, or what its optimizer makes of that
            _, back = drift(model, h.detach()[R:, :m], dreams.h)
            slopes[R:, :m] = back * (WEIGHT * known / (D * m))
        slopes = judged(model, state, read, list(range(R)), learners, heads.nats, slopes)
        torch.autograd.grad(h, anchor, slopes)
    return heads.nats
