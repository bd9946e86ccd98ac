"""One block of a HOPE model: a mixer over time on a residual stream, then the Continuum Memory System."""

from __future__ import annotations

from torch import nn

from ..config import CMSConfig, HopeConfig
from .attention import CausalAttention
from .cms import ContinuumMemory
from .titans import SelfModifyingTitans


class _Block(nn.Module):
    """h = x + mixer(norm(x)), then h through the levels of the CMS (each with its own residual). No CMS: h."""

    def __init__(self, config: HopeConfig, cms: CMSConfig | None, mixer: nn.Module, device=None, dtype=None):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps, device=device, dtype=dtype)
        self.mixer = mixer
        self.cms = ContinuumMemory(cms, config.norm_eps, device, dtype) if cms is not None else None


class HopeBlock(_Block):
    """Self-modifying Titans (or, with ``self_modifying=False``, a Titans LMM) and a CMS (Nested Learning section 8.3)."""

    def __init__(self, config: HopeConfig, cms: CMSConfig | None, device=None, dtype=None):
        super().__init__(config, cms, SelfModifyingTitans(config.titans, device=device, dtype=dtype), device, dtype)


class HopeAttentionBlock(_Block):
    """Causal softmax attention in place of the memory (HOPE-Attention)."""

    def __init__(self, config: HopeConfig, cms: CMSConfig | None, device=None, dtype=None):
        super().__init__(config, cms, CausalAttention(config, device=device, dtype=dtype), device, dtype)
