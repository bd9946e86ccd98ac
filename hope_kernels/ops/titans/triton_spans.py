"""How a call is cut for the backward: spans of whole chunks, and which tokens of each row lie in them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...config import TitansConfig
from ...state import Counters
from .chunked import TokenInputs
from .fast_weights import TitansState

CHUNKS_A_SPAN = 8
CARRIED = ("delta2", "delta1", "delta1s", "s2", "s1", "s1s", "pending_k", "pending_v", "pending_eta", "pending_alpha", "pending_beta")
TOKENS = TokenInputs._fields[:-2]  # [B, T, ...]; the last two are biases [H]


@dataclass
class Span:
    """Row b reads its tokens starts[b] .. starts[b] + counts[b]; pos: where the rows stand before."""

    pos: list[int]
    starts: list[int]
    counts: list[int]

    @property
    def even(self) -> bool:
        return len(set(self.starts)) == 1 and len(set(self.counts)) == 1

    def take(self, t: Tensor) -> Tensor:
        """[B, T, ...] -> [B, max(counts), ...], zeros behind a row's tokens (whatever the padding holds)."""
        if self.even:
            return t[:, self.starts[0] : self.starts[0] + self.counts[0]]
        found = t.new_zeros(t.shape[0], max(self.counts), *t.shape[2:])
        for b, (at, n) in enumerate(zip(self.starts, self.counts)):
            found[b, :n] = t[b, at : at + n]
        return found

    def take_inputs(self, inputs: TokenInputs) -> TokenInputs:
        return TokenInputs(*(t if t is None or n not in TOKENS else self.take(t) for n, t in zip(inputs._fields, inputs)))

    def put(self, into: Tensor, t: Tensor) -> None:
        """The reverse of ``take``."""
        if self.even:
            into[:, self.starts[0] : self.starts[0] + self.counts[0]] = t
            return
        for b, (at, n) in enumerate(zip(self.starts, self.counts)):
            into[b, at : at + n] = t[b, :n]

    def part(self, phase: list[int], first: int, size: int) -> Span:
        """Of these tokens those in slots first .. first + size, when row b's first one lies in slot phase[b]; starts count from ours."""
        starts = [min(max(first - p, 0), n) for p, n in zip(phase, self.counts)]
        ends = [min(max(first + size - p, 0), n) for p, n in zip(phase, self.counts)]
        return Span([p + s for p, s in zip(self.pos, starts)], starts, [e - s for s, e in zip(starts, ends)])


@dataclass
class Call:
    """What a call is, beside its tensors. state: counters only."""

    config: TitansConfig
    state: TitansState
    lengths: list[int]
    update: bool
    constant_memory: bool

    def spans(self) -> list[Span]:
        """On the slots that count from the start of each row's open chunk of the slower clock."""
        small, big = sorted((self.config.chunk_memory, self.config.chunk_other))
        size = big * max(1, CHUNKS_A_SPAN * small // big)
        phase = [p % big for p in self.state.pos]
        whole = Span(list(self.state.pos), [0] * len(phase), self.lengths)
        last = max((p + n for p, n in zip(phase, self.lengths) if n), default=0)
        return [whole.part(phase, first, size) for first in range(0, last, size)]

    def at(self, span: Span, carried: Any) -> TitansState:
        return replace(self.state, pos=Counters(span.pos), count=None, **dict(zip(CARRIED, carried)))
