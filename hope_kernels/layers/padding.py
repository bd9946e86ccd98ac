"""Padding: other libraries mark it by a mask and put it anywhere, ours is behind the tokens of each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Padding:
    """order [B, T]: the columns of each row, those that count first; lengths: how many; keep [B, T]: which."""

    order: Tensor
    lengths: list[int]
    keep: Tensor

    @classmethod
    def of(cls, op: str, mask: Tensor | None, columns: int) -> Padding | None:
        """None where all of the last ``columns`` columns count. mask [B, T or more], as transformers has it:
        what is cut off in front has been read before. Raises ValueError for a mask of other dimensions."""
        if mask is None:
            return None
        if mask.dim() != 2 or mask.shape[1] < columns:
            raise ValueError(f"{op}: argument attention_mask has shape {list(mask.shape)}, expected "
                             f"[B, T] with T at least {columns}")
        keep = mask[:, mask.shape[1] - columns :] != 0
        if bool(keep.all()):
            return None
        order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
        return cls(order, keep.sum(1).tolist(), keep)

    def packed(self, x: Tensor) -> Tensor:
        """x [B, T, ...] with what counts first; zero after that."""
        x = x.masked_fill(~_like(self.keep, x), 0)
        return x.gather(1, _like(self.order, x).expand_as(x))

    def spread(self, y: Tensor) -> Tensor:
        """The inverse of ``packed``: zero in the columns that do not count."""
        spread = torch.zeros_like(y).scatter(1, _like(self.order, y).expand_as(y), y)
        return spread.masked_fill(~_like(self.keep, y), 0)

    def targets(self, labels: Tensor) -> Tensor:
        """labels [B, T] without those that would be predicted from a column that does not count: -100."""
        after = torch.cat([torch.ones_like(self.keep[:, :1]), self.keep[:, :-1]], 1)
        return labels.masked_fill(~after, -100)


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.view(*t.shape, *[1] * (x.dim() - 2))
