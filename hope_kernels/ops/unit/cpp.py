"""Unit vectors on the C++ backend (csrc/cpu/layer.cpp): fp32 on the CPU, no graph: call under no_grad."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.cpu_library import POINTER, SIZE, Function, address

_forward = Function("hope_unit", "unit", *[SIZE] * 3, *[POINTER] * 2)
_backward = Function("hope_unit_backward", "unit_backward", *[SIZE] * 3, *[POINTER] * 3)


def unit(x: Tensor) -> Tensor:
    """``forward.l2norm`` over the last dimension, to rounding."""
    x = x.contiguous()
    y, every, D = torch.empty_like(x), x.numel(), x.shape[-1]
    _forward(every // D, D, torch.get_num_threads(), address(x, every), address(y, every))
    return y


def unit_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dL/dx of ``unit`` from dL/dy."""
    x, dy = x.contiguous(), dy.contiguous()
    dx, every, D = torch.empty_like(x), x.numel(), x.shape[-1]
    _backward(every // D, D, torch.get_num_threads(), address(x, every), address(dy, every), address(dx, every))
    return dx
