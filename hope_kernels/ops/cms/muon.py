"""Muon's step: theta <- theta - lr 0.2 sqrt(max(r, c)) NS(g), the orthogonalised gradient without momentum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RMS = 0.2  # about, of the elements of a step of rate 1: what Adam's steps have


def muon_step_(
    weight: Tensor, copy: Tensor | None, total: Tensor, rows: list[int], lr: float, ops, dim: int = 1
) -> None:
    """In place in ``rows`` of weight and total [B, r, c], master dtype: g is total, which becomes zero. copy:
    weight in the input dtype. ops: the backend's ``newton_schulz``; where processes have a part of the matrix each,
    along ``dim``, every one makes the whole step and takes its part of it."""
    grad, across = total if len(rows) == len(total) else total[rows], getattr(ops, "across", None)
    if across is not None:
        grad = torch.cat(tuple(across.parts(grad)), dim)
    scale = lr * RMS * math.sqrt(max(grad.shape[1:]))
    step = ops.newton_schulz(grad, narrow=copy is not None)
    step = step if across is None else across.own(step, dim)
    for b, found in zip(rows, step):
        weight[b].sub_(found, alpha=scale)
        total[b].zero_()
        if copy is not None:
            copy[b].copy_(weight[b])
