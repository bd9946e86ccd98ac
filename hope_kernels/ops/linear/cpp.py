"""Projections, norms and gates on the C++ backend (csrc/cpu/linear.cpp): fp32 on the CPU, no graph: call under no_grad.

A token's numbers are bit-identical in any company, which a GEMM of a library does not promise: it takes other tiles,
and so other orders of sums, for other numbers of tokens. They are those of whole segments in C++ (segment.h), too.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level

from ...backend import NO_GRADIENT, Request
from ..shared import cpu_library
from ..shared.cpu_library import POINTER, REAL, SIZE, Function, address
from . import forward

_linear = Function("hope_linear", "linear", *[SIZE] * 4, *[POINTER] * 4)
_gate = Function("hope_gate", "gate", *[SIZE] * 2, ctypes.c_int32, REAL, *[POINTER] * 3)
_rms_norm = Function("hope_rms_norm", "rms_norm", *[SIZE] * 3, REAL, *[POINTER] * 3)
_layer_norm = Function("hope_layer_norm", "layer_norm", *[SIZE] * 3, REAL, *[POINTER] * 4)


def unserved(request: Request) -> str | None:
    """Why the backend cannot serve a call, or None."""
    if request.gradient != NO_GRADIENT:
        return "has no autograd graph"
    reason = cpu_library.unserved(request, request.config.d_model)
    if reason is None and (torch.compiler.is_compiling() or maybe_current_level() is not None):
        return "cannot be followed by torch.compile and transformations of torch.func"
    if reason is None and torch.is_autocast_enabled("cpu"):
        return "serves float32, which projections under autocast are not"
    return reason


def unserved_unasked(request: Request) -> str | None:
    """Why the backend does not serve a call that names no backend, or None."""
    if getattr(request.config, "keeps_bits", False):
        return "leaves a converted model the bits of its original unless it is asked for by name"
    return unserved(request)


def linear(x: Tensor, weight: Tensor, more: Tensor | None = None, *, bias: Tensor | None = None) -> Tensor:
    """``forward.linear``, which it is for tensors of a class of their own; ``more`` [.., R] is added to it."""
    if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter):
        y = forward.linear(x, weight, bias=bias)
        return y if more is None else y + more
    x, weight, more = x.contiguous(), weight.contiguous(), None if more is None else more.contiguous()
    R, K = weight.shape
    n = x.numel() // K if K else 0
    y = torch.empty((*x.shape[:-1], R), dtype=x.dtype, device=x.device)
    _linear(
        n, K, R, torch.get_num_threads(), address(x, n * K), address(weight, R * K), address(more, n * R),
        address(y, n * R),
    )
    return y if bias is None else y.add_(bias)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """``forward.rms_norm``; d is a multiple of 8."""
    x, gain = x.contiguous(), gain.contiguous()
    y, every, d = torch.empty_like(x), x.numel(), gain.numel()
    _rms_norm(every // d, d, torch.get_num_threads(), eps, address(x, every), address(gain, d), address(y, every))
    return y


def layer_norm(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) gain + shift over the last dimension, a multiple of 8."""
    x, gain, shift = x.contiguous(), gain.contiguous(), shift.contiguous()
    y, every, d = torch.empty_like(x), x.numel(), gain.numel()
    _layer_norm(
        every // d, d, torch.get_num_threads(), eps, address(x, every), address(gain, d), address(shift, d),
        address(y, every),
    )
    return y


def gate(raw: Tensor, bias: Tensor, softplus: bool = False, scale: float = 1.0) -> Tensor:
    """``forward.gate``, as the memories' own gates are computed in a scan."""
    raw, bias = raw.contiguous(), bias.contiguous()
    y, every, H = torch.empty_like(raw), raw.numel(), bias.numel()
    _gate(every // H, H, softplus, scale, address(raw, every), address(bias, H), address(y, every))
    return y
