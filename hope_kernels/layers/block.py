"""One block of a HOPE model: a mixer over time on a residual stream, then the Continuum Memory System."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from ..backend import Request, gradient
from ..config import CMSConfig, HopeConfig
from ..ops.cms.level import Level
from ..ops.cms.state import CMSState
from ..ops.linear.backends import resolve
from .attention import CausalAttention
from .cms import ContinuumMemory, Inner
from .norm import rms_normed
from .recording import check_block_recorded
from .titans import SelfModifyingTitans
from .wrapped import normed


class Block(nn.Module):
    """h = x + mixer(norm(x)), then h through the levels of the CMS (each with its own residual). No CMS: h.
    ``post_norm``: the mixer's output is normed too."""

    def __init__(
        self, config: HopeConfig, cms: CMSConfig | None, mixer: SelfModifyingTitans | CausalAttention, device=None,
        dtype=None,
    ):
        super().__init__()
        self.config = config
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps, device=device, dtype=dtype)
        norm = nn.RMSNorm(config.d_model, eps=config.norm_eps, device=device, dtype=dtype)
        self.post_norm = norm if config.post_norm else None
        self.mixer = mixer
        self.cms = ContinuumMemory(cms, config.norm_eps, device, dtype) if cms is not None else None

    def forward(
        self, h: Tensor, mixer, cms: CMSState | list[Level] | None, lengths: list[int], backend: str | None = None,
        inner: Inner | None = None,
    ) -> tuple[Tensor, object]:
        """One reading of h [B, T, d_model], a function of its arguments: (h, the mixer's new state).

        mixer: the mixer's state.  cms: the state of the CMS, whose weights are read and not learned, or its
        levels as ``ContinuumMemory.effective_levels`` gives them; None without a CMS.  lengths: tokens of
        each row that count.  inner: the pass that learns, in which fast weights are constants of the graph
        and the CMS levels hand their factors to ``inner.sink``.
        Every parameter is taken inside this call and through the submodules' own, so hooks, wrappers and
        sharding of a block, its mixer, its CMS and the levels of that see one call per reading; a segment
        that is replayed to be learned, or to be checkpointed, is read once more. Raises ValueError under
        reentrant activation checkpointing.
        """
        check_block_recorded(type(self).__name__, h, inner is not None)
        if h.dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling():
            # a wrapper that casts what a block is given (FSDP's mixed precision) rounds masters too
            mixer.validate(type(self).__name__, h.dtype, h.device)
        gate = None if inner is None else inner.gate
        with torch.set_grad_enabled(torch.is_grad_enabled() and (h.requires_grad or inner is None or gate is not None)):
            ops = resolve(Request(self.config, h.dtype, h.device, gradient(False)), backend)
            # attention's bits are those of the model it was converted from
            train = inner is None and torch.is_grad_enabled() and self.config.mixer != "attention"
            y, mixer = self.mixer(
                rms_normed(self.norm, h, backend) if train else normed(self.norm, h, ops), mixer, lengths,
                backend=backend, functional=True, constant_memory=inner is not None if gate is None else gate
            )
            h = self.joined(h, y, ops)
        inner = inner if gate is None else None  # the levels are given, and read as in any graph
        if self.cms is not None:
            h, _ = self.cms(h, cms, lengths, backend=backend, functional=True, inner=inner)
        return h, mixer

    def joined(self, h: Tensor, y: Tensor, ops: ModuleType) -> Tensor:
        """The residual stream after the mixer, of the stream before it and the mixer's output; ops: of ops/linear."""
        return h + (y if self.post_norm is None else normed(self.post_norm, y, ops))


class HopeBlock(Block):
    """Self-modifying Titans (or, with ``self_modifying=False``, a Titans LMM) and a CMS (Nested Learning
    section 8.3)."""

    def __init__(self, config: HopeConfig, cms: CMSConfig | None, device=None, dtype=None):
        assert config.titans is not None  # but for attention, every configuration has one
        super().__init__(config, cms, SelfModifyingTitans(config.titans, device=device, dtype=dtype), device, dtype)


class HopeAttentionBlock(Block):
    """Causal softmax attention in place of the memory (HOPE-Attention)."""

    def __init__(self, config: HopeConfig, cms: CMSConfig | None, device=None, dtype=None):
        super().__init__(config, cms, CausalAttention(config, device=device, dtype=dtype), device, dtype)
