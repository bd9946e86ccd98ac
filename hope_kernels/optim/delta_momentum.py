"""Delta momentum (Nested Learning, eq 48 and 49): a momentum that replaces where others add."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..check import check_number
from . import divided, lists
from .base import ORTHOGONAL, MatrixOptimizer
from .orthogonal import BATCH


class DeltaMomentum(MatrixOptimizer):
    """m <- a m - b (m ĝᵀ) ĝ + (1 - a) g,  ĝ = g / |g|;   W <- W - lr m, or W - lr' NS(m) with orthogonalize.

    Plain momentum is a memory that learns by the dot product, eq 47: it adds. Eq 49 learns by regression, min
    |m gᵀ - P|^2, whose gradient is (m gᵀ - P) g: for a matrix gradient g [r, c] the product m gᵀ [r, r] sums
    over the c inputs, and with g behind it the erased part is m (gᵀ g), a projection of every row of m on the
    rows of g. So an output's momentum is emptied along the directions of the input space in which the new
    gradient moves any output, and kept across them. Contracting over the outputs instead, (g gᵀ) m, would be
    the regression of mᵀ; eq 49 writes m to the left of gᵀ g, and rows are what a linear layer reads its
    inputs with. P = I here.

    The paper's g is not normalised: its decay a - gᵀ g grows with the loss and diverges for |g|^2 > 1 + a.
    Here the erasure has ĝ, of norm 1 over the whole matrix, so that all factors lie in [a - b, a] and b < 1 +
    a never diverges; the written term has g itself, weighted so that b = 0 is the mean of the gradients. For
    a gradient of rank 1 with b = a the memory holds, along it, the last gradient alone: it replaces where
    momentum adds.

    lr' and the options of orthogonal steps: as in ``M3``. State: m.
    Raises ValueError for options out of range, sparse gradients, parameters that are complex or empty.

    >>> layer = torch.nn.Linear(8, 8)
    >>> optimizer = DeltaMomentum(layer.parameters(), lr=0.02, orthogonalize=True)
    >>> layer(torch.ones(2, 8)).square().sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self, params, lr: float | Tensor = 1e-3, a: float = 0.95, b: float = 1.0, *,
        orthogonalize: bool = False, weight_decay: float = 0.0, adjust_lr_fn: str = "original",
        ns_dtype: torch.dtype | None = None, backend: str | None = None, **adamw,
    ) -> None:
        """adamw: ``adamw_lr``, ``adamw_betas``, ``adamw_eps`` (``MatrixOptimizer``)."""
        super().__init__(params, ORTHOGONAL | {
            "lr": lr, "a": a, "b": b, "orthogonalize": orthogonalize, "weight_decay": weight_decay,
            "adjust_lr_fn": adjust_lr_fn, "ns_dtype": ns_dtype, "backend": backend
        }, adamw)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_forgetting("DeltaMomentum", "a", group["a"], "b", group["b"])

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        momentum, a, b = self.kept("momentum", params), group["a"], group["b"]
        erased = None
        if b:
            pairs = [(divided.whole(m, p), divided.whole(g, p)) for m, g, p in zip(momentum, grads, params)]
            erased = [divided.own(e, p) for e, p in zip(projected(pairs), params)]
        lists.mul_(momentum, a)
        if erased is not None:
            lists.add_(momentum, erased, alpha=-b)
        lists.add_(momentum, grads, alpha=1 - a)
        orthogonal = group["orthogonalize"]
        steps = self.orthogonal(group, params, momentum) if orthogonal else momentum
        self.move(group, params, steps, orthogonal)


def check_forgetting(name: str, first: str, a: Any, second: str, b: Any) -> None:
    """Raises ValueError unless 0 <= a < 1 and 0 <= b < 1 + a: beyond, erasing overshoots and grows."""
    a = check_number(name, first, a, lambda x: 0 <= x < 1, f"0 <= {first} < 1")
    check_number(name, second, b, lambda x: 0 <= x < 1 + a, f"0 <= {second} < 1 + {first}, or it diverges")


def unit(g: Tensor) -> Tensor:
    """Each matrix of [..., r, c] with the norm 1; a zero one stays zero."""
    # by its largest element first, or squares of small ones vanish: what is left has a norm of 1 or more, or of 0
    g = g / g.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
    return g / torch.linalg.matrix_norm(g, keepdim=True).clamp(min=1)


def projected(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """(m ĝᵀ) ĝ = m (ĝᵀ ĝ) of each pair (m, g), all [r, c]; the order with fewer products."""
    (r, c), found = pairs[0][0].shape, []
    at_once = max(1, BATCH // math.prod((r, c)))
    for i in range(0, len(pairs), at_once):
        m, g = (torch.stack(each) for each in zip(*pairs[i : i + at_once]))
        g = unit(g)
        found.extend(((m @ g.mT) @ g if r <= c else m @ (g.mT @ g)).unbind())
    return found
