"""The matrices of a level in an operator's arguments, and in a launch."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from ...shared.triton_build import aligned, filled
from ..level import Level
from .common import Operand
from .forward import inner_kernel
from .tiles import INNER, RANK

# A matrix as an operator sees it. rows: 1 for a row of the batch with a base of its own, else 0; empty: none has one.
_MATRIX = "Tensor? {0}, Tensor? {0}_own, int[] {0}_rows, Tensor? {0}_left, Tensor? {0}_right, float {0}_scale"
MATRICES = ", ".join(_MATRIX.format(name) for name in ("up", "gate", "down"))
PER_MATRIX = _MATRIX.count(",") + 1


def matrices_of(level: Level) -> list:
    """The arguments of ``MATRICES``."""
    flat = []
    for name in ("up", "gate", "down"):
        W = level.get(name)
        if W is None:
            flat += [None, None, [], None, None, 0.0]
            continue
        own, rows = (W.own, [int(r) for r in W.rows]) if W.own is not None and any(W.rows) else (None, [])
        pending = (None, None) if W.left is None or not W.left.shape[1] else (W.left, W.right)
        flat += [W.shared, own, rows, *pending, float(W.scale)]
    return flat


@lru_cache(maxsize=1024)
def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int32, copied to the device once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int32, device=device)


class Matrix:
    """A matrix [r, c] in a launch: its base, and the pending part's factors [B, slots, .], of which the first
    R count."""

    def __init__(self, shared, own, rows, left, right, scale, like: Tensor):
        self.exists = shared is not None or own is not None
        self.OWN = own is not None
        self.shared, self.own = map(aligned, filled((own if shared is None else shared, own), like))
        self.owns = on_device(tuple(rows), like.device) if self.OWN else like
        self.scale, self.like, self.R = scale, like, 0 if left is None else left.shape[1]
        self.left, self.right = (like if t is None else t if slots_of(t) else aligned(t) for t in (left, right))

    def operand(self, x: Tensor, side: str, OWN: bool, bias: Tensor | None = None) -> Operand:
        """In a launch some of whose matrices have rows of their own (OWN). side: the pending factor that x
        [B, T, .] meets first, "right" on the way up and "left" on the way back."""
        owns = self.owns if self.OWN or not OWN else on_device((0,) * self.like.shape[0], self.like.device)
        inner, outer = (self.right, self.left) if side == "right" else (self.left, self.right)
        u = self._inner(x, inner)
        return Operand(self.shared, self.own, owns, self.like if bias is None else bias, u, outer)

    def _inner(self, x: Tensor, factor: Tensor) -> Tensor:
        """x factor^T [B, T, R up to a multiple of RANK]: x [B, T, K], factor left or right; without a pending
        part a stand-in."""
        if not self.R:
            return x
        (B, T, K), tile = x.shape, INNER[x.itemsize]
        u = x.new_empty(B, T, triton.cdiv(self.R, RANK) * RANK)
        inner_kernel[(B * triton.cdiv(T, tile.BM), triton.cdiv(self.R, tile.BN))](
            x, factor, u, T, self.R, slots_of(factor), K=K, BR=RANK, **tile.sizes(), **tile.options(),
        )
        return u


def operands(matrices: tuple, like: Tensor) -> list[Matrix]:
    up, gate, down = (
        Matrix(*matrices[i : i + PER_MATRIX], like=like) for i in range(0, len(matrices), PER_MATRIX)
    )
    for side in ("left", "right") if up.R and gate.R else ():
        a, b = getattr(up, side), getattr(gate, side)
        if slots_of(a) != slots_of(b):  # one launch takes both
            setattr(up, side, a.contiguous())
            setattr(gate, side, b.contiguous())
    return [up, gate, down]


def slots_of(factor: Tensor) -> int:
    """Slots from one row of the batch to the next in factor [B, R, width], the first slots of a larger
    buffer; 0: it must be copied."""
    B, R, width = factor.shape
    slots = factor.stride(0) // max(width, 1) if B > 1 else R
    fits = factor.stride()[1:] == (width, 1) and (B == 1 or factor.stride(0) == slots * width >= R * width)
    return slots if fits and factor.data_ptr() % 16 == 0 else 0
