"""Small models in both libraries, and texts for them."""

from __future__ import annotations

import torch
from small_model import V, tiny

MIXERS = ("self_modifying", "attention")
LEARN = ("off", "next_token")


def pair(mixer: str = "self_modifying", **options):
    """(ours, the same as a model of transformers), fp32."""
    from hope_kernels.hf import HopeForCausalLM

    ours = tiny(mixer, **options).float()
    return ours, HopeForCausalLM.wrap(ours)


def text(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def ragged(lengths: list[int], side: str = "left", seed: int = 0):
    """(rows, ids [B, T] with padding on ``side``, attention_mask)."""
    rows, width = [text(1, n, seed + i)[0] for i, n in enumerate(lengths)], max(lengths)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[b, place], mask[b, place] = row, 1
    return rows, ids, mask
