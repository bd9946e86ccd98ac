"""Which matrices learn, and which rows of a level are due at a boundary (Nested Learning eq 71-72)."""

from __future__ import annotations

from typing import NamedTuple

from ...config import CMSConfig


def matrices(config: CMSConfig) -> tuple[str, ...]:
    """Names of the matrices of one level: what a refresh may change."""
    return config.matrices


def hidden_dim(name: str) -> int:
    """Of a matrix [B, r, c], the dimension that runs over the hidden units."""
    return 2 if name == "down" else 1


def learning_levels(config: CMSConfig) -> list[int]:
    """Indices (level 1 is 0) of the levels with lr > 0; the others are never copied nor changed."""
    return [l for l, lr in enumerate(config.learning_rates) if lr > 0]


class Due(NamedTuple):
    """Rows of one level at a boundary. step: take an optimizer step.  reset: go back to the initial weights
    (nested; a refresh due at the same count is discarded).  wait: keep what they have accumulated."""

    step: list[int]
    reset: list[int]
    wait: list[int]


def due(config: CMSConfig, level: int, rows: list[int], counts: list[int] | None) -> Due:
    """For ``rows`` of the batch, which have read ``counts[b]`` tokens (None: nothing commits). A level with
    lr = 0 keeps its clock all the same."""
    if counts is None:
        return Due([], [], list(rows))
    now = [b for b in rows if counts[b] % config.chunks[level] == 0]
    above = config.chunks[level + 1] if config.variant == "nested" and level + 1 < config.num_levels else None
    reset = [b for b in now if above is not None and counts[b] % above == 0]
    return Due([b for b in now if b not in reset], reset, [b for b in rows if b not in now])
