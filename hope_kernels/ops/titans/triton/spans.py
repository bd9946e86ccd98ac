"""How a call is cut for the backward: spans of whole chunks, and which tokens of each row lie in them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ....config import TitansConfig
from ....state import Counters
from ..inputs import TokenInputs
from ..state import TitansState

CHUNKS_A_SPAN = 8
CARRIED = (
    "delta2", "delta1", "delta1s", "s2", "s1", "s1s", "pending_k", "pending_v", "pending_eta",
    "pending_alpha", "pending_beta"
)
TOKENS = TokenInputs._fields[:-2]  # [B, T, ...]; the last two are biases [H]


@dataclass
class Span:
    """Row b reads its tokens starts[b] .. starts[b] + counts[b]; pos: where the rows stand before.

    at, reads [B] int64: pos and counts on the device, made there.
    """

    pos: list[int]
    starts: list[int]
    counts: list[int]
    at: Tensor
    reads: Tensor

    @property
    def even(self) -> bool:
        return len(set(self.starts)) == 1 and len(set(self.counts)) == 1

    def take(self, t: Tensor) -> Tensor:
        """[B, T, ...] -> [B, max(counts), ...], zeros after a row's tokens (whatever the padding holds)."""
        if self.even:
            return t[:, self.starts[0] : self.starts[0] + self.counts[0]]
        found = t.new_zeros(t.shape[0], max(self.counts), *t.shape[2:])
        for b, (at, n) in enumerate(zip(self.starts, self.counts)):
            found[b, :n] = t[b, at : at + n]
        return found

    def take_inputs(self, inputs: TokenInputs) -> TokenInputs:
        return TokenInputs(
            *(t if t is None or n not in TOKENS else self.take(t) for n, t in zip(inputs._fields, inputs))
        )

    def put(self, into: Tensor, t: Tensor) -> None:
        """The reverse of ``take``."""
        if self.even:
            into[:, self.starts[0] : self.starts[0] + self.counts[0]] = t
            return
        for b, (at, n) in enumerate(zip(self.starts, self.counts)):
            into[b, at : at + n] = t[b, :n]

    def parts(self, slots: range, big: int) -> list[Span]:
        """Of these tokens those in each slots.step slots from every one of ``slots`` on; starts count from ours.

        Slots count from the start of each row's open chunk of ``big`` tokens.
        """
        if not slots:
            return []
        edges = torch.arange(
            slots.start, slots[-1] + 2 * slots.step, slots.step, device=self.at.device
        ).unsqueeze(1)
        edges = (edges - self.at % big).clamp_(min=0).minimum(self.reads)
        found = []
        for first, at, reads in zip(slots, self.at + edges[:-1], edges[1:] - edges[:-1]):
            starts, ends = (
                [min(max(edge - p % big, 0), n) for p, n in zip(self.pos, self.counts)]
                for edge in (first, first + slots.step)
            )
            found.append(
                Span([p + s for p, s in zip(self.pos, starts)], starts, [e - s for s, e in zip(starts, ends)],
                    at, reads)
            )
        return found


@dataclass
class Call:
    """What a call is, beside its tensors. state: counters only, of its own; reads [B] int64: lengths on the
    device."""

    config: TitansConfig
    state: TitansState
    lengths: list[int]
    reads: Tensor
    update: bool
    constant_memory: bool

    def spans(self) -> list[Span]:
        """On the slots that count from the start of each row's open chunk of the slower clock."""
        small, big = sorted((self.config.chunk_memory, self.config.chunk_other))
        size = big * max(1, CHUNKS_A_SPAN * small // big)
        whole = Span(list(self.state.pos), [0] * len(self.lengths), self.lengths, self.state.count, self.reads)
        last = max((p % big + n for p, n in zip(whole.pos, self.lengths) if n), default=0)
        return whole.parts(range(0, last, size), big)

    def at(self, span: Span, carried: Any) -> TitansState:
        return replace(self.state, pos=Counters(span.pos), count=span.at, **dict(zip(CARRIED, carried)))
