"""Drawing the next token from logits: temperature, top-k, top-p, and random numbers that belong to a place in
a text."""

from __future__ import annotations

import ctypes
import hashlib
import math

import torch
from torch import Tensor

from ..ops.shared import cpu_library
from ..ops.shared.cpu_library import POINTER, SIZE

_NONE = -1  # in the place of a token where logits are no distribution
_in_cpp = cpu_library.Function(
    "hope_draw", "generate", SIZE, SIZE, SIZE, POINTER, ctypes.c_double, SIZE, ctypes.c_double, POINTER, POINTER
)


def uniform(seed: int, row: int, pos: int) -> float:
    """A number in [0, 1), the same for the same three integers of any size and sign, and else as good as
    independent."""
    digest = hashlib.blake2b(f"{seed:x} {row:x} {pos:x}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, seed: int, pos: list[int]
) -> list[int]:
    """One token per row of logits [B, vocab].

    temperature 0: the likeliest, of equals the one with the lowest id. Else a draw from softmax(logits /
    temperature) with ``uniform(seed, row, pos[row])``, among the top_k likeliest tokens (exactly so many, of
    equals the lowest ids) and of these among the likeliest whose mass reaches top_p. Tokens at -inf are never
    drawn; tokens at +inf share everything.
    Raises ValueError for a row with NaN or with all tokens at -inf.
    """
    if temperature == 0:
        top, likeliest = logits.max(-1)
        found = _where_some(top, likeliest)
    else:
        (B, V), numbers = logits.shape, [uniform(seed, b, t) for b, t in enumerate(pos)]
        if len(numbers) != B:
            raise ValueError(f"generate: {len(numbers)} positions, expected one per row ({B})")
        # both on the CPU and in float64, so that a session draws the same text on any device
        way = _drawn_in_cpp if cpu_library.unavailable() is None else _drawn
        found = way(logits, temperature, min(top_k or V, V), min(top_p or 1.0, 1.0), numbers)
    if _NONE in found:
        raise ValueError(
            f"generate: the logits of row {found.index(_NONE)} are no distribution (NaN, or -inf everywhere)"
        )
    return found


def _where_some(top: Tensor, tokens: Tensor) -> list[int]:
    """tokens [B]; top [B]: the largest logits of the rows, NaN where they have one."""
    pairs = zip(top.tolist(), tokens.tolist())
    return [_NONE if math.isnan(most) or most == -math.inf else token for most, token in pairs]


def _drawn_in_cpp(
    logits: Tensor, temperature: float, top_k: int, top_p: float, numbers: list[float]
) -> list[int]:
    """``_drawn`` in one call of the library (csrc/cpu/draw.cpp), which sorts the likeliest tokens alone."""
    narrow, (B, V) = logits.is_cpu and logits.dtype is torch.float32, logits.shape
    values = (logits if narrow else logits.to("cpu", torch.float64)).contiguous()
    u, tokens = (ctypes.c_double * B)(*numbers), (ctypes.c_int64 * B)()
    _in_cpp(
        B, V, not narrow, values.data_ptr(), temperature, top_k, top_p, ctypes.addressof(u), ctypes.addressof(tokens)
    )
    return list(tokens)


def _drawn(logits: Tensor, temperature: float, top_k: int, top_p: float, numbers: list[float]) -> list[int]:
    """A token per row of logits [B, vocab]; ``_NONE`` where they are no distribution. numbers: where the draws fall.
    The yardstick of the C++: a token differs where a draw falls between their roundings."""
    values, order = logits.to("cpu", torch.float64), None
    top = values.amax(-1, keepdim=True)
    if top_k < values.shape[-1] or top_p < 1:
        values, order = values.sort(dim=-1, descending=True, stable=True)
    scaled = _scaled(values, top, temperature)
    if order is not None:
        scaled[:, top_k:] = -torch.inf
        if top_p < 1:
            p = scaled.softmax(-1)
            scaled.masked_fill_(p.cumsum(-1).sub_(p) >= top_p, -torch.inf)
        scaled = torch.empty_like(scaled).scatter_(-1, order, scaled)
    mass = scaled.softmax(-1).cumsum(-1)
    # below the total whatever the product rounds to: the token found always has a mass
    targets = [
        [min(u * total, math.nextafter(total, 0))] for u, total in zip(numbers, mass[:, -1].tolist())
    ]
    found = torch.searchsorted(mass, torch.tensor(targets, dtype=torch.float64, device="cpu"), right=True)
    return _where_some(top.squeeze(-1), found.squeeze(-1))


def _scaled(values: Tensor, top: Tensor, temperature: float) -> Tensor:
    """(values - top) / temperature. The likeliest are at 0 even where they are infinite or the temperature's
    reciprocal is; what is infinitely less likely stays so where the temperature is infinite."""
    scaled = (values - top).div_(temperature)
    if 0 < 1 / temperature < math.inf and max(top.flatten().tolist()) < math.inf:
        return scaled
    return torch.where(values == top, 0.0, torch.where(values - top == -torch.inf, -torch.inf, scaled))
