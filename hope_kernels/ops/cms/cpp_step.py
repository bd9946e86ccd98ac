"""The update of a CMS level's matrix in C++ (csrc/cpu/cms_step.cpp): averages, weights and 16-bit copy in one
pass, and with bf16 factors, on a CPU that multiplies bf16 numbers, in the epilogue of their product, whose sums
are fp32. ``level.py`` has the same functions.

What it does not serve (fp64, a CPU without the library) goes to PyTorch's functions, whatever the caller's
backend; which of both follows from dtypes and the machine alone.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from ..shared import cpu_library
from ..shared.cpu_library import POINTER, REAL, SIZE, Function, address, has_autograd, is_plain
from . import level
from .level import ADAM_EPS, BF16_FROM, Adam, level_backward, level_forward, orthogonal

__all__ = ["level_backward", "level_forward", "newton_schulz", "normalise_", "outer_add_", "refresh_", "serves"]

_STEP = (SIZE, *[REAL] * 7)  # rule, lr, mu, beta2, first, second, root, eps
_step = Function("hope_cms_step", "cms refresh_", *[SIZE] * 2, *_STEP, *[POINTER] * 6)
_step_bf16 = Function("hope_cms_step_bf16", "cms refresh_", *[SIZE] * 4, *_STEP, *[POINTER] * 7)
_newton_schulz = Function("hope_newton_schulz", "cms newton_schulz", *[SIZE] * 4, *[POINTER] * 2)
_normalise = Function("hope_normalise", "cms normalise_", *[SIZE] * 2, POINTER)
GD, MOMENTUM, ADAM = range(3)
AS_IT_IS, ORTHOGONAL, NORMALISED = range(3)  # what a gradient becomes before its step: csrc/cpu/cms_whole.h


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether levels in ``dtype`` are updated here."""
    return device.type == "cpu" and dtype != torch.float64 and cpu_library.unavailable() is None


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 numbers."""
    function = cpu_library.library().hope_cms_bf16
    function.restype = ctypes.c_int
    return bool(function())


def outer_add_(
    target: Tensor, left: Tensor, right: Tensor, rows: list[int], alpha: float = 1.0, beta: float = 1.0
) -> None:
    """``level.outer_add_``."""
    if beta != 1 or not _product_in_bf16(left, right) or not _fits(target):
        level.outer_add_(target, left, right, rows, alpha, beta)
        return
    for b in rows:
        _from_factors(left[b], right[b], (GD, -alpha, 0, 0, 0, 0, 0, 0), None, (target[b], None, None, None))


def refresh_(
    weight: Tensor, copy: Tensor | None, left: Tensor | None, right: Tensor | None, rows: list[int], lr: float, *,
    moment: Tensor | None = None, mu: float = 0.0, total: Tensor | None = None, adam: Adam | None = None,
) -> None:
    """``level.refresh_``."""
    square = None if adam is None else adam.square
    narrow = copy is not None and copy.dtype != torch.bfloat16
    fused = left is not None and right is not None and _product_in_bf16(left, right)
    # the product's own epilogue does all but the copy, or the copy and one pass over the weights
    plain = adam is None and not fused and total is None
    if plain or narrow or left is None and total is None or not all(
        t is None or _fits(t) for t in (weight, moment, square, total)
    ):
        level.refresh_(weight, copy, left, right, rows, lr, moment=moment, mu=mu, total=total, adam=adam)
        return
    numbers = (GD if moment is None else MOMENTUM, lr, mu, 0, 0, 0, 0, 0)
    if adam is not None:
        rate, root = adam.rates(lr)
        numbers = (ADAM, rate, *adam.betas, *adam.shares, root, ADAM_EPS)
    grad = None
    for b in rows:
        g, *held = (None if t is None else t[b] for t in (total, weight, moment, square, copy))
        if left is not None and right is not None and fused:
            _from_factors(left[b], right[b], numbers, g, held)
            continue
        if left is not None and right is not None:
            wide = left[b].to(weight.dtype).mT, right[b].to(weight.dtype)
            if g is None:
                grad = torch.mm(*wide) if grad is None else torch.mm(*wide, out=grad)
            else:
                g.addmm_(*wide)
        n, (w, m, v, c) = weight[b].numel(), held
        _step(n, torch.get_num_threads(), *numbers, *(address(t, n) for t in (grad, g, w, m, v)), _bf16(c, n))


def newton_schulz(grad: Tensor, narrow: bool = False) -> Tensor:
    """``level.newton_schulz``, with bits that depend on the matrix alone; a large one of a 16-bit model in bf16, by
    PyTorch, where this CPU multiplies it: without it that is a hundred times slower."""
    in_bf16 = narrow and min(grad.shape[-2:]) >= BF16_FROM and multiplies_bf16()
    graph = grad.requires_grad and torch.is_grad_enabled()
    if in_bf16 or graph or not has_autograd() or not is_plain(grad):
        return orthogonal(grad, in_bf16)
    grad = grad.contiguous()
    found, (r, c) = torch.empty_like(grad), grad.shape[-2:]
    count = 0 if grad.numel() == 0 else grad.numel() // (r * c)
    _newton_schulz(count, r, c, torch.get_num_threads(), grad.data_ptr(), found.data_ptr())
    return found


def normalise_(total: Tensor, rows: list[int]) -> None:
    """total [B, r, c] of RMS 1 in ``rows``, in place; fp32."""
    for b in rows:
        g = total[b].contiguous()
        _normalise(g.numel(), torch.get_num_threads(), address(g, g.numel()))
        if g.data_ptr() != total[b].data_ptr():
            total[b].copy_(g)


def _from_factors(left: Tensor, right: Tensor, numbers: tuple, total: Tensor | None, held) -> None:
    (C, r), c = left.shape, right.shape[1]
    left, right, (weight, moment, square, copy) = left.contiguous(), right.contiguous(), held
    _step_bf16(
        C, r, c, torch.get_num_threads(), *numbers, _bf16(left, C * r), _bf16(right, C * c),
        *(address(t, r * c) for t in (total, weight, moment, square)), _bf16(copy, r * c),
    )


def _product_in_bf16(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype == torch.bfloat16 and multiplies_bf16()


def _fits(t: Tensor) -> bool:
    return t.dtype == torch.float32 and t.is_cpu and t.is_contiguous()


def _bf16(t: Tensor | None, count: int) -> int | None:
    """``address`` of bf16 numbers."""
    return None if t is None else address(t, count, dtype=torch.bfloat16)
