"""What a layer hands to its memories, and what it may ask them to report."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .state import MaybeTensor


class TokenInputs(NamedTuple):
    """What a layer computes statically from its input, per token and head.

    q [B, T, H, D], normalised (None with adaptive_q); x [B, T, H, D]: the memories' input (self_modifying),
    or k, v [B, T, H, D] and eta, alpha [B, T, H] themselves; beta [B, T, H] with momentum; eta_bias,
    alpha_bias [H] for self_modifying.
    """

    q: MaybeTensor
    x: MaybeTensor = None
    k: MaybeTensor = None
    v: MaybeTensor = None
    eta: MaybeTensor = None
    alpha: MaybeTensor = None
    beta: MaybeTensor = None
    eta_bias: MaybeTensor = None
    alpha_bias: MaybeTensor = None


class Stats(NamedTuple):
    """What a call may report of its commits: S [G, M, C] of the step clip and alpha [G, C]."""

    S: list[Tensor]
    alpha: list[Tensor]
