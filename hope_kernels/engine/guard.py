"""The guard: what a sequence has learned must not read it worse than the model as it was.

Before a segment's gradient is used, its loss is at hand. It is compared with the loss that the model's own
weights have on the same segment, from the same mixers (one more forward pass, without a graph, of that
segment alone):

    after the first step of a row, at every 16th segment, and whenever the loss per token is not finite, or
    0.35 s nats above the running mean of the segments before; s = max(1, sqrt(256 / n)) for a segment of n
    tokens, as the losses of shorter ones scatter more

    d = loss - own loss, token by token

    mean(d) <= 0                    what the row has learned is good: a copy is kept
    mean(d) > 0.07 nats (0.1 bits), and more than 2.5 standard errors of d above 0; or not finite
                                    the levels of the row go back to the last good weights (the model's own where
                                    there are none), the segment is not learned, and the row's rates are halved
    else                            nothing happens

The estimate is of what reading with learning off would give: the mixers (cached keys and values, memories)
have been filled with learned weights, and stay as they are. So the cost is one forward pass in 16 segments,
and more where a text is uneven.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

from ..guard_state import GuardState
from ..layers.block import Block
from ..layers.cms import ContinuumMemory
from ..ops.cms.absorb import go_back, good_weights
from ..ops.cms.schedule import learning_levels
from ..ops.cms.state import CMSState

EVERY = 16  # segments between two looks at a row whose losses are even
RISE = 0.35  # nats per token above the running mean that ask for a look
MARGIN = 0.07  # nats per token above the model's own loss that a row may have: 0.1 bits
ERRORS = 2.5  # standard errors that a difference must have to count
EVEN = 256  # tokens of a segment to which RISE applies
SHARE = 0.2  # of the newest segment in the running mean

Blocks = list[tuple[Block, CMSState | None]]


def judge(
    guard: GuardState, blocks: Blocks, rows: list[int], losses: list[Tensor], own_losses: Callable[[], list[Tensor]]
) -> list[int]:
    """Of ``rows`` of the batch, with ``losses`` (nats) of the tokens just read, those that went back to good
    weights; their segment is not to be learned. ``guard`` and the drafts in ``blocks`` change.

    own_losses: those of the model's own weights, asked only where they are needed.
    """
    means = [_mean(t) for t in losses]
    running, looked = guard.mean.tolist(), []
    for b, mean, tokens in zip(rows, means, losses):
        n, uneven = guard.pos[b], not math.isfinite(mean) or mean > running[b] + rise(len(tokens))
        if n and (n == 1 or uneven or n - guard.looked[b] >= EVERY):
            looked.append(b)
    bad: list[int] = []
    if looked:
        differences = [(a - b).double() for a, b in zip(losses, own_losses())]
        found = {b: _difference(d) for b, d in zip(rows, differences)}
        bad = [b for b in looked if not found[b][0] <= max(MARGIN, ERRORS * found[b][1])]
        good = [b for b in looked if found[b][0] <= 0]
        if good:
            _keep(guard, blocks, good)
        if bad:
            _restore(guard, blocks, bad)
    for b in looked:
        guard.looked[b] = guard.pos[b]
    for b, mean in zip(rows, means):
        if b not in bad:
            running[b] = mean if not guard.pos[b] else (1 - SHARE) * running[b] + SHARE * mean
            guard.pos[b] += 1
    guard.mean = torch.tensor(running, dtype=torch.float64, device=guard.mean.device)
    return bad


def rise(tokens: int) -> float:
    """Above the running mean, in nats per token, that asks for a look at a segment."""
    return RISE * max(1.0, math.sqrt(EVEN / max(tokens, 1)))


def _mean(losses: Tensor) -> float:
    """Added up one by one in fp64, as C++ does (csrc/cpu/segments.cpp), so that both see the same."""
    *_, total = accumulate(losses.double().tolist(), initial=0.0)
    return total / max(len(losses), 1)


def _difference(d: Tensor) -> tuple[float, float]:
    """The mean, and its standard error (0 for a single number, or where that is not finite)."""
    mean, error = float(d.mean()), float(d.std() / math.sqrt(len(d))) if len(d) > 1 else 0.0
    return mean, error if math.isfinite(error) else 0.0


def _levels(blocks: Blocks) -> Iterator[tuple[int, ContinuumMemory, CMSState, int]]:
    """Every level that learns: (block, its CMS, the draft of its state, level)."""
    for i, (block, cms) in enumerate(blocks):
        if cms is not None and block.cms is not None:
            for l in learning_levels(cms.config):
                yield i, block.cms, cms, l


def _keep(guard: GuardState, blocks: Blocks, rows: list[int]) -> None:
    for i, layer, cms, l in _levels(blocks):
        own = [b for b in rows if cms.own[l][b] or cms.rank[l][b]]
        if own:
            guard.good[i][l] = good_weights(cms, layer.start(l), l, own, guard.good[i][l])
        for b in rows:
            guard.held[i][l][b] = int(b in own)
    for b in rows:
        guard.kept[b] = 1


def _restore(guard: GuardState, blocks: Blocks, rows: list[int]) -> None:
    for i, layer, cms, l in _levels(blocks):
        kept = [b for b in rows if guard.held[i][l][b]]
        go_back(cms, layer.start(l), l, rows, kept, guard.good[i][l])
    for b in rows:
        guard.rollbacks[b] += 1
