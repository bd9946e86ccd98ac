"""Keys and values of a call join those of an AttentionState: in its storage where that may be, else anew.

keep: tokens a row may still need, ``sinks`` first ones among them, those between may be dropped; None: all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..state import Counters

if TYPE_CHECKING:
    from .attention import AttentionState


def stored(
    state: AttentionState, k: Tensor, v: Tensor, lengths: list[int], keep: int | None, sinks: int
) -> AttentionState:
    """The cache with k, v appended: in the given storage where no other state has written on and it has
    room, else in new storage."""
    used, frozen = state.used(), state.k.is_inference() and not torch.is_inference_mode_enabled()
    room = max(u + n for u, n in zip(used, lengths) if n) <= state.k.shape[1]
    if not room or frozen or state.k.requires_grad or state.diverged(lengths):
        return renewed(state, k, v, lengths, keep, sinks)
    state.filled[:] = [u + n if n else f for u, n, f in zip(used, lengths, state.filled)]
    if uniform(used, lengths):
        u, n = used[0], lengths[0]
        state.k[:, u : u + n], state.v[:, u : u + n] = k[:, :n], v[:, :n]
    else:
        rows, slots, tokens = places(used, lengths, k.device)
        state.k[rows, slots], state.v[rows, slots] = k[rows, tokens], v[rows, tokens]
    return state


def roomy(state: AttentionState, lengths: list[int]) -> AttentionState:
    """The cache with room for ``lengths`` more tokens, whose slots count as written from here on: the given storage
    where no other state has written on and it has room, else new storage. ``pos`` is not advanced."""
    total = [u + n for u, n in zip(state.used(), lengths)]
    if state.k.requires_grad or max(total) > state.k.shape[1] or state.diverged(lengths):
        more = max(64, 2 * max(total)) - state.k.shape[1]
        k, v = (F.pad(t.detach(), (0, 0, 0, 0, 0, more)) for t in (state.k, state.v))
        return replace(state, k=k, v=v, base=Counters(state.base), filled=total)
    state.filled[:] = [t if n else f for t, n, f in zip(total, lengths, state.filled)]
    return state


def renewed(
    state: AttentionState, k: Tensor, v: Tensor, lengths: list[int], keep: int | None, sinks: int
) -> AttentionState:
    """New storage with room for as much again; with a window, without the tokens that nothing can reach
    any more: those between the sinks and the last ``keep - sinks``.

    The result's ``pos`` is not yet advanced.
    """
    used = state.used()
    total = [u + n for u, n in zip(used, lengths)]
    first = [0 if keep is None else max(t - keep, 0) for t in total]
    capacity = max(64, 2 * max(t - f for t, f in zip(total, first)))
    spans = list(zip(range(len(used)), used, lengths, first))
    if uniform(used, lengths):
        spans = [(slice(None), *spans[0][1:])]

    def moved(old: Tensor, new: Tensor) -> Tensor:
        fresh = old.new_zeros(old.shape[0], capacity, *old.shape[2:])
        for b, u, n, f in spans:
            s = min(sinks, u + n)
            # of the slots of both, old before new: from, to, and where they go
            for start, end, to in ((0, s, 0), (s + f, u + n, s)):
                middle = min(max(start, u), end)
                fresh[b, to : to + middle - start] = old[b, start:middle]
                rest = new[b, max(middle - u, 0) : max(end - u, 0)]
                fresh[b, to + middle - start : to + end - start] = rest
        return fresh

    base, filled = Counters([b + f for b, f in zip(state.base, first)]), [t - f for t, f in zip(total, first)]
    return replace(state, k=moved(state.k, k), v=moved(state.v, v), base=base, filled=filled)


def trimmed(state: AttentionState, keep: int | None, sinks: int) -> AttentionState:
    """Differentiable: with a window, a cache of more than twice what may be needed becomes new storage
    without the rest."""
    if keep is None or state.k.shape[1] <= max(64, 2 * keep):
        return state
    return renewed(state, state.k[:, :0], state.v[:, :0], [0] * state.batch, keep, sinks)


def uniform(used: list[int], lengths: list[int]) -> bool:
    return len(set(used)) == 1 and len(set(lengths)) == 1


def mask_before(counts: list[int], width: int, device) -> Tensor:
    """[B, width, 1, 1], true at the first counts[b] places of row b."""
    count = torch.tensor(counts, dtype=torch.long, device=device).unsqueeze(1)
    return (torch.arange(width, device=device) < count)[..., None, None]


def places(used: list[int], lengths: list[int], device) -> tuple[Tensor, Tensor, Tensor]:
    """(row, slot, token) of every new token."""
    rows = [b for b, n in enumerate(lengths) for _ in range(n)]
    slots = [u + t for u, n in zip(used, lengths) for t in range(n)]
    tokens = [t for n in lengths for t in range(n)]
    row, slot, token = [torch.tensor(i, dtype=torch.long, device=device) for i in (rows, slots, tokens)]
    return row, slot, token


def appended(old: Tensor, new: Tensor, used: list[int], lengths: list[int]) -> Tensor:
    """Out of place: old's counted slots followed by new's counted tokens, per row; differentiable in both."""
    if uniform(used, lengths):
        return torch.cat([old[:, : used[0]], new[:, : lengths[0]]], 1)
    width = max((u + n for u, n in zip(used, lengths)), default=0)
    padded = F.pad(old[:, :width], (0, 0, 0, 0, 0, max(width - old.shape[1], 0)))
    # what an abandoned call left behind may be NaN, and 0 * NaN is
    padded = torch.where(mask_before(used, width, old.device), padded, 0.0)
    rows, slots, tokens = places(used, lengths, old.device)
    return padded.index_put((rows, slots), new[rows, tokens])
