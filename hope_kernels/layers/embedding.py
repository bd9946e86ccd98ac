"""An embedding whose vectors are scaled as they are read."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """``scale * weight[ids]``, the scale rounded to the weight's dtype first, as Gemma has it. ``weight`` itself
    is what a tied head multiplies by."""

    def __init__(self, size: int, width: int, scale: float, device=None, dtype=None):
        super().__init__(size, width, device=device, dtype=dtype)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        h = super().forward(input)
        return h * torch.full((), self.scale, dtype=h.dtype, device=h.device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}"


def scaled(embedding: nn.Module, scale: float) -> nn.Module:
    """``embedding``, or where it is a plain one and ``scale`` is not 1 a ``ScaledEmbedding`` with its weight."""
    if scale == 1 or type(embedding) is not nn.Embedding:
        return embedding
    size, width = embedding.weight.shape
    found = ScaledEmbedding(size, width, scale, device="meta")
    found.weight = embedding.weight
    return found
