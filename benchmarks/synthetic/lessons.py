"""Lessons that attention takes before it is asked for what it has read once: pairs (key, value) told again and again.

Two layers of attention find a value by its key only once one of them looks back by a token and the other one looks for
what the first has found, and neither is worth anything alone. Asked for four pairs among noise, attention stays for
thousands of steps where it knows which values were told, but not to which keys. So it first reads sequences without
noise, of a few keys, where every telling after a pair's first is a question, and only values are answers. Keys are of
few kinds at first, of twice as many whenever the smoothed loss falls below LEARNED.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_kernels import HopeForCausalLM

PAIRS, KEYS = 24, 4  # of a sequence: tellings, and keys that they are of
ROWS, RATE, WARM = 32, 3e-3, 80  # sequences of a step; the rate, and the steps that it rises in
LEARNED, MOST = 0.15, 4000  # nats; steps after which there are no more lessons
NONE = -100  # no answer


def lesson(rows: int, keys: Tensor, values: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [rows, PAIRS (W + 1)] int64 for ``keys`` [N, W] and ``values`` [V], ids of which they are made; answers of
    the same shape: which of ``values`` follows a token, or NONE."""
    kinds = torch.rand(rows, len(keys), generator=g).argsort(1)[:, :KEYS]
    told = torch.randint(0, len(values), (rows, KEYS), generator=g)
    which = torch.randint(0, KEYS, (rows, PAIRS), generator=g)
    again = (which[:, :, None] == which[:, None]).tril(-1).any(-1)
    value = told.gather(1, which)
    ids = torch.cat([keys[kinds.gather(1, which)], values[value][..., None]], -1)
    answers = torch.full_like(ids, NONE)
    answers[..., -2] = torch.where(again, value, NONE)
    return ids.flatten(1), answers.flatten(1)


def teach(model: HopeForCausalLM, keys: Tensor, values: Tensor, seed: int) -> int:
    """Trains the model until it knows a value by its key among all ``keys``, or for MOST steps. Returns the steps."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    kinds, smooth = KEYS, math.inf
    for step in range(MOST):
        ids, answers = lesson(ROWS, keys[:kinds], values, g)
        loss = F.cross_entropy(model(ids)[0][..., values].flatten(0, 1), answers.flatten(), ignore_index=NONE)
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARM)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if smooth == math.inf else 0.9 * smooth + 0.1 * loss.item()
        if smooth < LEARNED:
            if kinds >= len(keys):
                return step + 1
            kinds, smooth = 2 * kinds, math.inf
    return MOST
