"""Learning while reading: the CMS levels of a language model descend its own next-token loss, segment by
segment (Nested Learning eq 71).

A segment is the span [i - C, i) between multiples of C, the model's shortest CMS period. Its last token has a
loss once token i is known, so everything due at count i happens when token i arrives, before it is read:

    1. the segment's summed loss is differentiated at the weights the segment was read with
    2. as the backward leaves a level, that level takes its step if i = 0 mod C^(l), or else keeps the gradient in its accumulator
    3. token i is read with the new weights

The gradient is taken inside the segment only: memories, cached keys and everything older are constants. A
segment that is read in one piece inside one call is differentiated as it is read; any other is replayed from
a snapshot taken at its start. Both are one function.

Tokens read with learn="off" move the counters; a segment with such a token contributes nothing, and levels
commit only at the end of a segment that contributes, when a token read with learn="next_token" follows. Until
then the accumulators keep what they have.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.cms import Inner
from ..layers.wrapped import placement
from ..ops.cms import backends as cms_backends
from ..state import Counters, master_dtype
from .compiling import run_traced
from .wavefront import run as run_wavefront

TAINTED = -1  # ModelState.seen of a row whose open segment holds a token read with learn="off"


def read_off(model, ids: Tensor, state, lengths: list[int], backend, wavefront: int | None = None):
    """The whole call with frozen CMS weights: (logits, new state). wavefront: see ``wavefront.run``."""
    if model.learns:
        complete = [n > 0 and s == model.segment for n, s in zip(lengths, state.seen)]
        if any(complete):
            state = _finished(_replay(model, _draft(state), complete, ids, [0] * len(lengths), None, backend))
    if torch.compiler.is_compiling() and wavefront is None:
        h, mixers = run_traced(model, model.embed(ids), state, lengths, backend)
    elif wavefront is None:
        h, mixers = model.run(model.embed(ids), state.mixers, state.cms, lengths, backend)
    else:
        h, mixers = run_wavefront(model, model.embed(ids), state.mixers, state.cms, lengths, wavefront, backend)
    return model.logits(h, lengths), advance_off(state, mixers, lengths)


def read_learning(model, ids: Tensor, state, lengths: list[int], backend):
    """The call in rounds; each round takes every row up to its next segment boundary: (logits, new state)."""
    B, C = ids.shape[0], model.segment
    done = [0] * B
    parts, places, width = [], [[] for _ in range(B)], 0
    state = _draft(state)
    while any(d < n for d, n in zip(done, lengths)):
        step = [min(n - d, C - p % C) for d, n, p in zip(done, lengths, state.pos)]
        state = _boundary(model, state, step, ids, done, backend)
        tokens = _slice(ids, done, max(step))
        logits, state = _round(model, ids, tokens, state, done, step, lengths, backend)
        parts.append(logits)
        for b in range(B):
            places[b].extend(range(width, width + step[b]))
            done[b] += step[b]
        width += max(step)
    if not parts:
        none = torch.zeros(
            B, ids.shape[1], model.config.vocab_size, device=ids.device, dtype=placement(model.embed).dtype
        )
        return none, _finished(state)
    return _in_order(parts, places, ids.shape[1]), _finished(state)


def _draft(state):
    """CMS tensors are copied when they are first written and then written in place: what was given stays as
    it is if this call fails."""
    return replace(state, cms=[c and c.draft("none" if torch.is_grad_enabled() else "made") for c in state.cms])


def _constant(mixer):
    """A mixer's state as the inner graph may take it."""
    return mixer.constant().usable() if any(t.requires_grad or t.is_inference() for t in mixer.tensors()) else mixer


def _finished(state):
    return replace(state, cms=[c and c.finished() for c in state.cms])


def _boundary(model, state, step: list[int], ids: Tensor, done: list[int], backend):
    """What is due before a row that stands on a multiple of C reads on."""
    here = [n > 0 and p > 0 and p % model.segment == 0 for n, p in zip(step, state.pos)]
    if not any(here):
        return state
    complete = [h and s == model.segment for h, s in zip(here, state.seen)]
    if any(complete):
        state = _replay(model, state, complete, ids, done, state.pos, backend)
    return replace(state, seen=Counters([0 if h else s for h, s in zip(here, state.seen)]))


def _round(model, ids, tokens, state, done, step, lengths, backend):
    """Reads ``tokens`` [B, n]. Rows that read a whole segment and whose next token is known contribute its
    gradient at once."""
    C = model.segment
    whole = [s == C and d + s < n for s, d, n in zip(step, done, lengths)]
    fused = any(whole) and not torch.is_grad_enabled()
    if fused:
        targets = _slice(ids, [d + 1 for d in done], tokens.shape[1])
        # their next token is in this call: what is due when it arrives is done at once
        counts = [p + n for p, n in zip(state.pos, step)]
        logits, mixers = learn_segment(model, state, state.mixers, tokens, targets, whole, step, counts, backend)
    else:
        whole = [False] * len(whole)
    opening = [n > 0 and not w and p % C == 0 for n, w, p in zip(step, whole, state.pos)]
    snapshot = state.snapshot
    if any(opening):
        snapshot = [
            m.snapshot() if all(opening) else old.merge(m, opening) for old, m in zip(snapshot, state.mixers)
        ]
    if not fused:
        h, mixers = model.run(model.embed(tokens), state.mixers, state.cms, step, backend)
        logits = model.logits(h, step)
    kept, seen = _recorded(state, tokens, step, whole, C)
    return logits, replace(advance(state, mixers, step), snapshot=snapshot, ids=kept, seen=seen)


def _recorded(state, tokens: Tensor, step: list[int], whole: list[bool], C: int) -> tuple[Tensor, Counters]:
    """Token ids of the open segments, with this round's tokens of the rows whose segment stays open."""
    keep = [n > 0 and not w and s != TAINTED for n, w, s in zip(step, whole, state.seen)]
    # a tainted segment ends with this round where the row reaches its boundary
    ended = [s == TAINTED and n > 0 and (p + n) % C == 0 for s, n, p in zip(state.seen, step, state.pos)]
    seen = Counters(
        [0 if w or e else s + n if k else s for s, n, k, w, e in zip(state.seen, step, keep, whole, ended)]
    )
    if not any(keep):
        return state.ids, seen
    slot = torch.arange(C, device=tokens.device)
    start = torch.tensor(state.seen, dtype=torch.long, device=tokens.device).unsqueeze(1)
    count = torch.tensor(
        [n if k else 0 for n, k in zip(step, keep)], dtype=torch.long, device=tokens.device
    ).unsqueeze(1)
    new = (slot >= start) & (slot < start + count)
    source = (slot - start).clamp(0, tokens.shape[1] - 1)
    return torch.where(new, tokens.gather(1, source), state.ids), seen


def _replay(model, state, rows: list[bool], ids: Tensor, done: list[int], counts: list[int] | None, backend):
    """Learns the open, complete segments of ``rows`` (levels commit at ``counts``); ``ids[b, done[b]]`` is
    the token arriving."""
    arriving = _slice(ids, done, 1)
    idx = [b for b, r in enumerate(rows) if r]
    part = state if all(rows) else replace(state, mixers=[], cms=[]).select(idx)
    targets = torch.cat([part.ids[:, 1:], arriving[idx]], 1)
    C, among = model.segment, None if all(rows) else idx
    learn_segment(
        model, state, part.snapshot, part.ids, targets, [True] * len(idx), [C] * len(idx), counts, backend, among
    )
    return state


def learn_segment(
    model, state, mixers: list, ids: Tensor, targets: Tensor, rows: list[bool], lengths: list[int],
    counts: list[int] | None, backend, among: list[int] | None = None,
) -> tuple[Tensor, list]:
    """Reads one segment from ``mixers`` and descends its loss: the draft ``state.cms`` is changed, level by
    level, as the backward passes.

    ids, targets [B, n]; a row marked in ``rows`` contributes the summed cross-entropy (nats) of its n tokens,
    and its levels commit where they are due at ``counts`` (of the whole batch; None: nothing commits). among:
    the rows of the batch that ids and mixers are of; None: all. Returns the logits and the mixers after the
    segment, both detached. Runs with grad enabled and inference mode off whatever the caller's mode.
    """
    marked = [b for b, r in enumerate(rows) if r]
    learners = marked if among is None else [among[b] for b in marked]
    with torch.inference_mode(False), torch.enable_grad():
        mixers = [_constant(m) for m in mixers]
        ids, targets = (t.clone() if t.is_inference() else t for t in (ids, targets))
        anchor, inner = torch.zeros((), dtype=torch.float32, device=ids.device, requires_grad=True), []
        for block, cms in zip(model.blocks, state.cms):
            ops = (
                None if cms is None
                else cms_backends.resolve(cms.config, placement(model.embed).dtype, ids.device, backend, inner=True)
            )
            sink = None if cms is None else block.cms.sink(cms, learners, counts, ops, among)
            inner.append(Inner(anchor, sink, among))
        h, mixers = model.run(model.embed(ids).detach(), mixers, state.cms, lengths, backend, inner)
        logits = model.logits(h, lengths)
        loss = F.cross_entropy(
            logits.flatten(0, 1).to(master_dtype(logits.dtype)), targets.flatten(), reduction="none"
        )
        if not all(rows):
            loss = loss.unflatten(0, ids.shape)[marked]
        torch.autograd.grad(loss.sum(), anchor)
    return logits.detach(), mixers


def advance(state, mixers: list, lengths: list[int]):
    """The state after ``lengths`` tokens: new mixers and all counters moved."""
    def moved(pos):
        return Counters([p + n for p, n in zip(pos, lengths)])

    cms = [None if c is None else replace(c, pos=moved(c.pos)) for c in state.cms]
    return replace(state, mixers=mixers, cms=cms, pos=moved(state.pos))


def advance_off(state, mixers: list, lengths: list[int]):
    """``advance`` for tokens read with frozen CMS weights: the open segment, if it holds any, contributes
    nothing."""
    new, segment = advance(state, mixers, lengths), state.ids.shape[1]
    if not segment:  # the model cannot learn
        return new
    seen = [s if n == 0 else TAINTED if p % segment else 0 for s, n, p in zip(state.seen, lengths, new.pos)]
    return replace(new, seen=Counters(seen))


def _slice(ids: Tensor, start: list[int], n: int) -> Tensor:
    """ids[b, start[b] : start[b] + n]; past the end of a row, its last token again."""
    if len(set(start)) == 1 and start[0] + n <= ids.shape[1]:
        return ids[:, start[0] : start[0] + n]
    index = torch.tensor(
        start, dtype=torch.long, device=ids.device
    ).unsqueeze(1) + torch.arange(n, device=ids.device)
    return ids.gather(1, index.clamp(max=ids.shape[1] - 1))


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
