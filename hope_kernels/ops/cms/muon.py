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
    weight in the input dtype. ops: the backend; where processes have a part of the matrix each, along ``dim``, every
    one makes the whole step and takes its part of it."""
    grad, across = total if len(rows) == len(total) else total[rows], getattr(ops, "across", None)
    if across is not None:
        grad = torch.cat(tuple(across.parts(grad)), dim)
    scale = step_size(lr, *grad.shape[1:])
    step = ops.newton_schulz(grad, narrow=copy is not None)
    step = step if across is None else across.own(step, dim)
    for b, found in zip(rows, step):
        total[b].copy_(found)
    ops.refresh_(weight, copy, None, None, rows, scale, total=total)


def step_size(lr: float, r: int, c: int) -> float:
    """What the orthogonalised gradient [r, c] is multiplied by."""
    return lr * RMS * math.sqrt(max(r, c))
