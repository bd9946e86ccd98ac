"""M3, multi-scale momentum Muon (Nested Learning, Algorithm 1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..check import check_integer, check_number
from . import divided, lists
from .base import ORTHOGONAL, MatrixOptimizer, check_betas

ACCUMULATE = ("ema", "paper")


class M3(MatrixOptimizer):
    """A fast momentum of every gradient and a slow one of every f gradients, each made orthogonal.

    accumulate="paper", Algorithm 1 as it is printed; all sums only grow:

        M1 <- M1 + b1 g,   V <- V + b2 g^2,   O1 = NS(M1)
        theta <- theta - lr (O1 + alpha O2) / sqrt(V + eps)
        after every f steps:  M2 <- M2 + b3 (sum of the last f gradients),   O2 = NS(M2)

    accumulate="ema", the default: averages that forget, and no V; with alpha = 0 it is torch.optim.Muon:

        M1 <- b1 M1 + (1 - b1) g,   O1 = NS((1 - b1) g + b1 M1) (nesterov) or NS(M1)
        theta <- (1 - lr weight_decay) theta - lr' (O1 + alpha O2)
        after every f steps:  M2 <- b3 M2 + (1 - b3) (mean of the last f gradients),   O2 = NS(M2)

    O2 is zero in the first f steps; then each serves the f steps after the sum that made it, as Algorithm 1
    opens a round of f steps with the sum of the round before. lr' is lr times ``adjust_lr_fn``:
    "original", sqrt(max(1, rows / columns)), or "match_rms_adamw", 0.2 sqrt(max(rows, columns)), at which
    rates of AdamW serve; "paper" uses lr as it is, and the paper's V instead. betas: (b1, b2, b3), b2 for
    "paper" alone.

    ns_dtype: the Newton-Schulz steps in the parameter's dtype (None) by ``backend``, or, as torch.optim.Muon
    has them, in torch.bfloat16. State: M1; with alpha > 0 also M2, O2 and the open sum; "paper" also V.
    Raises ValueError for options out of range, sparse gradients, parameters that are complex or empty.

    >>> layer = torch.nn.Linear(8, 8)
    >>> optimizer = M3(layer.parameters(), lr=0.02, f=2)     # the bias goes to AdamW
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     layer(torch.ones(2, 8)).square().sum().backward()
    ...     optimizer.step()
    >>> sorted(optimizer.state[layer.weight])
    ['fast', 'slow', 'slow_step', 'step', 'sum']
    """

    def __init__(
        self, params, lr: float | Tensor = 1e-3, betas: tuple[float, float, float] = (0.95, 0.999, 0.9),
        alpha: float = 0.3, f: int = 20, *, accumulate: str = "ema", nesterov: bool = True, eps: float = 1e-8,
        weight_decay: float = 0.0, adjust_lr_fn: str = "original", ns_dtype: torch.dtype | None = None,
        backend: str | None = None, **adamw,
    ) -> None:
        """adamw: ``adamw_lr``, ``adamw_betas``, ``adamw_eps`` (``MatrixOptimizer``)."""
        super().__init__(params, ORTHOGONAL | {
            "lr": lr, "betas": betas, "alpha": alpha, "f": f, "accumulate": accumulate, "nesterov": nesterov,
            "eps": eps, "weight_decay": weight_decay, "adjust_lr_fn": adjust_lr_fn, "ns_dtype": ns_dtype,
            "backend": backend
        }, adamw)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_betas("M3", "betas", group["betas"], 3)
        check_number("M3", "alpha", group["alpha"], lambda x: 0 <= x < math.inf, "a number >= 0")
        check_number("M3", "eps", group["eps"], lambda x: 0 < x < math.inf, "a number > 0")
        check_integer("M3", "f", group["f"], 1, "an integer >= 1")
        if group["accumulate"] not in ACCUMULATE:
            raise ValueError(
                f"M3: argument accumulate is {group['accumulate']!r}, expected one of {ACCUMULATE}"
            )

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        literal, (b1, b2, _) = group["accumulate"] == "paper", group["betas"]
        fast = self.kept("fast", params)
        if literal:
            lists.add_(fast, grads, alpha=b1)
            seen = fast
        else:
            lists.lerp_(fast, grads, 1 - b1)
            seen = lists.lerp(grads, fast, b1) if group["nesterov"] else fast
        steps = self.orthogonal(group, params, list(seen))
        if group["alpha"]:
            slow_steps = self.kept("slow_step", params)
            steps = list(lists.add(steps, slow_steps, alpha=group["alpha"]))
        if literal:
            square = self.kept("square", params)
            lists.addcmul_(square, grads, grads, value=b2)
            steps = [s / (v + group["eps"]).sqrt() for s, v in zip(steps, square)]
        self.move(group, params, steps, orthogonal=not literal)
        if group["alpha"]:
            self._remember(group, params, grads)

    def _remember(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Adds the gradients to the open sums, and sums of f of them to the slow momentum."""
        lists.add_(self.kept("sum", params), grads)
        self.kept("slow", params)
        due = []
        for p in params:
            step = self.state[p].setdefault("step", torch.zeros((), dtype=torch.float32, device="cpu"))
            step.add_(1).remainder_(group["f"])
            if step == 0:
                due.append(p)
        if not due:
            return
        slow, sums, b3 = self.kept("slow", due), self.kept("sum", due), group["betas"][2]
        if group["accumulate"] == "paper":
            lists.add_(slow, sums, alpha=b3)
        else:
            lists.mul_(slow, b3)
            lists.add_(slow, sums, alpha=(1 - b3) / group["f"])
        lists.zero_(sums)
        for p, step in zip(due, self.orthogonal(group, due, slow)):
            divided.part(self.state[p]["slow_step"]).copy_(step)
