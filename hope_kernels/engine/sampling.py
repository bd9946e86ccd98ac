"""Drawing the next token from logits: temperature, top-k, top-p, and random numbers that belong to a place in
a text."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def uniform(seed: int, row: int, pos: int) -> float:
    """A number in [0, 1), the same for the same three integers of any size and sign, and else as good as
    independent."""
    digest = hashlib.blake2b(f"{seed:x} {row:x} {pos:x}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, seed: int, pos: list[int]
) -> Tensor:
    """One token per row, [B] int64 on the device of logits [B, vocab].

    temperature 0: the likeliest, of equals the one with the lowest id. Else a draw from softmax(logits /
    temperature) with ``uniform(seed, row, pos[row])``, among the top_k likeliest tokens (exactly so many, of
    equals the lowest ids) and of these among the likeliest whose mass reaches top_p. Tokens at -inf are never
    drawn; tokens at +inf share everything.
    Raises ValueError for a row with NaN or with all tokens at -inf.
    """
    top, likeliest = logits.max(-1, keepdim=True)  # NaN where a row has one
    bad = [math.isnan(value) or value == -math.inf for value in top.flatten().tolist()]
    if any(bad):
        raise ValueError(
            f"generate: the logits of row {bad.index(True)} are no distribution (NaN, or -inf everywhere)"
        )
    if temperature == 0:
        return likeliest.squeeze(-1)
    # on the CPU sums have one order, so that a session draws the same text again
    values, order = logits.to("cpu", torch.float64), None
    if top_k is not None or top_p is not None:
        values, order = values.sort(dim=-1, descending=True, stable=True)
    scaled = _scaled(values, top.to("cpu", torch.float64), temperature)
    if order is not None:
        if top_k is not None:
            scaled[:, top_k:] = -torch.inf
        if top_p is not None and top_p < 1:
            p = scaled.softmax(-1)
            scaled.masked_fill_(p.cumsum(-1).sub_(p) >= top_p, -torch.inf)
        scaled = torch.empty_like(scaled).scatter_(-1, order, scaled)
    mass = scaled.softmax(-1).cumsum(-1)
    totals = mass[:, -1].tolist()
    # below the total whatever the product rounds to: the token found always has a mass
    targets = [[min(uniform(seed, b, t) * total, math.nextafter(total, 0))] for b, (t, total) in
               enumerate(zip(pos, totals))]
    found = torch.searchsorted(mass, torch.tensor(targets, dtype=torch.float64, device="cpu"), right=True)
    return found.squeeze(-1).to(logits.device)


def _scaled(values: Tensor, top: Tensor, temperature: float) -> Tensor:
    """(values - top) / temperature. The likeliest are at 0 even where they are infinite or the temperature's
    reciprocal is; what is infinitely less likely stays so where the temperature is infinite."""
    scaled = (values - top).div_(temperature)
    if 0 < 1 / temperature < math.inf and max(top.flatten().tolist()) < math.inf:
        return scaled
    return torch.where(values == top, 0.0, torch.where(values - top == -torch.inf, -torch.inf, scaled))
