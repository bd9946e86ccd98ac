"""The end of a layer before its output projection, in PyTorch: norm per head, gain, gate; each may be off."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def output_gate_chunked(o: Tensor, gain: Tensor | None, gate: Tensor | None) -> Tensor:
    """y = (o / sqrt(mean(o^2) + 1e-6) * gain) * silu(gate), the mean over D. Returns [B, T, d], d = H D.

    o: [B, T, H, D], what the memory answered. gain: [H, D], or None for no norm. gate: [B, T, d], or None for
    no gate.
    """
    if gain is not None:
        o = F.rms_norm(o, (o.shape[-1],), eps=EPS) * gain
    o = o.flatten(2)
    return o if gate is None else o * F.silu(gate)
