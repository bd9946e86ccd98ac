"""One segment and its gradient: which tokens a state keeps of an open segment, and how the CMS levels descend
the loss of a complete one.

Works on drafts: states whose CMS tensors are copied when they are first written, and then written in place,
so that what was given stays as it is if a call fails.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.cms import Inner
from ..layers.wrapped import placement
from ..model_state import TAINTED, MixerState, ModelState
from ..ops.cms import backends as cms_backends
from ..state import Counters, master_dtype
from .protocol import Model


def draft(state: ModelState, in_place: str = "made") -> ModelState:
    """A state for a call to change. in_place: which CMS tensors it may write, see ``cms.state.Private``."""
    return replace(state, cms=[c and c.draft(in_place) for c in state.cms])


def finished(state: ModelState) -> ModelState:
    """The draft as a state of its own."""
    return replace(state, cms=[c and c.finished() for c in state.cms])


def boundary(
    model: Model, state: ModelState, step: list[int], ids: Tensor, done: list[int], backend: str | None
) -> ModelState:
    """What is due before a row that stands on a multiple of C reads on. step: tokens that each row reads
    next, from ``ids[b, done[b]]`` on."""
    here = [n > 0 and p > 0 and p % model.segment == 0 for n, p in zip(step, state.pos)]
    if not any(here):
        return state
    complete = [h and s == model.segment for h, s in zip(here, state.seen)]
    if any(complete):
        state = replay(model, state, complete, ids, done, state.pos, backend)
    return replace(state, seen=Counters([0 if h else s for h, s in zip(here, state.seen)]))


def replay(
    model: Model, state: ModelState, rows: list[bool], ids: Tensor, done: list[int], counts: list[int] | None,
    backend: str | None,
) -> ModelState:
    """Learns the open, complete segments of ``rows``, read again from the snapshot at their start; levels
    commit at ``counts`` (None: none does). ``ids[b, done[b]]`` is the token that arrives."""
    arriving = part_of(ids, done, 1)
    idx = [b for b, r in enumerate(rows) if r]
    part = state if all(rows) else replace(state, mixers=[], cms=[]).select(idx)
    targets = torch.cat([part.ids[:, 1:], arriving[idx]], 1)
    C, among = model.segment, None if all(rows) else idx
    learn_segment(
        model, state, part.snapshot, part.ids, targets, [True] * len(idx), [C] * len(idx), counts, backend, among
    )
    return state


def recorded(
    state: ModelState, tokens: Tensor, step: list[int], whole: list[bool], C: int
) -> tuple[Tensor, Counters]:
    """``ids`` and ``seen`` after ``step`` of ``tokens`` [B, n]: token ids of the open segments, in the rows
    whose segment stays open. whole: rows whose segment has been learned as it was read."""
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
    kept = [n if k else 0 for n, k in zip(step, keep)]
    count = torch.tensor(kept, dtype=torch.long, device=tokens.device).unsqueeze(1)
    new = (slot >= start) & (slot < start + count)
    source = (slot - start).clamp(0, tokens.shape[1] - 1)
    return torch.where(new, tokens.gather(1, source), state.ids), seen


def learn_segment(
    model: Model, state: ModelState, mixers: list[MixerState], ids: Tensor, targets: Tensor, rows: list[bool],
    lengths: list[int], counts: list[int] | None, backend: str | None, among: list[int] | None = None,
) -> tuple[Tensor, list[MixerState]]:
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
            if cms is None or block.cms is None:
                inner.append(Inner(anchor, None, among))
                continue
            dtype = placement(model.embed).dtype
            ops = cms_backends.resolve(cms.config, dtype, ids.device, backend, inner=True)
            inner.append(Inner(anchor, block.cms.sink(cms, learners, counts, ops, among), among))
        h, mixers = model.run(model.embed(ids).detach(), mixers, state.cms, lengths, backend, inner)
        logits = model.logits(h, lengths)
        wide = logits.flatten(0, 1).to(master_dtype(logits.dtype))
        loss = F.cross_entropy(wide, targets.flatten(), reduction="none")
        if not all(rows):
            loss = loss.unflatten(0, ids.shape)[marked]
        torch.autograd.grad(loss.sum(), anchor)
    return logits.detach(), mixers


def part_of(ids: Tensor, start: list[int], n: int) -> Tensor:
    """ids[b, start[b] : start[b] + n]; past the end of a row, its last token again."""
    if len(set(start)) == 1 and start[0] + n <= ids.shape[1]:
        return ids[:, start[0] : start[0] + n]
    first = torch.tensor(start, dtype=torch.long, device=ids.device).unsqueeze(1)
    index = first + torch.arange(n, device=ids.device)
    return ids.gather(1, index.clamp(max=ids.shape[1] - 1))


def _constant(mixer: MixerState) -> MixerState:
    """A mixer's state as the inner graph may take it."""
    constant = not any(t.requires_grad or t.is_inference() for t in mixer.tensors())
    return mixer if constant else mixer.constant().usable()
