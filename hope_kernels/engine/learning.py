"""Learning while reading: the CMS levels of a language model descend its own next-token loss, segment by
segment (Nested Learning eq 71).

A segment is the span [i - C, i) between multiples of C, the model's shortest CMS period. Its last token has a
loss once token i is known, so everything due at count i happens when token i arrives, before it is read:

    1. the segment's summed loss is differentiated at the weights the segment was read with
    2. as the backward leaves a level, that level takes its step if i = 0 mod C^(l), or else keeps the
       gradient in its accumulator
    3. token i is read with the new weights

The gradient is taken inside the segment only: memories, cached keys and everything older are constants. A
segment that is read in one piece inside one call, which also knows the token after it, is differentiated as it
is read. One that is read in one piece and ends with its call waits for the next token with its graph
(``segments.Held``), if the next call is the one that brings it. Any other is replayed from a snapshot taken at
its start.

``segments.flush`` learns an open segment before it has ended. The tokens after it, up to the next multiple of
C, are a segment of their own, as short as it may be.

Tokens read with learn="off" move the counters; a segment with such a token contributes nothing, and levels
commit only at the end of a segment that contributes, when a token read with learn="next_token" follows. Until
then the accumulators keep what they have.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..layers.wrapped import placement
from ..model_state import ModelState, advance, advance_off
from ..ops.cms.plan import Plan
from ..state import master_dtype
from . import native_attention, outer, segments
from .compiling import run_traced
from .head import Heads, Losses, Targets, read_head
from .native_segment import Reader
from .native_segments import learn_several, read_frozen, segments_ahead
from .protocol import Model
from .segments import Held, HeldReading
from .wavefront import run as run_wavefront


@dataclass(frozen=True)
class Call:
    """What a call of the model reads, and what it returns.

    ids [B, T], of which ``lengths`` tokens a row count. tokens: the same, and after them what follows, where
    the caller said so: [B, T] or [B, T + 1]; known: tokens of each row whose next one is among them. losses:
    whether losses are returned in place of logits. embeds: [B, T, d], what is read in place of the vectors of ids.
    outer: how an outer graph goes through refreshes (``engine/outer.py``); None: rows that have learned are constants.
    """

    ids: Tensor
    lengths: list[int]
    tokens: Tensor
    known: list[int]
    losses: bool
    backend: str | None
    check_finite: bool
    wavefront: int | None
    embeds: Tensor | None = None
    outer: str | None = None

    def targets(self, done: list[int], step: list[int]) -> Targets:
        """Of the tokens ``ids[b, done[b] : done[b] + step[b]]``."""
        known = [min(max(k - d, 0), n) for k, d, n in zip(self.known, done, step)]
        n = max(step, default=0) if self.ids.shape[1] else 0
        return Targets(segments.part_of(self.tokens, [d + 1 for d in done], n), known)


def with_following(ids: Tensor, lengths: list[int], following: Tensor | None) -> tuple[Tensor, list[int]]:
    """``Call.tokens`` and ``Call.known``. following: [B] int64, -1 where nobody knows."""
    if following is None:
        return ids, [max(n - 1, 0) for n in lengths]
    known = [n > 0 and t >= 0 for n, t in zip(lengths, following.tolist())]
    ids = torch.cat([ids, ids.new_zeros(len(lengths), 1)], 1)
    place = torch.tensor(lengths, dtype=torch.long, device=ids.device).unsqueeze(1)
    ids = ids.scatter(1, place, following.clamp(min=0).unsqueeze(1))
    return ids, [n if k else max(n - 1, 0) for n, k in zip(lengths, known)]


def read_off(model: Model, call: Call, state: ModelState) -> tuple[Tensor | Losses, ModelState]:
    """The whole call with frozen CMS weights: (logits or losses, new state)."""
    ids, lengths, backend = call.ids, call.lengths, call.backend
    if model.learns:
        complete = [n > 0 and c for n, c in zip(lengths, segments.complete(state))]
        if any(complete):
            done = [0] * len(lengths)
            draft = segments.replay(model, _draft(state), complete, ids, done, None, backend)
            state = segments.finished(draft)
    targets = call.targets([0] * len(lengths), [ids.shape[1]] * len(lengths)) if call.losses else None
    plain = call.embeds is None and call.wavefront is None and max(lengths, default=0) > 0
    if plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if native_attention.serves(model, state, backend):
            with torch.inference_mode(False), torch.no_grad():
                h, mixers = native_attention.read(model, model.embed(ids), state, lengths)
                heads = read_head(
                    model, h, lengths, targets, logits=not call.losses, check_finite=call.check_finite, backend=backend
                )
            return _output(heads, call.losses), advance_off(state, mixers, lengths)
        reader = Reader(model, backend, learning=False)
        if reader.serves(state):
            with torch.inference_mode(False), torch.no_grad():
                heads, mixers = read_frozen(
                    reader, state, ids, lengths, targets, logits=not call.losses, check_finite=call.check_finite
                )
            return _output(heads, call.losses), advance_off(state, mixers, lengths)
    h = model.embed(ids) if call.embeds is None else call.embeds
    if torch.compiler.is_compiling() and call.wavefront is None:
        h, mixers = run_traced(model, h, state, lengths, backend)
    elif call.wavefront is None:
        h, mixers = model.run(h, state.mixers, state.cms, lengths, backend)
    else:
        h, mixers = run_wavefront(model, h, state.mixers, state.cms, lengths, call.wavefront, backend)
    heads = read_head(
        model, h, lengths, targets, logits=not call.losses, check_finite=call.check_finite, backend=backend
    )
    return _output(heads, call.losses), advance_off(state, mixers, lengths)


def read_learning(
    model: Model, call: Call, state: ModelState, held: Held | HeldReading | None = None
) -> tuple[Tensor | Losses, ModelState, Held | HeldReading | None]:
    """The call in rounds; each round takes every row up to its next segment boundary: (logits or losses, new
    state, the graph of segments that end with the call). held: that of the call before this one."""
    lengths, B, C = call.lengths, call.ids.shape[0], model.segment
    done = [0] * B
    parts: list[Heads] = []
    places, width = [[] for _ in range(B)], 0
    state, reader = outer.begun(model, _draft(state, call.outer), call.outer), Reader(model, call.backend)
    while any(d < n for d, n in zip(done, lengths)):
        step = [min(n - d, C - p % C) for d, n, p in zip(done, lengths, state.pos)]
        state = segments.boundary(model, state, step, call.ids, done, call.backend, held, reader)
        several = _several(model, call, state, done, reader)
        if several is None:
            heads, state, held = _round(model, call, state, done, step, reader)
        else:
            heads, state, step = several
            held = None
        parts.append(heads if call.losses else Heads(heads.logits, None, None, None))
        for b in range(B):
            places[b].extend(range(width, width + step[b]))
            done[b] += step[b]
        width += max(step)
    return _joined(model, call, parts, places), segments.finished(state), held


def _draft(state: ModelState, outer: str | None = None) -> ModelState:
    return segments.draft(state, "none" if torch.is_grad_enabled() else "made", outer)


def _round(
    model: Model, call: Call, state: ModelState, done: list[int], step: list[int], reader: Reader
) -> tuple[Heads, ModelState, Held | HeldReading | None]:
    """Reads the next ``step`` tokens of every row. Rows that read a whole segment and whose next token is
    known contribute its gradient at once; where all are at a segment's end and wait for the next token, the
    graph is held."""
    C, frozen, check = model.segment, torch.is_grad_enabled(), call.check_finite
    tokens, targets = segments.part_of(call.ids, done, max(step)), call.targets(done, step)
    opening = [n > 0 and s == 0 for n, s in zip(step, state.seen)]
    whole = [o and (p + n) % C == 0 for o, p, n in zip(opening, state.pos, step)]
    waits = [w and k < n for w, k, n in zip(whole, targets.known, step)]
    whole = [w and not x and not frozen for w, x in zip(whole, waits)]
    opening = [o and not w for o, w in zip(opening, whole)]
    snapshot, held = state.snapshot, None
    if any(opening):
        pairs = zip(snapshot, state.mixers)
        snapshot = [m.snapshot() if all(opening) else old.caught_up(m, opening) for old, m in pairs]
    if any(whole):
        # their next token is in this call: what is due when it arrives is done at once
        counts = [p + n for p, n in zip(state.pos, step)]
        heads, mixers = segments.learn_segment(
            model, state, state.mixers, tokens, targets, whole, step, counts, call.backend, logits=not call.losses,
            check_finite=check, reader=reader
        )
        if state.kept is not None:
            rows = [b for b, w in enumerate(whole) if w]
            state = segments.kept(state, rows, tokens[rows], targets.ids[rows], [step[b] for b in rows])
    elif model.holds and not frozen and waits == [n > 0 for n in step]:
        apart = [m.snapshot() for m in state.mixers]
        heads, mixers, held = segments.read_and_hold(
            model, state, apart, tokens, targets, step, call.backend, losses=call.losses, check_finite=check,
            reader=reader
        )
    elif not frozen and reader.serves(state):
        reading, mixers = reader.read(state, state.mixers, tokens, step, None, keep=False)
        heads, _ = reading.head(targets if call.losses else None, logits=not call.losses, check_finite=check)
        reading.done()
    else:
        h, mixers = model.run(model.embed(tokens), state.mixers, state.cms, step, call.backend)
        heads = read_head(
            model, h, step, targets if call.losses else None, logits=not call.losses, check_finite=check,
            backend=call.backend
        )
    kept, seen = segments.recorded(state, tokens, step, whole, C)
    return heads, replace(advance(state, mixers, step), snapshot=snapshot, ids=kept, seen=seen), held


def _several(
    model: Model, call: Call, state: ModelState, done: list[int], reader: Reader
) -> tuple[Heads, ModelState, list[int]] | None:
    """As many segments as every row reads whole and learns in one call of C++, with their tokens; None: the next is
    to be read alone."""
    C, rows = model.segment, list(range(state.batch))
    if torch.is_grad_enabled():
        return None
    count = segments_ahead(model, state, [k - d for k, d in zip(call.known, done)], reader)
    if not count:
        return None
    plans_at = partial(_plans_at, model, state, rows, [C] * state.batch, reader)
    with torch.inference_mode(False), torch.no_grad():
        ids, targets = segments.part_of(call.ids, done, count * C), call.targets(done, [count * C] * state.batch)
        read = learn_several(
            model, state, ids, targets, count, plans_at, reader, logits=not call.losses, check_finite=call.check_finite
        )
    if not read.done:
        return None
    for a in range(0, read.done * C, C) if state.kept is not None else ():
        state = segments.kept(state, rows, ids[:, a : a + C], targets.ids[:, a : a + C], [C] * state.batch)
    step = [read.done * C] * state.batch
    logits, nats, last, _ = read.heads
    logits, nats = (None if t is None else t[:, : step[0]] for t in (logits, nats))
    return Heads(logits, nats, last, None), advance(state, read.mixers, step), step


def _plans_at(
    model: Model, state: ModelState, rows: list[int], tokens: list[int], reader: Reader, counts: list[int]
) -> list[dict[int, Plan]]:
    return segments.plans_of(model, state, rows, counts, tokens, reader)


def _joined(model: Model, call: Call, parts: list[Heads], places: list[list[int]]) -> Tensor | Losses:
    """What the call returns, of what its rounds made."""
    (B, T), like = call.ids.shape, placement(model.embed)
    last = torch.zeros(B, model.config.vocab_size, device=like.device, dtype=like.dtype)
    if not call.losses:
        logits = [p.logits for p in parts if p.logits is not None]
        return _in_order(logits, places, T) if logits else last.unsqueeze(1).expand(-1, T, -1).contiguous()
    nats, at = [p.nats.unsqueeze(-1) for p in parts if p.nats is not None], 0
    if not nats:
        return Losses(last.new_zeros(B, T, dtype=master_dtype(like.dtype)), last)
    for part in parts:
        assert part.nats is not None and part.last is not None
        n = part.nats.shape[1]
        read = [bisect_left(p, at) < bisect_left(p, at + n) for p in places]  # ascending
        last = part.last if all(read) else torch.where(
            torch.tensor(read, device=like.device).unsqueeze(1), part.last, last
        )
        at += n
    return Losses(_in_order(nats, places, T).squeeze(-1), last)


def _output(heads: Heads, losses: bool) -> Tensor | Losses:
    if losses:
        assert heads.nats is not None and heads.last is not None
        return Losses(heads.nats, heads.last)
    assert heads.logits is not None
    return heads.logits


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
