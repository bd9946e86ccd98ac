"""What a learning pass hands its factors to: the way from a level's backward to ``absorb``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.cms import low_rank
from ..ops.cms.absorb import absorb, alike
from ..ops.cms.chain import Sink
from ..ops.cms.level import Factors
from ..ops.cms.state import CMSState


def sink(
    layer, state: CMSState, rows: list[int], counts: list[int] | None, ops, among: list[int] | None,
    tokens: list[int] | None, real: Tensor | None, scale: Callable[[int], float] | None,
) -> Sink:
    """What takes the factors of a segment that ends in ``rows`` to the draft ``state``: see ``absorb``.

    rows: also what is left of the list when the factors come. among: the rows of the batch that the factors
    are of; None: all. tokens: how many of each of these rows count; None: all that there are factors of. real
    [len(among), n]: which factors are of tokens and not of padding; None: all. scale: of the rates of a row;
    None: 1.
    """
    of = None if tokens is None else dict(zip(range(state.batch) if among is None else among, tokens))
    counted = None if of is None else [of.get(b, 0) for b in range(state.batch)]

    def learned(l: int, factors: Factors) -> None:
        if real is not None:
            # errors of padding are zero, and its inputs are whatever the blocks make of it
            there = real.unsqueeze(-1)
            factors = {n: (left, torch.where(there, right, 0)) for n, (left, right) in factors.items()}
        if layer.config.rank is not None:
            factors = low_rank.projected(layer.config, l, factors)
        if among is not None:
            pairs, B = factors.items(), state.batch
            factors = {n: (_spread(left, among, B), _spread(right, among, B)) for n, (left, right) in pairs}
        slots = layer._slots(l)
        start, sizes = layer.start(l), layer._sizes(l)
        for factor, group in alike(rows, scale).items():
            absorb(state, layer.config, start, l, factors, group, counts, slots, ops, counted, sizes, factor)

    return learned


def _spread(t: Tensor, rows: list[int], batch: int) -> Tensor:
    """t [len(rows), ...] as the rows of a batch; the others are zero."""
    index = torch.tensor(rows, dtype=torch.long, device=t.device)
    return t.new_zeros(batch, *t.shape[1:]).index_copy(0, index, t)
