"""Muon's step: theta <- theta - lr 0.2 sqrt(max(r, c)) NS(g), the orthogonalised gradient without momentum."""

from __future__ import annotations

import math

from torch import Tensor

RMS = 0.2  # about, of the elements of a step of rate 1: what Adam's steps have


def muon_step_(weight: Tensor, copy: Tensor | None, total: Tensor, rows: list[int], lr: float, ops) -> None:
    """In place in ``rows`` of weight and total [B, r, c], master dtype: g is total, which becomes zero. copy:
    weight in the input dtype. ops: the backend's ``newton_schulz``."""
    scale = lr * RMS * math.sqrt(max(weight.shape[1:]))
    step = ops.newton_schulz(total if len(rows) == len(total) else total[rows], narrow=copy is not None)
    for b, found in zip(rows, step):
        weight[b].sub_(found, alpha=scale)
        total[b].zero_()
        if copy is not None:
            copy[b].copy_(weight[b])
