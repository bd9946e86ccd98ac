"""The causal convolution under training on the C++ backend: its own gradient by x and by the taps. Calls with
padding, gradients by a tail, and gradients of gradients are those of ``forward.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.again import gradients_again
from ..shared.cpu_library import POINTER, SIZE, Function, address, is_plain
from .cpp import causal_conv, causal_conv_backward
from .forward import causal_conv_chunked

_weight_backward = Function("hope_conv_weight_backward", "conv weight_backward", *[SIZE] * 5, *[POINTER] * 4)


def causal_conv_training(
    x: Tensor, tail: Tensor, weight: Tensor, lengths: list[int] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """``causal_conv_chunked``, differentiable."""
    if lengths is not None or not is_plain(x, tail, weight):
        return causal_conv_chunked(x, tail, weight, lengths)
    return _Conv.apply(x, tail, weight)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tail: Tensor, weight: Tensor):
        ctx.save_for_backward(x, tail, weight)
        ctx.set_materialize_grads(False)
        y, new = causal_conv(x, tail, weight, None)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(new)
        return y, new

    @staticmethod
    def backward(ctx, dy: Tensor | None, dtail: Tensor | None):
        (x, tail, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled() or dy is None or dtail is not None or wanted[1]:
            found = gradients_again(_chunked, (x, tail, weight), wanted, (dy, dtail))
            return found[0], found[1], found[2]
        dx = causal_conv_backward(dy, weight) if wanted[0] else None
        return dx, None, _taps(x, tail, weight, dy) if wanted[2] else None


def _chunked(x: Tensor, tail: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return causal_conv_chunked(x, tail, weight, None)


def _taps(x: Tensor, tail: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    x, tail, dy = x.contiguous(), tail.contiguous(), dy.contiguous()
    (B, T, d), W, every = x.shape, weight.shape[1], x.numel()
    found = weight.new_empty(d, W)
    _weight_backward(
        B, T, d, W, torch.get_num_threads(), address(x, every), address(tail, B * (W - 1) * d), address(dy, every),
        address(found, d * W),
    )
    return found
