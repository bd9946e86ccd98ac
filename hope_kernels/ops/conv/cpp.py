"""The convolution on the C++ backend (csrc/cpu/layer.cpp), and its gradient by what flows through it.

fp32 on the CPU, widths that are multiples of 8, no graph: call under no_grad. Values are those of
``forward.py`` to rounding, and a token's are bit-identical in any company.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..shared.cpu_library import POINTER, SIZE, Function, address, row_array

_forward = Function("hope_conv", "conv", *[SIZE] * 5, *[POINTER] * 6)
_backward = Function("hope_conv_backward", "conv_backward", *[SIZE] * 5, *[POINTER] * 3)


def causal_conv(
    x: Tensor, tail: Tensor, weight: Tensor, lengths: list[int] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """``causal_conv_chunked``. Values of x after a row's length are not read."""
    x, tail, weight = x.contiguous(), tail.contiguous(), weight.contiguous()
    y, new_tail = torch.empty_like(x), torch.empty_like(tail)
    (B, T, d), W = x.shape, weight.shape[1]
    if lengths is None:
        lengths = [T] * B
    counts = row_array(lengths.tolist() if isinstance(lengths, Tensor) else lengths, B)
    every, kept = B * T * d, B * (W - 1) * d
    _forward(
        B, T, d, W, torch.get_num_threads(), address(x, every), address(tail, kept), address(weight, d * W),
        ctypes.addressof(counts), address(y, every), address(new_tail, kept),
    )
    return y, new_tail


def causal_conv_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dL/dx from dL/dy [B, T, d], zero after a row's length: dx_t = sum_j weight[:, j] dy_{t+W-1-j}."""
    dy, weight = dy.contiguous(), weight.contiguous()
    dx, every = torch.empty_like(dy), dy.numel()
    B, T, d = dy.shape
    W = weight.shape[1]
    _backward(
        B, T, d, W, torch.get_num_threads(), address(weight, d * W), address(dy, every), address(dx, every)
    )
    return dx
