"""Unit vectors under training on the C++ backend. Gradients of gradients are those of ``forward.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.again import gradients_again
from ..shared.cpu_library import is_plain
from .cpp import unit, unit_backward
from .forward import l2norm


def unit_training(x: Tensor) -> Tensor:
    """``l2norm`` over the last dimension, differentiable."""
    return _Unit.apply(x) if is_plain(x) else l2norm(x)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor):
        ctx.save_for_backward(x)
        return unit(x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradients_again(lambda t: (l2norm(t),), (x,), (True,), (dy,))[0]
        return unit_backward(dy, x)
