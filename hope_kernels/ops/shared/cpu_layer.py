"""What a layer does around its memories on the C++ backend (csrc/cpu/layer.cpp): convolution, unit vectors,
output gate, and their gradients by what flows through them. fp32 on the CPU, widths that are multiples of 8,
no graph: call under no_grad.

The values are those of ``conv/chunked.py``, ``titans/memory.py`` (``l2norm``) and ``output_gate/chunked.py``
to rounding, and a token's are bit-identical in any company. B rows, T tokens, H heads of width D, d = H D, W
the window of the convolution.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from ..titans.cpp import address, check_outcome, library, row_array

_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS = {
    "conv": (5, 6), "conv_backward": (5, 3), "unit": (3, 2), "unit_backward": (3, 3), "output_gate": (4, 4),
    "output_gate_backward": (4, 6),
}  # sizes, then pointers


@cache
def _function(name: str):
    function = getattr(library(), f"hope_{name}")
    sizes, pointers = _ARGUMENTS[name]
    function.argtypes, function.restype = [_SIZE] * sizes + [_POINTER] * pointers, ctypes.c_int
    return function


def _call(name: str, sizes: tuple[int, ...], *pointers: tuple[Tensor | None, int] | int) -> None:
    """pointers: addresses, or tensors with the number of elements that the function takes them to have."""
    threads = torch.get_num_threads()
    check_outcome(
        _function(name)(*sizes, threads, *(p if isinstance(p, int) else address(*p) for p in pointers)), name
    )


def causal_conv(x: Tensor, tail: Tensor, weight: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """``causal_conv_chunked``: y [B, T, d], zero behind a row's length, and the new tail [B, W-1, d]. Values
    behind it are not read."""
    x, tail, weight = x.contiguous(), tail.contiguous(), weight.contiguous()
    y, after = torch.empty_like(x), torch.empty_like(tail)
    (B, T, d), W = x.shape, weight.shape[1]
    every, kept, counts = B * T * d, B * (W - 1) * d, row_array(lengths, B)
    _call(
        "conv", (B, T, d, W), (x, every), (tail, kept), (weight, d * W), ctypes.addressof(counts), (y, every),
        (after, kept)
    )
    return y, after


def causal_conv_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dL/dx from dL/dy [B, T, d], zero behind a row's length: dx_t = sum_j weight[:, j] dy_{t+W-1-j}."""
    dy, weight = dy.contiguous(), weight.contiguous()
    dx, every = torch.empty_like(dy), dy.numel()
    _call(
        "conv_backward", (*dy.shape, weight.shape[1]), (weight, dy.shape[2] * weight.shape[1]), (dy, every),
        (dx, every)
    )
    return dx


def unit(x: Tensor) -> Tensor:
    """``l2norm``: x / max(|x|, 1e-6) over the last dimension."""
    x = x.contiguous()
    y, every = torch.empty_like(x), x.numel()
    _call("unit", (every // x.shape[-1], x.shape[-1]), (x, every), (y, every))
    return y


def unit_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dL/dx of ``unit`` from dL/dy."""
    x, dy = x.contiguous(), dy.contiguous()
    dx, every = torch.empty_like(x), x.numel()
    _call("unit_backward", (every // x.shape[-1], x.shape[-1]), (x, every), (dy, every), (dx, every))
    return dx


def output_gate(o: Tensor, gain: Tensor | None, gate: Tensor | None) -> Tensor:
    """``output_gate_chunked``: rmsnorm_per_head(o) * gain * silu(gate), [B, T, d]; o [B, T, H, D]."""
    o = o.contiguous()
    gain, gate = (None if t is None else t.contiguous() for t in (gain, gate))
    B, T, H, D = o.shape
    y = o.new_empty(B, T, H * D)
    every = B * T * H * D
    _call("output_gate", (B * T, H, D), (o, every), (gain, H * D), (gate, every), (y, every))
    return y


def output_gate_backward(
    dy: Tensor, o: Tensor, gain: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dL/do [B, T, H, D] and dL/dgate [B, T, d] of ``output_gate`` from dL/dy [B, T, d]."""
    dy, o = dy.contiguous(), o.contiguous()
    gain, gate = (None if t is None else t.contiguous() for t in (gain, gate))
    B, T, H, D = o.shape
    do, dgate = torch.empty_like(o), None if gate is None else torch.empty_like(gate)
    every = B * T * H * D
    _call(
        "output_gate_backward", (B * T, H, D), (o, every), (gain, H * D), (gate, every), (dy, every),
        (do, every), (dgate, every)
    )
    return do, dgate
