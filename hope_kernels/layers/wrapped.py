"""Submodules that a user has wrapped, parametrized, hooked or replaced, and what a layer may still take for
granted about them.

A layer calls its submodules; whatever stands in their place is then part of its function. Where a formula
needs a weight by itself, the functions here say whether there is one (``is_plain``), or what takes its place.
"""

from __future__ import annotations

from inspect import ismethod
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from ..ops.shared.pullback import Pullback
from .cms_level import CMSLevel


def is_plain(module: nn.Module, bias: bool = False) -> bool:
    """Whether ``module`` is x -> x W^T with W = ``module.weight`` and nothing else: a ``nn.Linear`` without a
    bias (bias=True: or with one) as PyTorch makes it, without hooks, a ``forward`` of its own, a parametrization,
    or a weight of a tensor subclass. dL/dx is then dL/dy W."""
    if type(module) is not nn.Linear or is_hooked(module):
        return False
    held = module._parameters  # a module's own access to them costs microseconds, and this is asked at every step
    added = held.get("bias")
    return (added is None or bias and type(added) in (nn.Parameter, Tensor)) and (
        type(held.get("weight")) in (nn.Parameter, Tensor)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` may do more than the ``forward`` of its class."""
    own = module.__dict__
    return bool("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
                or own["_backward_pre_hooks"] or _has_any_global_hook())


def placement(module: nn.Module) -> Tensor:
    """A tensor of the dtype and on the device that ``module`` computes in: its weight, else the first of its
    floating parameters and buffers. A quantized module may have none of them, and computes in fp32 on the
    CPU."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    for t in chain(module.parameters(), module.buffers()):
        if t.is_floating_point():
            return t
    return torch.empty(0, dtype=torch.float32, device="cpu")


def is_plain_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a ``nn.RMSNorm`` as PyTorch makes it, with its gain and ``eps`` and nothing else."""
    if type(module) is not nn.RMSNorm or module.eps is None or is_hooked(module):
        return False
    return type(module._parameters.get("weight")) is nn.Parameter


def normed(module: nn.Module, x: Tensor, ops: Any) -> Tensor:
    """``module(x)`` of a norm; where that is plain, of x's dtype and last dimension, by ``ops``, the functions of
    ops/linear."""
    norm: Any = module
    if not is_plain_norm(module) or type(x) is not Tensor or norm.weight.shape != x.shape[-1:] or (
        norm.weight.dtype != x.dtype
    ):
        return module(x)
    return ops.rms_norm(x, norm.weight, norm.eps)


def project(module: nn.Module, x: Tensor, ops: Any = None) -> Tensor:
    """``module(x)``; where that is plain, by ``ops``, the functions of ops/linear. A dynamically quantized Linear,
    whose output PyTorch gives no gradient by x, has that of its dequantized weight; raises ValueError where such a
    one is hidden in ``module`` and x requires a gradient."""
    if ops is not None and is_plain(module, bias=True):
        plain: Any = module
        return ops.linear(x, plain.weight, bias=plain.bias)
    if type(module) is nn.Linear or not (torch.is_grad_enabled() and x.requires_grad):
        return module(x)
    if not _quantized(module):
        if any([_quantized(m) for m in module.modules()]):
            raise ValueError(f"a quantized Linear inside a {type(module).__name__} has no gradient by its input, "
                             "expected it in place of a projection itself, or no gradient to be asked for")
        return module(x)
    weight: Any = module.weight  # a method
    with torch.no_grad():
        y = module(x)
    return Pullback.apply(x, y, lambda dy: dy @ weight().dequantize().to(dy.dtype))


def _quantized(module: nn.Module) -> bool:
    """Its weight is a method."""
    return ismethod(getattr(module, "weight", None))


def effective_weight(module: nn.Module, size: int) -> Tensor:
    """[out, size], differentiable: the (possibly parametrized) weight of an ``nn.Linear`` without hooks, or
    what anything else, such as a Linear with adapters, makes of the unit vectors. Raises ValueError where
    that is no linear map, as with a bias."""
    if isinstance(module, nn.Linear) and not is_hooked(module):
        return module.weight
    like = placement(module)
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    if torch.any(module(torch.zeros_like(eye[:1]))):
        raise ValueError(f"effective_weight: a {type(module).__name__} maps 0 to something else, expected a linear "
                         "map without a bias")
    return module(eye).mT


def token_vectors(embed: nn.Module, size: int, scale: float = 1.0) -> Tensor:
    """[size, d]: what an embedding has for each token id, differentiable. The (possibly parametrized) weight
    of an ``nn.Embedding``; what anything else, such as an embedding with adapters, answers for every id,
    without the ``scale`` of a ``ScaledEmbedding`` inside.
    Hooks act on what is read, and take no part."""
    if isinstance(embed, nn.Embedding):
        return embed.weight
    vectors = embed.forward(torch.arange(size, device=placement(embed).device))
    if scale != 1:
        vectors = vectors / torch.full((), scale, dtype=vectors.dtype, device=vectors.device)
    return vectors


def tensors_of(level: nn.Module) -> dict[str, Tensor]:
    """name -> tensor of a ``CMSLevel``, as whatever parametrizes or wraps it has it. Adapters that change
    parameters for the time of a call only (PEFT's ``target_parameters``) are asked by a call."""
    if isinstance(level, CMSLevel):
        return level.parameters_by_name()
    return level(None, lambda _, parameters: dict(parameters))


@torch.no_grad()
def write_weight(where: str, module: nn.Module, name: str, value: Tensor, keep: bool = True) -> None:
    """Makes ``value`` what ``module`` has under ``name``: in place, or through ``right_inverse`` where it is
    parametrized. keep=False only tries. Raises ValueError, and then has changed nothing, where ``module`` is
    a wrapper or its parametrization cannot express ``value`` to rounding (32 eps of its largest number)."""
    plain = module._parameters.get(name)
    if plain is not None:
        if keep:
            plain.copy_(value)
        return
    if not is_parametrized(module, name):
        raise ValueError(f"{where}: {name} belongs to a {type(module).__name__}, expected a module of its own "
                         "parameters: merge or remove what wraps it first")
    parametrizations: Any = module.parametrizations
    parts = parametrizations[name]
    before = [(t, t.detach(), t.clone()) for t in chain(parts.parameters(), parts.buffers())]
    reason, dtype = None, getattr(module, name).dtype
    try:
        setattr(module, name, value.to(dtype, copy=True))
        error, largest = (float(t.abs().max()) for t in (getattr(module, name) - value, value))
        if not error <= 32 * torch.finfo(dtype).eps * largest:
            reason = f"it makes something else of the new value, off by {error:.1e}"
    except (RuntimeError, NotImplementedError, ValueError) as raised:
        reason = str(raised)
    if reason is not None or not keep:
        for t, storage, values in before:  # ``right_inverse`` may have exchanged the storage
            t.set_(storage)
            t.copy_(values)
    if reason is not None:
        raise ValueError(
            f"{where}: {name} is parametrized and cannot be set ({reason}); remove the parametrization first"
        )
