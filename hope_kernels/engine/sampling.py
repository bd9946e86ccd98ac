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
    values, top = logits.to("cpu", torch.float64), top.to("cpu", torch.float64)
    scaled = (values - top) / temperature
    # the likeliest are at 0 even where they are infinite or the temperature's reciprocal is; -inf stays where
    # the temperature is infinite
    scaled = torch.where(values == top, 0.0, torch.where(values == -torch.inf, -torch.inf, scaled))
    if top_k is not None or top_p is not None:
        order = values.argsort(dim=-1, descending=True, stable=True)
        ranked = scaled.gather(-1, order)
        if top_k is not None:
            ranked[:, top_k:] = -torch.inf
        if top_p is not None and top_p < 1:
            p = ranked.softmax(-1)
            ranked = ranked.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
        scaled = torch.full_like(ranked, -torch.inf).scatter(-1, order, ranked)
    u = torch.tensor([[uniform(seed, row, t)] for row, t in enumerate(pos)], dtype=torch.float64, device="cpu")
    mass = scaled.softmax(-1).cumsum(-1)
    total = mass[:, -1:]
    # below the total whatever the product rounds to: the token found always has a mass
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return (mass <= target).sum(-1).to(logits.device)
