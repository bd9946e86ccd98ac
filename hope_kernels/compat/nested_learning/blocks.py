"""The package's blocks on this engine's mixers: LayerNorm where it has them, and no residual around a
self-modifying memory."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import CMSConfig, HopeConfig
from ...layers.block import HopeAttentionBlock, HopeBlock


class SelfModBlock(HopeBlock):
    """h = titans(x), then h through the levels of the CMS."""

    def __init__(self, config: HopeConfig, cms: CMSConfig | None, device=None, dtype=None):
        super().__init__(config, cms, device, dtype)
        self.norm = nn.Identity()

    def joined(self, h: Tensor, y: Tensor, ops: ModuleType) -> Tensor:
        return y


class AttentionBlock(HopeAttentionBlock):
    """h = layernorm(x + attention(x)), then h through the levels of the CMS. Attention without positions."""

    def __init__(self, config: HopeConfig, cms: CMSConfig | None, device=None, dtype=None):
        super().__init__(config, cms, device, dtype)
        self.norm = nn.Identity()
        self.post_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps, device=device, dtype=dtype)
        rates: Any = self.mixer.rates
        self.mixer.rates = torch.zeros_like(rates)  # RoPE by the angle 0
        if config.qk_norm:
            self.mixer.q_norm, self.mixer.k_norm = UnitVectors(), UnitVectors()

    def joined(self, h: Tensor, y: Tensor, ops: ModuleType) -> Tensor:
        assert self.post_norm is not None
        return self.post_norm(h + y)


class UnitVectors(nn.Module):
    """x / max(|x|, 1e-6) over the last dimension: the package's norm of queries and keys."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-6)
