"""Dreams: texts that a model's own weights write, read beside what is replayed so that all else stays.

A replay learns a few segments many times over, and what that does to other text nothing in them says. So the
model as it is without what it has learned writes some texts: a first token drawn evenly from the vocabulary, every
other one from the model's distribution (as LLM-QAT draws its data, arXiv 2305.17888, section 3.1). With each
replay some of them are read too, and beside the loss of the replayed tokens

    WEIGHT * (mean over the dreams' tokens of KL(own || learned))

is descended: the next token's distribution may change where the text asks for it, and not elsewhere (learning
without forgetting, arXiv 1606.09282; generative replay, arXiv 1705.08690). Nothing but the model is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kept import hashed
from ..layers.wrapped import placement
from .generation import generate
from .protocol import Model

LENGTH = 128  # tokens of a dream at most
SHARE = 0.5  # of a segment's tokens that are dreamt beside it, in whole dreams and at least one
WEIGHT = 1.0  # of a dream's mean divergence, against the mean loss of the replayed tokens


@dataclass(frozen=True)
class Dreams:
    """ids [D, n] int64; h [D, n, d]: what the blocks with the model's own weights make of them."""

    ids: Tensor
    h: Tensor

    def some(self, which: list[int]) -> Dreams:
        return Dreams(self.ids[which], self.h[which])


def beside_a_replay(segment: int) -> tuple[int, int]:
    """(dreams, tokens of each) that are read with a replay of a segment of so many tokens."""
    tokens = min(LENGTH, segment)
    return max(1, round(SHARE * segment / tokens)), tokens


@torch.no_grad()
def dream(model: Model, count: int, tokens: int, seed: tuple[int, ...], backend: str | None) -> Dreams:
    """``count`` dreams of ``tokens`` tokens each, the same ones for the same seed."""
    device, V = placement(model.embed).device, model.config.vocab_size
    ids = torch.tensor([[hashed(*seed, i) % V] for i in range(count)], device=device)
    if tokens > 1:
        new = generate(model, ids, tokens - 1, learn="off", temperature=1.0, seed=hashed(*seed), backend=backend).tokens
        ids = torch.cat([ids, new], 1)
    state = model.init_state(count, device)
    h, _ = model.run(model.embed(ids), state.mixers, state.cms, [tokens] * count, backend)
    return Dreams(ids, h)
