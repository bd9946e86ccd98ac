"""Learning while reading: the CMS levels of a language model descend its own next-token loss, segment by
segment (Nested Learning eq 71).

A segment is the span [i - C, i) between multiples of C, the model's shortest CMS period. Its last token has a
loss once token i is known, so everything due at count i happens when token i arrives, before it is read:

    1. the segment's summed loss is differentiated at the weights the segment was read with
    2. as the backward leaves a level, that level takes its step if i = 0 mod C^(l), or else keeps the
       gradient in its accumulator
    3. token i is read with the new weights

The gradient is taken inside the segment only: memories, cached keys and everything older are constants. A
segment that is read in one piece inside one call is differentiated as it is read; any other is replayed from
a snapshot taken at its start. Both are one function, ``segments.learn_segment``.

Tokens read with learn="off" move the counters; a segment with such a token contributes nothing, and levels
commit only at the end of a segment that contributes, when a token read with learn="next_token" follows. Until
then the accumulators keep what they have.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..layers.wrapped import placement
from ..model_state import ModelState, advance, advance_off
from . import segments
from .compiling import run_traced
from .protocol import Model
from .wavefront import run as run_wavefront


def read_off(
    model: Model, ids: Tensor, state: ModelState, lengths: list[int], backend: str | None,
    wavefront: int | None = None,
) -> tuple[Tensor, ModelState]:
    """The whole call with frozen CMS weights: (logits, new state). wavefront: see ``wavefront.run``."""
    if model.learns:
        complete = [n > 0 and s == model.segment for n, s in zip(lengths, state.seen)]
        if any(complete):
            done = [0] * len(lengths)
            draft = segments.replay(model, _draft(state), complete, ids, done, None, backend)
            state = segments.finished(draft)
    if torch.compiler.is_compiling() and wavefront is None:
        h, mixers = run_traced(model, model.embed(ids), state, lengths, backend)
    elif wavefront is None:
        h, mixers = model.run(model.embed(ids), state.mixers, state.cms, lengths, backend)
    else:
        h, mixers = run_wavefront(model, model.embed(ids), state.mixers, state.cms, lengths, wavefront, backend)
    return model.logits(h, lengths), advance_off(state, mixers, lengths)


def read_learning(
    model: Model, ids: Tensor, state: ModelState, lengths: list[int], backend: str | None
) -> tuple[Tensor, ModelState]:
    """The call in rounds; each round takes every row up to its next segment boundary: (logits, new state)."""
    B, C = ids.shape[0], model.segment
    done = [0] * B
    parts: list[Tensor] = []
    places, width = [[] for _ in range(B)], 0
    state = _draft(state)
    while any(d < n for d, n in zip(done, lengths)):
        step = [min(n - d, C - p % C) for d, n, p in zip(done, lengths, state.pos)]
        state = segments.boundary(model, state, step, ids, done, backend)
        tokens = segments.part_of(ids, done, max(step))
        logits, state = _round(model, ids, tokens, state, done, step, lengths, backend)
        parts.append(logits)
        for b in range(B):
            places[b].extend(range(width, width + step[b]))
            done[b] += step[b]
        width += max(step)
    if not parts:
        shape, dtype = (B, ids.shape[1], model.config.vocab_size), placement(model.embed).dtype
        return torch.zeros(shape, device=ids.device, dtype=dtype), segments.finished(state)
    return _in_order(parts, places, ids.shape[1]), segments.finished(state)


def _draft(state: ModelState) -> ModelState:
    return segments.draft(state, "none" if torch.is_grad_enabled() else "made")


def _round(
    model: Model, ids: Tensor, tokens: Tensor, state: ModelState, done: list[int], step: list[int],
    lengths: list[int], backend: str | None,
) -> tuple[Tensor, ModelState]:
    """Reads ``tokens`` [B, n]. Rows that read a whole segment and whose next token is known contribute its
    gradient at once."""
    C = model.segment
    whole = [s == C and d + s < n for s, d, n in zip(step, done, lengths)]
    fused = any(whole) and not torch.is_grad_enabled()
    if fused:
        targets = segments.part_of(ids, [d + 1 for d in done], tokens.shape[1])
        # their next token is in this call: what is due when it arrives is done at once
        counts = [p + n for p, n in zip(state.pos, step)]
        logits, mixers = segments.learn_segment(
            model, state, state.mixers, tokens, targets, whole, step, counts, backend
        )
    else:
        whole = [False] * len(whole)
    opening = [n > 0 and not w and p % C == 0 for n, w, p in zip(step, whole, state.pos)]
    snapshot = state.snapshot
    if any(opening):
        pairs = zip(snapshot, state.mixers)
        snapshot = [m.snapshot() if all(opening) else old.merge(m, opening) for old, m in pairs]
    if not fused:
        h, mixers = model.run(model.embed(tokens), state.mixers, state.cms, step, backend)
        logits = model.logits(h, step)
    kept, seen = segments.recorded(state, tokens, step, whole, C)
    return logits, replace(advance(state, mixers, step), snapshot=snapshot, ids=kept, seen=seen)


def _in_order(parts: list[Tensor], places: list[list[int]], T: int) -> Tensor:
    """Logits of the rounds [B, n_r, V] as [B, T, V]; slots past a row's length are zero."""
    joined = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    if all(len(p) == T and p == places[0] for p in places) and joined.shape[1] == T:
        return joined
    index = torch.tensor([p + [0] * (T - len(p)) for p in places], dtype=torch.long, device=joined.device)
    valid = torch.tensor(
        [[1] * len(p) + [0] * (T - len(p)) for p in places], device=joined.device, dtype=joined.dtype
    )
    return joined.gather(1, index.unsqueeze(-1).expand(-1, -1, joined.shape[-1])) * valid.unsqueeze(-1)
