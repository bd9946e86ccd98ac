"""A text to read as a function that gives its next tokens, whatever it was given as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..check import check_lengths, check_state, check_tensor
from ..layers.wrapped import placement
from ..model_state import ModelState
from . import unread as unread_token
from .protocol import Model

Source = Callable[[int], Tensor]  # the next n tokens [B, n] of a text, fewer only where it ends


class Opened(NamedTuple):
    """Everything there is to read. lengths: tokens of each row (None: until ``take`` ends). lead: how many of
    them come before the caller's ids (0 or 1)."""

    take: Source
    lengths: list[int] | None
    lead: int


def opened(
    op: str, model: Model, ids: Tensor | Source, state: ModelState | None, lengths: Sequence[int] | None,
    unread: str | None,
) -> Opened:
    """The arguments of ``read`` as one function, the unread token in front where ids do not include it.
    Raises as ``read`` does."""
    device, batch, counts = placement(model.embed).device, None, None
    if callable(ids):
        if lengths is not None:
            raise ValueError(f"{op}: argument lengths is {lengths}, expected None where ids is a function")
        source = checked(op, ids, device)
    else:
        batch = check_tensor(op, "ids", ids, ("B", "T"), torch.int64, device)["B"]
        counts = check_lengths(op, lengths, *ids.shape)
        source = prefixed(ids[:, : max(counts, default=0)], None)
    if state is None:
        return Opened(source, counts, 0)
    check_state(op, state, ModelState, model.config, getattr(state, "batch", 0) if batch is None else batch)
    if state.unread is None:
        return Opened(source, counts, 0)
    check_tensor(op, "state.unread", state.unread, (state.batch, 1), torch.int64, device)
    first = state.unread[:, :0] if unread is not None else source(2)
    if unread is None:
        source = prefixed(first, source)
    if unread_token.mode_of(op, unread, state.unread, first, counts) == "included":
        return Opened(source, counts, 0)
    counts = None if counts is None else [n + 1 for n in counts]
    return Opened(prefixed(state.unread, source), counts, 1)


def checked(op: str, ids: Source, device: torch.device) -> Source:
    def take(n: int) -> Tensor:
        part = ids(n)
        check_tensor(op, "ids(n)", part, ("B", "n"), torch.int64, device)
        if part.shape[1] > n:
            raise ValueError(f"{op}: ids({n}) has {part.shape[1]} tokens, expected at most {n}: the next ones of "
                             "the text")
        return part

    return take


def prefixed(front: Tensor, rest: Source | None) -> Source:
    """The tokens front [B, n], then those of ``rest``."""
    def take(n: int) -> Tensor:
        nonlocal front
        part, front = front[:, : min(n, front.shape[1])], front[:, min(n, front.shape[1]) :]
        if rest is None or part.shape[1] == n:
            return part
        return torch.cat([part, rest(n - part.shape[1])], 1) if part.shape[1] else rest(n)

    return take
