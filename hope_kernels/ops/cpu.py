"""What a layer does around its memories on the C++ backend (csrc/cpu/layer.cpp): convolution, unit vectors, output gate, and their
gradients by what flows through them. fp32 on the CPU, widths that are multiples of 8, no graph: call under no_grad.

The values are those of ``conv/chunked.py``, ``titans/memory.py`` (``l2norm``) and ``output_gate/chunked.py`` to rounding, and a token's are
bit-identical in any company. B rows, T tokens, H heads of width D, d = H D, W the window of the convolution.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from .titans.cpp import address, library

_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS = {
    "conv": (5, 6), "conv_backward": (5, 3), "unit": (3, 2), "unit_backward": (3, 3), "output_gate": (4, 4), "output_gate_backward": (4, 6),
}  # sizes, then pointers


@cache
def _function(name: str):
    function = getattr(library(), f"hope_{name}")
    sizes, pointers = _ARGUMENTS[name]
    function.argtypes, function.restype = [_SIZE] * sizes + [_POINTER] * pointers, None
    return function


def _call(name: str, *arguments: int | Tensor | None) -> None:
    _function(name)(*(address(t) if isinstance(t, Tensor) else t for t in arguments))


def causal_conv(x: Tensor, tail: Tensor, weight: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """``causal_conv_chunked``: y [B, T, d], zero behind a row's length, and the new tail [B, W-1, d]. Values behind it are not read."""
    x, tail, weight = x.contiguous(), tail.contiguous(), weight.contiguous()
    y, after = torch.empty_like(x), torch.empty_like(tail)
    counts = (ctypes.c_int64 * len(lengths))(*lengths)
    _call("conv", *x.shape, weight.shape[1], torch.get_num_threads(), x, tail, weight, ctypes.addressof(counts), y, after)
    return y, after


def causal_conv_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dL/dx from dL/dy [B, T, d], zero behind a row's length: dx_t = sum_j weight[:, j] dy_{t+W-1-j}."""
    dy, weight = dy.contiguous(), weight.contiguous()
    dx = torch.empty_like(dy)
    _call("conv_backward", *dy.shape, weight.shape[1], torch.get_num_threads(), weight, dy, dx)
    return dx


def unit(x: Tensor) -> Tensor:
    """``l2norm``: x / max(|x|, 1e-6) over the last dimension."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _call("unit", x.shape[:-1].numel(), x.shape[-1], torch.get_num_threads(), x, y)
    return y


def unit_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dL/dx of ``unit`` from dL/dy."""
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    _call("unit_backward", x.shape[:-1].numel(), x.shape[-1], torch.get_num_threads(), x, dy, dx)
    return dx


def output_gate(o: Tensor, gain: Tensor | None, gate: Tensor | None) -> Tensor:
    """``output_gate_chunked``: rmsnorm_per_head(o) * gain * silu(gate), [B, T, d]; o [B, T, H, D]."""
    o, gain, gate = (None if t is None else t.contiguous() for t in (o, gain, gate))
    B, T, H, D = o.shape
    y = o.new_empty(B, T, H * D)
    _call("output_gate", B * T, H, D, torch.get_num_threads(), o, gain, gate, y)
    return y


def output_gate_backward(dy: Tensor, o: Tensor, gain: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dL/do [B, T, H, D] and dL/dgate [B, T, d] of ``output_gate`` from dL/dy [B, T, d]."""
    dy, o, gain, gate = (None if t is None else t.contiguous() for t in (dy, o, gain, gate))
    B, T, H, D = o.shape
    do, dgate = torch.empty_like(o), None if gate is None else torch.empty_like(gate)
    _call("output_gate_backward", B * T, H, D, torch.get_num_threads(), o, gain, gate, dy, do, dgate)
    return do, dgate
