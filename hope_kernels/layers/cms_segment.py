"""The open segment of every row: which tokens it may read, and what is kept of them until their errors come.

C1 is the period of the fastest level.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..ops.cms.state import CMSState
from ..state import Counters


def check_reading(name: str, C1: int, state: CMSState, lengths: list[int], learn: bool) -> None:
    """Raises ValueError, in the name of ``name``, where a row may not read so many tokens."""
    for b, n in enumerate(lengths):
        pos, tainted = state.pos[b], state.tainted[b]
        if n == 0:
            continue
        if state.seen[b] == C1 and not tainted:
            raise ValueError(f"{name}: row {b} has read the segment that ends at token {pos}, but "
                             f"{C1 - state.delivered[b]} of its {C1} errors are outstanding; "
                             "deliver them with refresh(state, error) before reading on")
        left = C1 - pos % C1
        # A segment with learn=False tokens owes no errors, so a call may end it and fill the next one.
        room = left + C1 if tainted and pos % C1 else left
        if learn and n > room:
            raise ValueError(f"{name}: argument x has {n} tokens for row {b} at token {pos}, expected at most "
                             f"{room} with learn=True: the errors of a segment of chunks[0] = {C1} tokens must "
                             "be delivered with refresh(state, error) before the next segment is read "
                             "(learn=False reads any number)")


@torch.no_grad()
def with_tokens(C1: int, state: CMSState, x: Tensor, lengths: list[int], learn: bool) -> CMSState:
    """``state`` after reading: counters, and the inputs of open segments in which every token was read
    with learn=True."""
    seen, delivered, tainted = list(state.seen), list(state.delivered), list(state.tainted)
    skip, kept, at = [0] * state.batch, [0] * state.batch, [0] * state.batch
    for b, n in enumerate(lengths):
        if n == 0:
            continue
        left = -state.pos[b] % C1  # tokens until the open segment ends; 0 if it has ended
        opens = n > left
        if opens:
            seen[b] = delivered[b] = tainted[b] = 0
        if not learn:
            tainted[b] = 1
            continue
        skip[b] = left if opens else 0
        if not tainted[b]:
            at[b], kept[b] = seen[b], n - skip[b]
        seen[b] += n - skip[b]
    return replace(
        state, pos=Counters([p + n for p, n in zip(state.pos, lengths)]),
        inputs=written(state.inputs, x, at, kept, skip, C1),
        seen=Counters(seen), delivered=Counters(delivered), tainted=Counters(tainted),
    )


def written(
    buffer: Tensor | None, source: Tensor, at: list[int], count: list[int], skip: list[int], slots: int
) -> Tensor | None:
    """``buffer`` [B, slots, d] (None: allocated) with buffer[b, at_b : at_b + count_b] = source[b, skip_b :
    skip_b + count_b].

    Written in place where that is allowed: a value counts only once the counters cover it, so a failure later
    in the call is harmless.
    """
    if not any(count):
        return buffer
    if buffer is None:
        buffer = source.new_zeros((source.shape[0], slots, source.shape[2]))
    elif buffer.is_inference() and not torch.is_inference_mode_enabled():
        buffer = buffer.clone()
    if len(set(at)) == len(set(count)) == len(set(skip)) == 1:
        buffer[:, at[0] : at[0] + count[0]] = source[:, skip[0] : skip[0] + count[0]]
        return buffer
    rows = [b for b, n in enumerate(count) for _ in range(n)]
    to = [a + i for a, n in zip(at, count) for i in range(n)]
    start = [s + i for s, n in zip(skip, count) for i in range(n)]
    index = torch.tensor([rows, to, start], dtype=torch.long, device=buffer.device)
    buffer[index[0], index[1]] = source[index[0], index[2]]
    return buffer
