"""Attention on the C++ backend (csrc/cpu/attention_run.h): fp32 on the CPU, no graph: call under no_grad.

What a query computes is bit-identical in any company, however the text before it was cut into calls, and whatever
the cache has dropped; PyTorch's takes other blocks of keys, and other orders of sums, for other shapes.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...config import HopeConfig
from ..linear.cpp import unserved, unserved_unasked
from ..shared.cpu_library import POINTER, REAL, SIZE, Function, address, is_plain, row_array
from . import forward

__all__ = ["attend", "unserved", "unserved_unasked"]


class AttentionCall(ctypes.Structure):
    """``AttentionCall`` of csrc/cpu/attention.h."""

    _fields_ = [
        *((n, SIZE) for n in ("B", "T", "H", "Hkv", "D", "slots", "window", "sinks", "threads")), ("scale", REAL),
        *((n, POINTER) for n in ("q", "far", "k", "v", "used", "base", "len", "y", "most", "sum")),
    ]


_attention = Function("hope_attention", "attention", POINTER)


def attend(
    config: HopeConfig, q: Tensor, k: Tensor, v: Tensor, used: list[int], lengths: list[int], base: list[int],
    far: Tensor | None = None
) -> Tensor:
    """``forward.attend``, which it is for tensors of another dtype or class; zero after the first lengths[b] outputs.
    Raises ValueError for tensors, lengths and counts that do not fit each other."""
    if not is_plain(q, k, v, far):
        return forward.attend(config, q, k, v, used, lengths, base, far)
    (B, T, H, D), (_, slots, kv_heads, _), (window, sinks) = q.shape, k.shape, config.sight
    q, k, v, far = q.contiguous(), k.contiguous(), v.contiguous(), None if far is None else far.contiguous()
    y, queries, keys = torch.empty_like(q), B * T * H * D, B * slots * kv_heads * D
    rows = [row_array(of, B) for of in (used, base, lengths)]
    scale = D**-0.5 if config.attention_scale is None else config.attention_scale
    call = AttentionCall(
        B, T, H, kv_heads, D, slots, window or 0, sinks, torch.get_num_threads(), scale,
        address(q, queries, "q"), address(far, queries, "far"), address(k, keys, "k"), address(v, keys, "v"),
        *map(ctypes.addressof, rows), address(y, queries),
    )
    _attention(ctypes.addressof(call))
    return y
