"""RoPE: at what rates the pairs of a head turn, and the turning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import HopeConfig


def rope_rates(config: HopeConfig) -> Tensor:
    """[D/2], radians per token of every pair, in ``config.rope_dtype`` on the CPU, with
    ``config.rope_scaling`` applied.

    rate_i = theta^(-2i/D); llama3 blends by s = (turns - low) / (high - low), turns = context / wavelength.
    """
    D, (theta, scaling) = config.head_width, config.rope
    pairs = torch.arange(0, D, 2, dtype=getattr(torch, config.rope_dtype), device="cpu")
    rates = 1.0 / theta ** (pairs / D)
    if scaling is None:
        return rates
    slow = rates / scaling.factor
    if scaling.rope_type == "linear":
        return slow
    context, low, high = scaling.llama3
    length = 2 * math.pi / rates
    share = (context / length - low) / (high - low)
    blend = (1 - share) * rates / scaling.factor + share * rates
    return torch.where(length > context / low, slow, torch.where(length < context / high, rates, blend))


def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on t [B, T, H, D]: pairs (i, i + D/2) turned by the token's angle i."""
    a, b = t.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(t.dtype)
