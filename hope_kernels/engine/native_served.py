"""Which models are read in C++ as a whole, by a decoder's step (``native.py``) and in segments (``native_segment.py``):
those whose modules are what they are by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backend import NO_GRADIENT, Request
from ..config import CMSConfig, HopeConfig
from ..layers.attention import CausalAttention
from ..layers.block import HopeAttentionBlock, HopeBlock
from ..layers.cms import ContinuumMemory
from ..layers.cms_level import CMSLevel
from ..layers.embedding import ScaledEmbedding
from ..layers.titans import SelfModifyingTitans
from ..layers.wrapped import is_hooked, is_plain
from ..ops.cms import cpp as cms_cpp
from ..ops.cms import cpp_gated
from ..ops.linear import cpp as linear_cpp
from ..ops.shared import cpu_library
from ..ops.titans import cpp as titans_cpp
from .protocol import Model

_PLAIN = (nn.Embedding, ScaledEmbedding, nn.RMSNorm, nn.Linear, nn.ModuleList, nn.ModuleDict, HopeBlock,
          HopeAttentionBlock, ContinuumMemory, CMSLevel, SelfModifyingTitans, CausalAttention)


def unserved(model: Model, backend: str | None, learning: bool) -> str | None:
    """Why steps and segments of ``model`` are not read in C++, or None. learning: what is read is learned, by which
    levels are C++ unasked that without it are PyTorch's."""
    if backend not in (None, "cpp"):
        return f"backend is {backend!r}"
    config, like = model.config, getattr(model.embed, "weight", None)
    if not isinstance(like, Tensor) or model.parallel is not None:
        return "its weights are not its own"
    if not model.plain:
        return "the model is another class, or hooked"
    return (
        cpu_library.unavailable() or _config_unserved(config) or _placement_unserved(config, like, backend, learning)
        or _modules_unserved(model)
    )


def _config_unserved(config: HopeConfig) -> str | None:
    if config.d_model % 8:
        return f"serves widths that are multiples of 8, not {config.d_model}"
    reason = _attention_unserved(config) if config.mixer == "attention" else None
    for cms in config.block_cms:
        reason = reason or (None if cms is None else _cms_unserved(cms))
    return reason


def _attention_unserved(config: HopeConfig) -> str | None:
    if config.qk_norm and config.head_width % 8:
        return f"serves norms of heads whose widths are multiples of 8, not {config.head_width}"
    return None


def _cms_unserved(cms: CMSConfig) -> str | None:
    if cms.rank is not None and cms.rank % 8:
        return f"serves ranks that are multiples of 8, not {cms.rank}"
    return None


def _placement_unserved(config: HopeConfig, like: Tensor, backend: str | None, learning: bool) -> str | None:
    """As the choices of ops/ are made for a call of the model."""
    if config.mixer == "attention":
        asks = linear_cpp.unserved if backend == "cpp" else linear_cpp.unserved_unasked
        reason = asks(Request(config, like.dtype, like.device, NO_GRADIENT))
    else:
        assert config.titans is not None
        reason = titans_cpp.unserved(Request(config.titans, like.dtype, like.device, NO_GRADIENT))
    for cms in config.block_cms:
        if reason is None and cms is not None:
            reason = cms_cpp.unserved(cms, like.dtype, like.device)
            if reason is not None and (learning or backend == "cpp"):
                reason = cpp_gated.unserved(cms, like.dtype, like.device)
    return reason


def _modules_unserved(model: Any) -> str | None:
    for name, module in model.named_modules():
        if module is model:
            continue
        added = model.config.mixer == "attention" and name.endswith((".q_proj", ".k_proj", ".v_proj"))
        plain = type(module) is not nn.Linear or is_plain(module, bias=added)
        if type(module) not in _PLAIN or is_hooked(module) or not plain:
            return f"{name}, a {type(module).__name__}, is wrapped, hooked or another module"
        if isinstance(module, nn.RMSNorm) and (module.weight is None or module.eps != model.config.norm_eps):
            return f"{name} is another norm than the configuration's"
        if isinstance(module, ContinuumMemory) and module.norm_eps != model.config.norm_eps:
            return f"{name} has other norms than the configuration's"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return f"{name} changes its weights as it is read"
        for p in module._parameters.values():
            if p is not None and not _plain(p):
                return f"{name} has a weight that is no plain tensor of fp32"
    return None


def _plain(p: Tensor) -> bool:
    return type(p.data) is Tensor and p.dtype == torch.float32 and p.is_contiguous() and not p.is_inference()
