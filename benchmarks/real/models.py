"""The same weights under other settings."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from hope_kernels import HopeForCausalLM
from hope_kernels.model_state import ModelState

PIECE = 4096
LOG2 = 0.6931471805599453


def variant(model: HopeForCausalLM, cms: dict[str, Any] | None = None, **fields: Any) -> HopeForCausalLM:
    """A model on the tensors of ``model``, of which ``fields`` of the configuration, and ``cms`` of every
    block's levels, are others."""
    config, changed = model.config, dict(fields)
    if cms is not None:
        given = config.cms if isinstance(config.cms, tuple) else (config.cms,) * config.num_layers
        changed["cms"] = tuple(None if c is None else c.replace(**cms) for c in given)
    new = HopeForCausalLM(config.replace(**changed), device="meta", dtype=model.embed.weight.dtype)
    new.load_state_dict(model.state_dict(), assign=True)
    return new.eval()


@torch.no_grad()
def nats(
    model: HopeForCausalLM, ids: Tensor, learn: str = "off", state: ModelState | None = None, piece: int = PIECE,
    guard: bool = True,
) -> tuple[Tensor, ModelState, float]:
    """(nats [T - 1] of predicting ids[1:], the state after them, seconds) of one sequence ids [1, T], read in
    pieces."""
    found, began = [], time.perf_counter()
    for at in range(0, ids.shape[1], piece):
        following = ids[:, at + piece] if at + piece < ids.shape[1] else None
        losses, state = model(
            ids[:, at : at + piece], state, learn=learn, output="losses", following=following,
            guard=guard if learn == "next_token" else None,
        )
        found.append(losses.nats[0])
    assert state is not None
    return torch.cat(found)[: ids.shape[1] - 1], state, time.perf_counter() - began


def bits(losses: Tensor) -> float:
    return float(losses.double().mean()) / LOG2


def by_segment(losses: Tensor, tokens: int) -> list[float]:
    """Bits per token of each ``tokens`` predictions in turn."""
    return [round(bits(part), 5) for part in losses.split(tokens)]
