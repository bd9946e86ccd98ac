"""All rows of a call on one axis of slots: slot 0 is the start of each row's open chunk of the longer clock, so
that every row's chunk boundaries lie at the same slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import MaybeTensor


class Slots:
    """The host's view of a call: for each row its phase in the longer chunk and how many tokens it reads.

    The call reads the slots ``first`` .. ``last``. aligned: every row reads, and from the same slot on.
    """

    def __init__(self, pos: list[int], lengths: list[int], longest: int, tokens: int, device: torch.device):
        self.phase = [p % longest for p in pos]
        self.lengths, self.tokens, self.device = lengths, tokens, device
        active = [(p, n) for p, n in zip(self.phase, lengths) if n]
        self.first = min([p for p, _ in active]) if active else 0
        self.last = max([p + n for p, n in active]) if active else 0
        self.aligned = len({p for p, _ in active}) <= 1 and all(lengths)
        self.index: Tensor | None = None  # ragged calls gather: the token of every slot, per row
        if not self.aligned:
            slot = torch.arange(self.first, self.last, device=device)
            token = slot - self.per_row(self.phase)
            self.valid = (token >= 0) & (token < self.per_row(lengths))
            self.index = token.clamp(0, tokens - 1)

    def per_row(self, numbers: list[int]) -> Tensor:
        """[B, 1] int64."""
        return torch.tensor(numbers, dtype=torch.long, device=self.device).unsqueeze(1)

    def ends(self) -> list[int]:
        return [p + n for p, n in zip(self.phase, self.lengths)]

    def commits(self, boundary: int) -> list[bool]:
        """Rows whose slot ``boundary - 1`` is read in this call."""
        return [p < boundary <= p + n for p, n in zip(self.phase, self.lengths)]

    def mask(self, flags: list[bool], heads: int) -> Tensor:
        """[G] bool, one flag per row for all its heads."""
        return torch.tensor(flags, dtype=torch.bool, device=self.device).repeat_interleave(heads)

    def to_slots(self, t: Tensor | None, dtype: torch.dtype | None = None) -> MaybeTensor:
        """[B, T, H, ...] -> [G, slots, ...], in ``dtype`` if given."""
        if t is None:
            return None
        if self.index is None:
            t = t[:, : self.last - self.first]
        else:
            shape = (len(self.phase), -1, *[1] * (t.dim() - 2))
            index = self.index.view(shape).expand(-1, -1, *t.shape[2:])
            t = torch.where(self.valid.view(shape), t.gather(1, index), 0.0)
        t = t.transpose(1, 2).flatten(0, 1)
        return t if dtype is None else t.to(dtype)

    def to_tokens(self, o: Tensor) -> Tensor:
        """[G, slots, D] -> [B, T, H, D]; what lies after a row's tokens means nothing."""
        o = o.unflatten(0, (len(self.phase), -1)).transpose(1, 2)
        if self.index is None:
            return o if o.shape[1] == self.tokens else F.pad(o, (0, 0, 0, 0, 0, self.tokens - o.shape[1]))
        slot = torch.arange(self.tokens, device=o.device) + self.per_row(self.phase) - self.first
        slot = slot.clamp(0, o.shape[1] - 1)
        index = slot.view(*slot.shape, 1, 1).expand(-1, -1, *o.shape[2:])
        return o.gather(1, index)
