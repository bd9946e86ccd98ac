"""Rates that count in the size of a matrix, the RMS of its initial weights (``CMSConfig.relative``).

A step of rate 1 is then as large as the matrix: Adam's elements have about RMS 1 as they are, Muon's 0.2, and
gradients of gd and momentum are normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import CMSConfig
from .muon import RMS

TINY = 1e-30  # gradients of this size or below count as zero


def rate(config: CMSConfig, l: int, name: str, size: float | None) -> float:
    """What level ``l`` multiplies the steps of its matrix ``name`` by, which is of this size; absolute rates need
    no size. Where rates are learned, the size that a layer says is the rate times the size."""
    lr = 1.0 if config.lr == "learned" else config.matrix_rates(l)[name]
    if not config.relative:
        return lr
    assert size is not None
    return lr * size / RMS if config.optimizer == "muon" else lr * size


def normalises(config: CMSConfig) -> bool:
    """Whether a step asks for the RMS of its gradient, which must therefore be formed."""
    return bool(config.relative) and config.optimizer in ("gd", "momentum")


def normalise_(total: Tensor, rows: list[int], ops) -> None:
    """Gradients [B, r, c] of RMS 1 in ``rows``, in place. ops: the backend, or what it has of its own for this; where
    processes have a part of the matrix each, the RMS is that of all."""
    if hasattr(ops, "normalise_"):
        ops.normalise_(total, rows)
        return
    means, across = [total[b].square().mean() for b in rows], getattr(ops, "across", None)
    if across is not None:
        means = (across.sum(torch.stack(means)) / across.size).unbind()
    for b, mean in zip(rows, means):
        total[b].div_(mean.sqrt().clamp(min=TINY))
