"""What a sequence learns of a matrix as a product of two thin ones: W_b = W + L_b S.

    S [rank, c]     fixed: random signs / sqrt(rank), the same for all sequences and all matrices with one input
    L_b [r, rank]   learned; zero at the start

The gradient of L is dL/dW S^T, so the factors (E, A) of a segment become (E, A S^T), and all that a level does
with a matrix [r, c] it does with L in its place. Up and gate share their input, and so their S.

What a rate means stays what it is without ``rank``. A step of gradient descent on L moves W by -lr dL/dW S^T S,
and S^T S is the identity on average over the signs. A step D of L of a given size, as relative rates and Adam
take it, moves W by D S: an element of D S sums up ``rank`` elements of D with signs, over sqrt(rank), so the RMS
of D S is that of D (times sqrt(1 + rank / c) at most, since D is made of what S lets through). For the text that
it is made of, such a step does less than one on the whole matrix, where all c elements of an output follow the
input. A rate up to sqrt(c / rank) times as large makes up for that, and moves W as much further.

S is a function of rank, c, the level and the input alone: signs are a hash of their row and column, no random
generator is asked, and every device, dtype and version of PyTorch has the same bits. Nobody saves S.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...config import CMSConfig
from ...tracing import constant_result
from .level import Factors
from .schedule import matrices
from .state import CMSState

_SALT, _MASK = 0x484F5045, 0xFFFFFFFF  # of everything that is hashed; 32 bits


def signs(config: CMSConfig, l: int, name: str, like: Tensor) -> Tensor:
    """S [rank, c] of the matrix ``name`` of level ``l``, in the dtype and on the device of ``like``."""
    assert config.rank is not None
    hidden = name == "down"
    width = config.hidden if hidden else config.d_model
    return _signs(config.rank, width, 2 * l + hidden, like.dtype, like.device)


@constant_result
@lru_cache(maxsize=256)
def _signs(rank: int, width: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        row = _hash(torch.arange(rank) ^ _hash(torch.tensor(_SALT + seed)))
        bits = _hash(torch.arange(width) ^ row.unsqueeze(1)) & 1
        return ((1 - 2 * bits).to(torch.float64) / rank**0.5).to(device=device, dtype=dtype)


def _hash(x: Tensor) -> Tensor:
    """Of 32-bit integers in int64 (the function lowbias32)."""
    for multiplier, shift in ((0x7FEB352D, 16), (0x846CA68B, 15)):
        x = (x ^ (x >> shift)) * multiplier & _MASK
    return x ^ (x >> 16)


def projected(config: CMSConfig, l: int, factors: Factors) -> Factors:
    """(E, A S^T) for (E, A), by the name of the matrix."""
    done: dict[int, Tensor] = {}  # by input: up and gate have one
    for name, (_, right) in factors.items():
        if id(right) not in done:
            done[id(right)] = right @ signs(config, l, name, right).mT
    return {name: (left, done[id(right)]) for name, (left, right) in factors.items()}


def projected_gradients(config: CMSConfig, l: int, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """dL/dL [B, r, rank] from dL/dW [B, r, c]."""
    return {n: g @ signs(config, l, n, g).mT for n, g in grads.items()}


def nothing(config: CMSConfig, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """L as a sequence starts with it, for the matrices [r, c] of ``like``: zero [r, rank], without memory."""
    return {n: t.new_zeros(()).expand(t.shape[0], config.rank or 0) for n, t in like.items()}


def rebase(draft: CMSState, l: int, row: int, others: list[int]) -> None:
    """W becomes W + L_row S, and ``others``, which have an L of their own, keep their W_b: L_b - L_row."""
    copies = {} if draft.copies[l] is None else draft.writable("copies", l)
    weights = draft.writable("weights", l)
    for name in matrices(draft.config):
        for b in others:
            weights[name][b].sub_(weights[name][row])
            if name in copies:
                copies[name][b].copy_(weights[name][b])
