"""One matrix of a CMS level as B sequences have it: the layer's, or one of the row's own, and on top of either
a pending low-rank part.

    W_b = base_b + scale * left_b^T right_b        base_b = own[b] where rows[b], else shared

``left`` and ``right`` are the factors of refreshes that have not been folded into a dense matrix yet: R
tokens' errors and inputs. A product with W_b reads the base once for all rows that share it, and 2 R numbers
instead of r c for what the row itself has learned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """shared: [r, c] or None.  own: [B, r, c] or None, in force in ``rows`` ([B] bools).  left, right:
    [B, R, r], [B, R, c] or None; unused slots are zero.  All in one dtype and on one device."""

    shared: Tensor | None
    own: Tensor | None = None
    rows: tuple[bool, ...] = ()
    left: Tensor | None = None
    right: Tensor | None = None
    scale: float = 0.0

    @classmethod
    def of(cls, t: Tensor | Matrix) -> Matrix:
        """From a tensor [r, c], or [B, r, c] with a matrix for every row."""
        if isinstance(t, Matrix):
            return t
        return cls(t) if t.dim() == 2 else cls(None, t, (True,) * t.shape[0])

    def detach(self) -> Matrix:
        return replace(self, **{n: None if t is None else t.detach() for n, t in self._tensors().items()})

    def take(self, rows: list[int]) -> Matrix:
        """The same matrix for the sequences ``rows`` alone."""
        picked = {
            n: t if t is None or n == "shared" else t[torch.tensor(rows, dtype=torch.long, device=t.device)]
            for n, t in self._tensors().items()
        }
        return replace(self, **picked, rows=tuple(self.rows[b] for b in rows) if self.own is not None else ())

    def dense(self, batch: int) -> Tensor:
        """[B, r, c]: the matrices written out."""
        w = by_rows(self, batch, lambda w, rows: w.expand(len(rows), -1, -1), lambda w, rows: w)
        if self.left is None or self.right is None:
            return w
        return torch.baddbmm(w, self.left.mT, self.right, alpha=self.scale)

    def _tensors(self) -> dict[str, Tensor | None]:
        return {n: getattr(self, n) for n in ("shared", "own", "left", "right")}


def by_rows(W: Matrix, batch: int, with_shared, with_own) -> Tensor:
    """Results [B, ...] of the rows that share the base and of those that have their own, in the order of the
    rows."""
    mine = [b for b in range(batch) if W.own is not None and W.rows[b]]
    if W.own is None or not mine:
        return with_shared(W.shared, range(batch))
    if len(mine) == batch:
        return with_own(W.own, mine)
    others = [b for b in range(batch) if not W.rows[b]]
    index = torch.tensor(mine, dtype=torch.long, device=W.own.device)
    parts = torch.cat([with_own(W.own[index], mine), with_shared(W.shared, others)])
    order = torch.tensor([*mine, *others], dtype=torch.long, device=parts.device).argsort()
    return parts[order]


def times_transposed(x: Tensor, W: Matrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: x [B, T, c], bias [r] -> [B, T, r]."""

    def of(rows) -> Tensor:
        return x if len(rows) == x.shape[0] else x[torch.tensor(rows, dtype=torch.long, device=x.device)]

    def with_own(w: Tensor, rows) -> Tensor:
        if len(w) == 1:
            return torch.nn.functional.linear(of(rows), w[0], bias)
        y = torch.bmm(of(rows), w.mT)
        return y if bias is None else y + bias

    y = by_rows(W, x.shape[0], lambda w, rows: torch.nn.functional.linear(of(rows), w, bias), with_own)
    if W.left is None or W.right is None:
        return y
    return torch.baddbmm(y, torch.bmm(x, W.right.mT), W.left, alpha=W.scale)


def times(e: Tensor, W: Matrix) -> Tensor:
    """e W: e [B, T, r] -> [B, T, c]."""

    def of(rows) -> Tensor:
        return e if len(rows) == e.shape[0] else e[torch.tensor(rows, dtype=torch.long, device=e.device)]

    def with_own(w: Tensor, rows) -> Tensor:
        return of(rows) @ w[0] if len(w) == 1 else torch.bmm(of(rows), w)

    y = by_rows(W, e.shape[0], lambda w, rows: of(rows) @ w, with_own)
    if W.left is None or W.right is None:
        return y
    return torch.baddbmm(y, torch.bmm(e, W.left.mT), W.right, alpha=W.scale)
