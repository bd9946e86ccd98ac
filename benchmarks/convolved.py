"""Attention behind the convolution that memories have before theirs, so that a comparison with them is not of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hope_kernels import HopeForCausalLM
from hope_kernels.layers.attention import AttentionState, CausalAttention


@dataclass(eq=False)
class ConvolvedState(AttentionState):
    """tail: [B, taps - 1, d_model], the inputs that the next token's convolution sees."""

    tail: Tensor = field(kw_only=True)

    INPUT_DTYPE = AttentionState.INPUT_DTYPE | {"tail"}

    def _take(self, new: Any) -> Any:
        self.tail = new.tail
        return super()._take(new)


class ConvolvedAttention(CausalAttention):
    """``CausalAttention`` of a causal depthwise convolution of its input, of ``taps`` tokens. Rows are all read
    whole."""

    def __init__(self, attention: CausalAttention, taps: int):
        super().__init__(attention.config)
        self.load_state_dict(attention.state_dict())
        self.conv = nn.Parameter(torch.empty(attention.config.d_model, taps))
        nn.init.uniform_(self.conv, -(taps**-0.5), taps**-0.5)

    def init_state(self, batch: int, device: Any = None, dtype: torch.dtype | None = None) -> AttentionState:
        s = super().init_state(batch, device, dtype)
        tail = s.k.new_zeros(batch, self.conv.shape[1] - 1, self.config.d_model)
        return ConvolvedState(s.pos, s.config, s.k, s.v, s.base, tail=tail, owner=self, parts=self.parts)

    def scan(self, x: Tensor, state: AttentionState, lengths: list[int], **how: Any) -> tuple[Tensor, AttentionState]:
        if min(lengths) < x.shape[1]:
            raise ValueError(f"ConvolvedAttention: argument lengths is {lengths}, expected {x.shape[1]} in every row")
        assert isinstance(state, ConvolvedState)
        seen = torch.cat([state.tail, x], 1)
        u = F.conv1d(seen.transpose(1, 2), self.conv[:, None], groups=len(self.conv)).transpose(1, 2)
        y, new = super().scan(u, state, lengths, **how)
        if new is state:
            return y, state
        return y, replace(new, tail=seen[:, x.shape[1] :])


def convolved(model: HopeForCausalLM, taps: int) -> HopeForCausalLM:
    """The model, its attention replaced."""
    for block in model.blocks:
        block.mixer = ConvolvedAttention(block.mixer, taps)
    return model
