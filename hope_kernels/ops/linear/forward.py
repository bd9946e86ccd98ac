"""A projection, the norm before it, and the gate of what it makes, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: x [.., K], weight [R, K], bias [R] -> [.., R]."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain, the mean over the last dimension d; gain [d]."""
    return F.rms_norm(x, gain.shape, gain, eps)


def gate(raw: Tensor, bias: Tensor | float, softplus: bool = False, scale: float = 1.0) -> Tensor:
    """scale * sigmoid(raw + bias), or scale * log(1 + exp(raw + bias)): raw [B, T, H], bias [H]."""
    raw = raw + bias
    # softplus turns linear at its threshold: 20, the default, is an error of 2e-9 there
    return scale * (F.softplus(raw, threshold=40) if softplus else torch.sigmoid(raw))
