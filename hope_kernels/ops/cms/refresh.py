"""The step of one matrix of a CMS level, from a segment's factors, as a checked operator: ops.cms_refresh."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...check import check_index, check_rows, check_tensor
from ...config import CMSConfig
from ...state import master_dtype
from .backends import resolve
from .level import Adam
from .muon import muon_step_
from .relative import normalise_, normalises, rate


def cms_refresh(
    config: CMSConfig, level: int, weight: Tensor, left: Tensor, right: Tensor, *, moment: Tensor | None = None,
    total: Tensor | None = None, rows: list[int] | None = None, backend: str | None = None,
    square: Tensor | None = None, step: int = 1, tokens: int | None = None, size: float | None = None,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor]:
    """``cms_refresh_`` on copies: returns (weight, moment), or (weight, moment, square) for Adam, new
    tensors; no argument is modified."""
    weight = weight.clone()
    moment, total, square = (None if t is None else t.clone() for t in (moment, total, square))
    cms_refresh_(config, level, weight, left, right, moment=moment, total=total, rows=rows, backend=backend,
                 square=square, step=step, tokens=tokens, size=size)
    return (weight, moment) if square is None or moment is None else (weight, moment, square)


@torch.no_grad()
def cms_refresh_(
    config: CMSConfig, level: int, weight: Tensor, left: Tensor, right: Tensor, *, moment: Tensor | None = None,
    total: Tensor | None = None, copy: Tensor | None = None, rows: list[int] | None = None,
    backend: str | None = None, square: Tensor | None = None, step: int = 1, tokens: int | None = None,
    size: float | None = None,
) -> None:
    """theta <- theta - lr_l f(g), g_b = left_b^T right_b (+ total_b, which becomes zero), in place, for every
    row of a batch or ``rows``.

    level: index, level 1 is 0.  weight: [B, r, c], fp32 (fp64 for fp64 factors).  left: [B, C, r],
    right: [B, C, c], the factors of a segment of C tokens (errors at the matrix's outputs, its inputs).
    moment: [B, r, c], needed by optimizer="momentum" and "adam" (zeros at the start).  total: [B, r, c],
    gradients of earlier segments of the period.  copy: [B, r, c], ``weight`` in the factors' dtype.
    square: [B, r, c], adam's average of g^2 (zeros at the start).  step: its t, 1 for the first step.
    tokens: how many g is a sum over (None: C), which adam makes a mean.  size: the RMS of the matrix's
    initial weights, which relative rates are relative to; needed with ``relative``, and with nothing else.
    With ``rank``, weight is L [B, r, rank] and right the inputs times S^T; size is still that of the matrix.
    f: gd g;  momentum m = mu m + g, f = m;  muon 0.2 sqrt(max(r, c)) newton_schulz(g);  adam, with the mean
    for g: m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
    f = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + 1e-8).  lr = 0 changes nothing.
    With ``relative``: lr size in the place of lr, for muon lr size / 0.2, and gd and momentum take g / rms(g).
    Raises ValueError for shapes, dtypes, rows, a moment, square or size that is missing or has no meaning, a
    step or number of tokens below 1, an unknown backend, and ``precondition``, whose P this function does not
    have: multiply right and total by it.
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
    _check_size(name, config, size)
    if config.precondition is not None:
        raise ValueError(f"{name}: argument config has precondition={config.precondition}, expected None: "
                         "multiply right and total by P, and pass config.replace(precondition=None)")
    if config.rank not in (None, sizes["c"]):
        raise ValueError(f"{name}: argument weight has shape {list(weight.shape)}, expected L, "
                         f"[B, r, {config.rank}], with rank={config.rank}")
    tokens = C if tokens is None else tokens
    for field, n in (("step", step), ("tokens", tokens)):
        if type(n) is not int or n < 1:
            raise ValueError(f"{name}: argument {field} is {n!r}, expected a positive integer")
    rows = list(range(sizes["B"])) if rows is None else sorted(set(check_rows(name, "rows", rows, sizes["B"])))
    rates = config.matrix_rates(level)
    if config.lr == "learned" or len(set(rates.values())) > 1:
        raise ValueError(f"{name}: argument config has lr={config.lr!r}, expected one number for all matrices of "
                         f"level {level}: which matrix this is, the function does not know")
    lr = rate(config, level, next(iter(rates)), size)
    ops = resolve(config, left.dtype, left.device, backend, inner=True)
    if lr == 0 or not rows:
        return
    if normalises(config):
        total = torch.zeros_like(weight) if total is None else total
        ops.outer_add_(total, left, right, rows)
        normalise_(total, rows, ops)
        ops.refresh_(weight, copy, None, None, rows, lr, moment=moment, mu=config.momentum, total=total)
    elif config.optimizer != "muon":
        adam = None if square is None else Adam(square, config.betas, step, tokens)
        ops.refresh_(
            weight, copy, left, right, rows, lr, moment=moment, mu=config.momentum, total=total, adam=adam
        )
    else:
        grad = torch.zeros_like(weight) if total is None else total
        ops.outer_add_(grad, left, right, rows)
        muon_step_(weight, copy, grad, rows, lr, ops)


def _check_size(name: str, config: CMSConfig, size: float | None) -> None:
    if not config.relative:
        if size is not None:
            raise ValueError(f"{name}: argument size is {size!r}, expected None where rates are not relative")
    elif size is None:
        raise ValueError(f"{name}: argument size is None, expected the RMS of the matrix's initial weights: "
                         "rates of this configuration are relative to it")
    elif type(size) not in (int, float) or not 0 <= size < math.inf:
        raise ValueError(f"{name}: argument size is {size!r}, expected a finite number >= 0")
