"""A projection, and the norm before it, in PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: x [.., K], weight [R, K] -> [.., R]."""
    return F.linear(x, weight)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain, the mean over the last dimension d; gain [d]."""
    return F.rms_norm(x, gain.shape, gain, eps)
