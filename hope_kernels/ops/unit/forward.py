"""Unit vectors in PyTorch: any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def l2norm(x: Tensor, dim: int = -1) -> Tensor:
    """x / max(|x|_2, 1e-6) over ``dim``."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(EPS)
