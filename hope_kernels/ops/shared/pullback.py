"""A value whose gradient is a formula, for what computes without an autograd graph."""

from __future__ import annotations

import torch


class Pullback(torch.autograd.Function):
    """``Pullback.apply(x, y, pullback)``: y, a new tensor, as a function of x whose gradient is
    pullback(dL/dy). Once differentiable."""

    @staticmethod
    def forward(ctx, x, y, pullback):
        ctx.pullback = pullback
        ctx.mark_dirty(y)  # not changed, but this function's output from here on
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.pullback(grad), None, None
