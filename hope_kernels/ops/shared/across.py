"""What the processes that share a layer exchange, each with a part of its heads or hidden units.

Outside the divided part of a layer every process has the same numbers, and the same gradients. Inside, each
makes its own part. So what goes in is the same everywhere, and its gradient is a sum over the processes
(``enter``); what comes out is a sum (``total``) whose gradient is the same everywhere. In the same order in
every process: a collective has no name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# by their names from PyTorch 2.13 on, where the earlier ones warn
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Across:
    """The processes of ``group``, of which this one is number ``rank`` of ``size``. Functions of tensors of
    one shape and dtype in all of them; differentiable once."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def enter(self, x: Tensor) -> Tensor:
        """x, whose gradient is the sum of those of all processes."""
        return _Enter.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else x

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all processes; its gradient is that of the sum."""
        return _Total.apply(x, self)

    def gathered(self, x: Tensor, summed: bool) -> Tensor:
        """x [.., n] of all processes, side by side: [.., size n]. summed: each process makes something of
        its own of the result, so that the gradient is the sum over all; else all make the same of it."""
        return _Gathered.apply(x, self, summed)

    def own(self, x: Tensor, dim: int = -1) -> Tensor:
        """The part of x that belongs to this process, a view: x is cut evenly along ``dim``."""
        n = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * n, n)

    def sum_of_own(self, x: Tensor) -> Tensor:
        """``own(total(x))`` of x [.., n], without a graph."""
        n = x.shape[-1] // self.size
        stacked = x.unflatten(-1, (self.size, n)).movedim(-2, 0).contiguous()
        out = x.new_empty(stacked[0].numel())
        _reduce_scatter(out, stacked.flatten(), group=self.group)
        return out.view(stacked.shape[1:])

    def sum(self, x: Tensor) -> Tensor:
        """``total`` without a graph."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        return x

    def parts(self, x: Tensor) -> Tensor:
        """x of every process, [size, ...], without a graph."""
        out = x.new_empty(self.size * x.numel())
        _all_gather(out, x.contiguous().flatten(), group=self.group)
        return out.view(self.size, *x.shape)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, across: Across) -> Tensor:
        ctx.across = across
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.across.sum(grad), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, across: Across) -> Tensor:
        return across.sum(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, across: Across, summed: bool) -> Tensor:
        ctx.across, ctx.summed = across, summed
        return across.parts(x).movedim(0, -2).flatten(-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        found = ctx.across.sum_of_own(grad) if ctx.summed else ctx.across.own(grad).contiguous()
        return found, None, None
