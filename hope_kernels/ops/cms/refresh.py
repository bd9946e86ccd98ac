"""The step of one matrix of a CMS level, from a segment's factors, as a checked operator: ops.cms_refresh."""

from __future__ import annotations

import torch
from torch import Tensor

from ...check import check_index, check_rows, check_tensor
from ...config import CMSConfig
from ...state import master_dtype
from .backends import resolve
from .level import Adam
from .muon import muon_step_


def cms_refresh(
    config: CMSConfig, level: int, weight: Tensor, left: Tensor, right: Tensor, *, moment: Tensor | None = None,
    total: Tensor | None = None, rows: list[int] | None = None, backend: str | None = None,
    square: Tensor | None = None, step: int = 1, tokens: int | None = None,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor]:
    """``cms_refresh_`` on copies: returns (weight, moment), or (weight, moment, square) for Adam, new
    tensors; no argument is modified."""
    weight = weight.clone()
    moment, total, square = (None if t is None else t.clone() for t in (moment, total, square))
    cms_refresh_(config, level, weight, left, right, moment=moment, total=total, rows=rows, backend=backend,
                 square=square, step=step, tokens=tokens)
    return (weight, moment) if square is None or moment is None else (weight, moment, square)


@torch.no_grad()
def cms_refresh_(
    config: CMSConfig, level: int, weight: Tensor, left: Tensor, right: Tensor, *, moment: Tensor | None = None,
    total: Tensor | None = None, copy: Tensor | None = None, rows: list[int] | None = None,
    backend: str | None = None, square: Tensor | None = None, step: int = 1, tokens: int | None = None,
) -> None:
    """theta <- theta - lr_l f(g), g_b = left_b^T right_b (+ total_b, which becomes zero), in place, for every
    row of a batch or ``rows``.

    level: index, level 1 is 0.  weight: [B, r, c], fp32 (fp64 for fp64 factors).  left: [B, C, r],
    right: [B, C, c], the factors of a segment of C tokens (errors at the matrix's outputs, its inputs).
    moment: [B, r, c], needed by optimizer="momentum" and "adam" (zeros at the start).  total: [B, r, c],
    gradients of earlier segments of the period.  copy: [B, r, c], ``weight`` in the factors' dtype.
    square: [B, r, c], adam's average of g^2 (zeros at the start).  step: its t, 1 for the first step.
    tokens: how many g is a sum over (None: C), which adam makes a mean.
    f: gd g;  momentum m = mu m + g, f = m;  muon 0.2 sqrt(max(r, c)) newton_schulz(g);  adam, with the mean
    for g: m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
    f = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + 1e-8).  lr = 0 changes nothing; a relative
    rate is taken as it is, since this function does not know the size of the initial weights.
    Raises ValueError for shapes, dtypes, rows, a missing moment or square, a step or number of tokens below
    1, and an unknown backend.
    Source: Nested Learning eq 71.
    """
    name, sizes = "cms_refresh", check_tensor("cms_refresh", "weight", weight, ("B", "r", "c"))
    C = check_tensor(name, "left", left, (sizes["B"], "C", sizes["r"]), device=weight.device)["C"]
    wide = master_dtype(left.dtype)
    check_tensor(name, "weight", weight, tuple(weight.shape), wide)
    check_tensor(name, "right", right, (sizes["B"], C, sizes["c"]), left.dtype, weight.device)
    for field, t, dtype in (
        ("moment", moment, wide), ("square", square, wide), ("total", total, wide), ("copy", copy, left.dtype)
    ):
        if t is not None:
            check_tensor(name, field, t, tuple(weight.shape), dtype, weight.device)
    check_index(name, "level", level, config.num_levels)
    for field, t, wanted in (("moment", moment, ("momentum", "adam")), ("square", square, ("adam",))):
        if (t is None) == (config.optimizer in wanted):
            given = "None" if t is None else "a tensor"
            raise ValueError(f"{name}: argument {field} is {given} with optimizer={config.optimizer!r}")
    tokens = C if tokens is None else tokens
    for field, n in (("step", step), ("tokens", tokens)):
        if type(n) is not int or n < 1:
            raise ValueError(f"{name}: argument {field} is {n!r}, expected a positive integer")
    rows = list(range(sizes["B"])) if rows is None else sorted(set(check_rows(name, "rows", rows, sizes["B"])))
    lr, ops = config.learning_rates[level], resolve(config, left.dtype, left.device, backend, inner=True)
    if lr == 0 or not rows:
        return
    if config.optimizer != "muon":
        adam = None if square is None else Adam(square, config.betas, step, tokens)
        ops.refresh_(
            weight, copy, left, right, rows, lr, moment=moment, mu=config.momentum, total=total, adam=adam
        )
        return
    grad = torch.zeros_like(weight) if total is None else total
    ops.outer_add_(grad, left, right, rows)
    muon_step_(weight, copy, grad, rows, lr, ops)
