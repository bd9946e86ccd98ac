"""The guard: what a sequence has learned must not read it worse than the model as it was.

Before a segment's gradient is used, its loss is at hand. It is compared with the loss that the model's own
weights have on the same segment, from the same mixers (one more forward pass, without a graph, of that
segment alone):

    after the first step of a row, at every 16th segment, and whenever the loss per token is not finite, or
    0.35 s nats above the running mean of the segments before

    loss <= own                     what the row has learned is good: a copy is kept
    own < loss <= own + 0.07 s      nothing happens
    loss > own + 0.07 s nats (0.1 s bits) a token, or not finite
                                    the levels of the row go back to the last good weights (the model's own where
                                    there are none), the segment is not learned, and the row's rates are halved

s = max(1, sqrt(256 / n)) for a segment of n tokens: the losses of shorter ones scatter as much more.

The estimate is of what reading with learning off would give: the mixers (cached keys and values, memories)
have been filled with learned weights, and stay as they are. So the cost is one forward pass in 16 segments,
and more where a text is uneven.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..check import check_counters, check_part
from ..config import HopeConfig
from ..layers.block import Block
from ..ops.cms.absorb import go_back, good_weights
from ..ops.cms.schedule import learning_levels
from ..ops.cms.state import CMSState
from ..state import Counters, State

EVERY = 16  # segments between two looks at a row whose losses are even
RISE = 0.35  # nats per token above the running mean that ask for a look
MARGIN = 0.07  # nats per token above the model's own loss that a row may have: 0.1 bits
EVEN = 256  # tokens of a segment to which RISE and MARGIN apply
SHARE = 0.2  # of the newest segment in the running mean


@dataclass(eq=False)
class GuardState(State):
    """Of B sequences: ``pos`` segments judged, ``looked`` of them at the last look, ``rollbacks`` so often a row
    went back to good weights (its rates are halved each time), ``mean`` [B] fp64, the running mean of the loss
    per token in nats.

    good: for every block and level None, or a tensor [B, r, c] for every matrix, in the dtype of the model: what
    counts in the rows marked in ``kept``; the others go back to the model's own weights.
    """

    looked: Counters
    rollbacks: Counters
    kept: Counters
    mean: Tensor
    good: list = field(default_factory=list)

    INPUT_DTYPE = frozenset({"good"})

    def input_dtype(self) -> torch.dtype | None:
        return next((t.dtype for level in self._levels() for t in level.values()), None)

    def _levels(self) -> list[dict[str, Tensor]]:
        return [level for block in self.good for level in block or () if level is not None]

    def to(self, device: Any = None, dtype: torch.dtype | None = None):
        new = super().to(device, dtype)
        return replace(new, mean=new.mean.double())

    def _check(self, where: str, dtype: torch.dtype | None, device: torch.device, values: bool) -> None:
        check_part(where, "mean", self.mean, (self.batch,), torch.float64, device)
        for block in self.good:
            if block is not None and not isinstance(block, list):
                raise ValueError(f"{where}: state.guard.good is no list of levels for every block")
        for level in self._levels():
            for name, t in level.items():
                check_part(where, f"good.{name}", t, (self.batch, *t.shape[1:]), dtype, device)
        if not torch.compiler.is_compiling():
            for name, high in (("pos", 2**62), ("looked", 2**62), ("rollbacks", 2**62), ("kept", 1)):
                check_counters(where, name, getattr(self, name), self.batch, 0, high)

    def draft(self) -> GuardState:
        """For a call to change: tensors of a draft are exchanged, never written."""
        names = ("pos", "looked", "rollbacks", "kept")
        counters = {n: Counters(getattr(self, n)) for n in names}
        return replace(self, good=[None if b is None else list(b) for b in self.good], **counters)

    def rate(self, row: int) -> float:
        """Factor of the learning rates."""
        return 0.5 ** self.rollbacks[row]


def new_guard(config: HopeConfig, batch: int, device: torch.device) -> GuardState:
    """Of sequences that have learned nothing under a guard."""
    zero = [0] * batch
    good = [None if c is None else [None] * c.num_levels for c in config.block_cms]
    return GuardState(
        Counters(zero), config, Counters(zero), Counters(zero), Counters(zero),
        torch.zeros(batch, dtype=torch.float64, device=device), good,
    )


def judge(
    guard: GuardState, blocks: list[tuple[Block, CMSState | None]], rows: list[int], tokens: list[int],
    losses: list[float], own_losses: Callable[[], list[float]],
) -> list[int]:
    """Of ``rows`` of the batch, with ``losses`` (nats per token) of the ``tokens`` tokens just read, those that
    went back to good weights; their segment is not to be learned. ``guard`` and the drafts in ``blocks`` change.

    own_losses: those of the model's own weights, asked only where they are needed.
    """
    mean, looked, scatter = guard.mean.tolist(), [], {}
    for b, count, loss in zip(rows, tokens, losses):
        n, scatter[b] = guard.pos[b], max(1.0, math.sqrt(EVEN / max(count, 1)))
        uneven = not math.isfinite(loss) or loss > mean[b] + RISE * scatter[b]
        if n and (n == 1 or uneven or n - guard.looked[b] >= EVERY):
            looked.append(b)
    bad: list[int] = []
    if looked:
        own = dict(zip(rows, own_losses()))
        found = dict(zip(rows, losses))
        bad = [b for b in looked if not found[b] <= own[b] + MARGIN * scatter[b]]
        good = [b for b in looked if found[b] <= own[b]]
        if good:
            _keep(guard, blocks, good)
        if bad:
            _restore(guard, blocks, bad)
    for b in looked:
        guard.looked[b] = guard.pos[b]
    for b, loss in zip(rows, losses):
        if b not in bad:
            mean[b] = loss if not guard.pos[b] else (1 - SHARE) * mean[b] + SHARE * loss
            guard.pos[b] += 1
    guard.mean = torch.tensor(mean, dtype=torch.float64, device=guard.mean.device)
    return bad


def _keep(guard: GuardState, blocks: list[tuple[Block, CMSState | None]], rows: list[int]) -> None:
    for i, (block, cms) in enumerate(blocks):
        for l in learning_levels(cms.config) if cms is not None and block.cms is not None else ():
            guard.good[i][l] = good_weights(cms, block.cms._start(l), l, rows, guard.good[i][l])
    for b in rows:
        guard.kept[b] = 1


def _restore(guard: GuardState, blocks: list[tuple[Block, CMSState | None]], rows: list[int]) -> None:
    kept = [b for b in rows if guard.kept[b]]
    for i, (block, cms) in enumerate(blocks):
        for l in learning_levels(cms.config) if cms is not None and block.cms is not None else ():
            go_back(cms, block.cms._start(l), l, rows, kept, guard.good[i][l])
    for b in rows:
        guard.rollbacks[b] += 1
