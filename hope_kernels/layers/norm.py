"""An ``nn.RMSNorm`` under training on a CPU: one pass each way (csrc/cpu/cms.cpp), where PyTorch takes sixteen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.cms.cpp import norm_gradients
from ..ops.linear.cpp import rms_norm
from ..ops.shared import cpu_library
from ..ops.shared.again import gradients_again
from .wrapped import is_hooked


def rms_normed(module: nn.Module, x: Tensor, backend: str | None = None) -> Tensor:
    """``module(x)``. In C++ where a graph is built, for a ``module`` that is what PyTorch makes, and where the caller
    has not asked for another backend."""
    if backend in (None, "cpp") and torch.is_grad_enabled() and _served(module, x):
        return _Norm.apply(x, module.weight, module.eps)
    return module(x)


def _served(module: nn.Module, x: Tensor) -> bool:
    return (
        type(module) is nn.RMSNorm and not is_hooked(module) and module.eps is not None and module.weight is not None
        and module.weight.dim() == 1 and module.weight.numel() % 8 == 0 and x.shape[-1] == module.weight.numel()
        and cpu_library.is_plain(x, module.weight) and cpu_library.has_autograd()
        and not torch.is_autocast_enabled("cpu") and cpu_library.unavailable() is None
    )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx, dn: Tensor):
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx, dweight = gradients_again(
                lambda x, weight: (torch.rms_norm(x, weight.shape, weight, ctx.eps),), (x, weight), wanted[:2], (dn,)
            )
            return dx, dweight, None
        dx, dweight = norm_gradients(x, weight, dn, None, ctx.eps, gain=wanted[1])
        return dx, dweight, None
