"""Deep momentum (Nested Learning, eq 50 to 52): the momentum as a small memory with a loss of its own."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..check import check_integer, check_number
from . import divided
from .base import ORTHOGONAL, MatrixOptimizer
from .delta_momentum import check_forgetting, unit
from .orthogonal import BATCH

MEMORY = ("linear", "mlp")


class DeepMomentum(MatrixOptimizer):
    """W <- W - lr' sigma(m(I)) after one inner step m <- a m - grad L2(m; k, I) of a memory m of its own per
    matrix.

    The memory maps an output's gradient, a row over the c inputs, to that output's unit vector:

        m(x) = M x                                 memory="linear", M [r, c]
        m(x) = B tanh(A x) / sqrt(h)               memory="mlp", A [h, c], B [r, h]
        L2(m; k, I) = - (1 - a) s tr m(kᵀ) + b/2 |m(kᵀ)|^2

    with the key k [r, c] = u = phi(grad) at norm 1; phi is eq 51's feature map, sign(g) |g|^power for each
    element. The first term is eq 50's dot product <m(u), I>, which writes; the second, with which it is the
    regression of eq 49 on I, erases. s is |grad| for a linear memory, whose output then has the size of
    gradients, and 1 for an MLP, where the step of A would grow with the square of it: an MLP keeps
    directions, and wants ``orthogonalize``.

    What moves W is the memory's answer to the c unit vectors of the inputs, m(I) [r, c]. Eq 50 and 52 write
    m(u): for a matrix u that is [r, r] and no step of W; m(I) is what makes the paper's own special cases
    come out: linear with b = 0 is momentum, linear with b > 0 is delta momentum (49), and sigma =
    Newton-Schulz (``orthogonalize``) makes Muon of the former, as (52) says.

    An MLP returns to its first weights where the paper has a m: (A - A0), B <- a (A - A0), a B. From A = B =
    0 no gradient leads away. A0 ~ N(0, 1) is drawn from ``seed``, alike for all matrices of one shape; B
    starts at 0. ``hidden``: h, by default the shorter side of the matrix. lr' and the options of orthogonal
    steps: as in ``M3``. State: M, or A and B, in the parameter's dtype; steps of A, of elements about 1, are too
    small for 16 bits, and there B alone learns. For parameters divided over processes, every process keeps the
    whole memory. Raises ValueError for options out of range, sparse gradients, parameters that are complex or
    empty.

    >>> layer = torch.nn.Linear(8, 8)
    >>> optimizer = DeepMomentum(layer.parameters(), lr=0.02, memory="mlp")
    >>> layer(torch.ones(2, 8)).square().sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self, params, lr: float | Tensor = 1e-3, a: float = 0.95, b: float = 1.0, *, memory: str = "mlp",
        hidden: int | None = None, power: float = 1.0, orthogonalize: bool = True, seed: int = 0,
        weight_decay: float = 0.0, adjust_lr_fn: str = "original", ns_dtype: torch.dtype | None = None,
        backend: str | None = None, **adamw,
    ) -> None:
        """adamw: ``adamw_lr``, ``adamw_betas``, ``adamw_eps`` (``MatrixOptimizer``)."""
        super().__init__(params, ORTHOGONAL | {
            "lr": lr, "a": a, "b": b, "memory": memory, "hidden": hidden, "power": power, "seed": seed,
            "orthogonalize": orthogonalize, "weight_decay": weight_decay, "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype, "backend": backend
        }, adamw)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        name = "DeepMomentum"
        check_forgetting(name, "a", group["a"], "b", group["b"])
        check_number(name, "power", group["power"], lambda x: 0 <= x < math.inf, "a number >= 0")
        check_integer(name, "seed", group["seed"], None, "an integer")
        if group["memory"] not in MEMORY:
            raise ValueError(f"{name}: argument memory is {group['memory']!r}, expected one of {MEMORY}")
        if group["hidden"] is not None:
            check_integer(name, "hidden", group["hidden"], 1, "None or an integer >= 1")

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        at_once = max(1, BATCH // params[0].numel())
        for i in range(0, len(params), at_once):
            self._update(group, params[i : i + at_once], grads[i : i + at_once])

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        grad = torch.stack([divided.whole(g, p) for g, p in zip(grads, params)])
        key = grad if group["power"] == 1 else grad.sign() * grad.abs() ** group["power"]
        key = unit(key)
        if group["memory"] == "linear":
            steps = self._linear(group, params, key, torch.linalg.matrix_norm(grad, keepdim=True))
        else:
            steps = self._mlp(group, params, key)
        found = [divided.own(s, p) for s, p in zip(steps, params)]
        if group["orthogonalize"]:
            found = self.orthogonal(group, params, found)
        self.move(group, params, found, group["orthogonalize"])

    def _linear(self, group: dict[str, Any], params: list[Tensor], key: Tensor, size: Tensor) -> Tensor:
        M = self._stacked(params, "linear", lambda: torch.zeros_like(key[0]))
        a, b = group["a"], group["b"]
        erased = (M @ key.mT) @ key if b else None  # before M changes
        M.mul_(a).add_(key * size, alpha=1 - a)
        if erased is not None:
            M.sub_(erased, alpha=b)
        return self._store(params, "linear", M)

    def _mlp(self, group: dict[str, Any], params: list[Tensor], key: Tensor) -> Tensor:
        r, c = key.shape[1:]
        h, a, b = group["hidden"] or min(r, c), group["a"], group["b"]
        start = first_weights(h, c, group["seed"]).to(key)
        A = self._stacked(params, "first", start.clone)
        B = self._stacked(params, "second", lambda: key.new_zeros(r, h))
        seen = (A @ key.mT).tanh()  # [n, h, r]: the units at every output's gradient
        error = b * (B @ seen) / math.sqrt(h)  # [n, r, r], dL2 / dm(kᵀ)
        error.diagonal(dim1=1, dim2=2).sub_(1 - a)
        back = (B.mT @ error) * (1 - seen * seen) / math.sqrt(h)
        B.mul_(a).sub_(error @ seen.mT, alpha=1 / math.sqrt(h))
        A.sub_(start).mul_(a).add_(start).sub_(back @ key)
        return self._store(params, "second", B) @ self._store(params, "first", A).tanh() / math.sqrt(h)

    def _stacked(self, params: list[Tensor], name: str, first) -> Tensor:
        return torch.stack([self.state[p][name] if name in self.state[p] else first() for p in params])

    def _store(self, params: list[Tensor], name: str, values: Tensor) -> Tensor:
        for p, value in zip(params, values):
            if name in self.state[p]:
                self.state[p][name].copy_(value)
            else:
                self.state[p][name] = value.clone()
        return values


@lru_cache(maxsize=64)
def first_weights(h: int, c: int, seed: int) -> Tensor:
    """A0 [h, c] ~ N(0, 1), the same whenever it is asked for: it need not be saved."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(h, c, generator=generator, dtype=torch.float32, device="cpu")
