"""One segment and its gradient: which tokens a state keeps of an open segment, and how the CMS levels descend
the loss of a complete one.

Works on drafts: states whose CMS tensors are copied when they are first written, and then written in place,
so that what was given stays as it is if a call fails.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kept import nothing_kept, offer
from ..layers.cms import Inner
from ..layers.wrapped import placement
from ..model_state import TAINTED, MixerState, ModelState
from ..ops.cms.chain import Sink
from ..ops.cms.level import Factors
from ..ops.cms.plan import Plan, take_back
from ..state import Counters
from .guard import judge
from .head import Heads, Targets, mask, read_head
from .native_reading import Reading
from .native_segment import Reader
from .protocol import Model
from .second_order import Refreshes


def draft(state: ModelState, in_place: str = "made", outer: str | None = None) -> ModelState:
    """A state for a call to change. in_place, outer: which CMS tensors it may write, and whether an outer graph goes
    through what is learned, see ``cms.state.Private``."""
    guard = None if state.guard is None else state.guard.draft()
    return replace(state, cms=[c and c.draft(in_place, outer) for c in state.cms], guard=guard)


def finished(state: ModelState) -> ModelState:
    """The draft as a state of its own."""
    return replace(state, cms=[c and c.finished() for c in state.cms])


def complete(state: ModelState) -> list[bool]:
    """Rows whose open segment has ended, and waits for the token after it to be learned."""
    C = state.ids.shape[1]
    return [C > 0 and s > 0 and p % C == 0 for s, p in zip(state.seen, state.pos)]


def boundary(
    model: Model, state: ModelState, step: list[int], ids: Tensor, done: list[int], backend: str | None,
    held: Held | HeldReading | None = None, reader: Reader | None = None,
) -> ModelState:
    """What is due before a row that stands on a multiple of C reads on. step: tokens that each row reads
    next, from ``ids[b, done[b]]`` on. held: what is kept of the segments that end here. reader: as
    ``learn_segment`` has it."""
    here = [n > 0 and p > 0 and p % model.segment == 0 for n, p in zip(step, state.pos)]
    if not any(here):
        return state
    due = [h and c for h, c in zip(here, complete(state))]
    if any(due):
        state = replay(model, state, due, ids, done, state.pos, backend, held, reader)
    return replace(state, seen=Counters([0 if h else s for h, s in zip(here, state.seen)]))


def flush(model: Model, state: ModelState, backend: str | None) -> tuple[ModelState, list[int]]:
    """The draft ``state`` after it has learned the open segment of every row that knows a loss of it: (the
    draft, how many tokens of each row contributed).

    A segment of n tokens knows n - 1 losses. At a multiple of C what is due there is done, as if the next token
    had arrived; inside a segment the levels whose period is C commit. What is read afterwards begins a segment.
    """
    C, count = model.segment, [max(s - 1, 0) for s in state.seen]
    idx = [b for b, n in enumerate(count) if n]
    if not idx:
        return state, count
    part = replace(state, mixers=[], cms=[], kept=None).select(idx)
    lengths = [count[b] for b in idx]
    tokens, targets = part.ids[:, : max(lengths)], part.ids[:, 1 : max(lengths) + 1]
    counts = [C if p % C else p for p in state.pos]
    learn_segment(
        model, state, part.snapshot, tokens, Targets(targets, lengths), [True] * len(idx), lengths, counts,
        backend, idx if len(idx) < state.batch else None, logits=False,
    )
    state = kept(state, idx, tokens, targets, lengths)
    return replace(state, seen=Counters([0 if n else s for n, s in zip(count, state.seen)])), count


def replay(
    model: Model, state: ModelState, rows: list[bool], ids: Tensor, done: list[int], counts: list[int] | None,
    backend: str | None, held: Held | HeldReading | None = None, reader: Reader | None = None,
) -> ModelState:
    """Learns the open, complete segments of ``rows``: from what ``held`` kept of their reading, or read again
    from the snapshot at their start. Levels commit at ``counts`` (None: none does). ``ids[b, done[b]]`` is the
    token that arrives."""
    arriving = part_of(ids, done, 1)
    idx = [b for b, r in enumerate(rows) if r]
    part = state if all(rows) else replace(state, mixers=[], cms=[], kept=None).select(idx)
    lengths, n = list(part.seen), max(part.seen)
    tokens, following = part.ids[:, :n], arriving[idx]
    if min(lengths) == n:
        targets = torch.cat([tokens[:, 1:], following], 1)
    else:
        place = torch.tensor(lengths, dtype=torch.long, device=ids.device).unsqueeze(1) - 1
        targets = tokens.roll(-1, 1).scatter(1, place, following)
    # it may have the last part of some rows only, where others came to their end before
    if held is not None and all([held.read.lengths[b] == n for b, n in zip(idx, lengths)]):
        held.learn(model, state, rows, arriving, counts, backend)
    else:
        of, among = Targets(targets, lengths), None if all(rows) else idx
        exact = any([c is not None and c.private is not None and c.private.outer == "second_order" for c in state.cms])
        through = Refreshes(model, state, part.snapshot, tokens, of, lengths, counts, among) if exact else None
        learn_segment(
            model, state, part.snapshot, tokens, of, [True] * len(idx), lengths, counts, backend, among,
            logits=False, reader=reader,
        )
        if through is not None:
            through.attach(state)
    return kept(state, idx, tokens, targets, lengths)


def keep(state: ModelState, slots: int, seed: int) -> None:
    """``state`` keeps at most ``slots`` segments of what each row learns from here on. Raises ValueError where
    it keeps another number already."""
    if state.kept is None:
        state.kept = nothing_kept(state.config, state.batch, slots, seed, state.ids.device)
    elif state.kept.slots != slots:
        raise ValueError(f"read: argument replay is {slots}, and argument state keeps {state.kept.slots} segments "
                         "already; pass 0 or that number")


def kept(
    state: ModelState, rows: list[int], ids: Tensor, targets: Tensor, lengths: list[int]
) -> ModelState:
    """``state`` once segments that ``rows`` have learned, [len(rows), n], are among those it may keep."""
    return state if state.kept is None else replace(state, kept=offer(state.kept, rows, ids, targets, lengths))


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
    model: Model, state: ModelState, mixers: list[MixerState], ids: Tensor, targets: Targets, rows: list[bool],
    lengths: list[int], counts: list[int] | None, backend: str | None, among: list[int] | None = None, *,
    logits: bool = True, check_finite: bool = False, finite: Tensor | None = None, reader: Reader | None = None,
) -> tuple[Heads, list[MixerState]]:
    """Reads one segment from ``mixers`` and descends its loss: the draft ``state.cms`` is changed, level by
    level, as the backward passes.

    ids [B, n], lengths: tokens of each row that count; a row marked in ``rows`` contributes the summed
    cross-entropy (nats) of those whose target is known, and its levels commit where they are due at ``counts``
    (of the whole batch; None: nothing commits). among: the rows of the batch that ids and mixers are of; None:
    all. finite: as in ``read_head``. Returns what the head made of the segment (with logits only where asked)
    and the mixers after it, all detached. Runs with grad enabled and inference mode off whatever the caller's mode.
    reader: of this call; None: asked for here. Whether it serves depends on the model and the backend, and not on
    how a segment comes to be learned, so that its bits do not either.
    """
    marked = [b for b, r in enumerate(rows) if r]
    learners = marked if among is None else [among[b] for b in marked]
    reader = Reader(model, backend) if reader is None else reader
    with torch.inference_mode(False), torch.enable_grad():
        ids, targets = _usable(ids), targets._replace(ids=_usable(targets.ids))
        read = Segment(mixers, ids, targets, lengths, backend)
        if finite is None and reader.serves(state):
            reading, after = reader.read(state, mixers, ids, lengths, among, keep=True)
            heads, slopes = reading.head(targets, logits=logits, learners=rows, check_finite=check_finite)
            _descend(model, state, reading, read, marked, learners, counts, among, heads, slopes)
            reading.done()
            return heads, after
        sinks = _sinks(model, state, learners, counts, backend, among, targets.known, ids.shape[1])
        found = read_to_learn(
            model, state, read, rows, sinks, among, logits=logits, check_finite=check_finite, finite=finite
        )
        heads = found.heads
        assert heads.slopes is not None and heads.nats is not None
        found.learn(judged(model, state, read, marked, learners, heads.nats, heads.slopes))
    return heads, found.mixers


class Segment(NamedTuple):
    """What a segment was read from. mixers: as they were before. apart: the rows are parts of one segment."""

    mixers: list[MixerState]
    ids: Tensor
    targets: Targets
    lengths: list[int]
    backend: str | None
    apart: bool = False


class ReadToLearn(NamedTuple):
    """A segment as the blocks and the head have read it. h: what the blocks made of it, whose graph runs to
    ``anchor``; mixers: as they are after it."""

    h: Tensor
    anchor: Tensor
    heads: Heads
    mixers: list[MixerState]

    def learn(self, slopes: Tensor) -> None:
        """Takes dL/dh back through the blocks, whose levels hand their factors to the sinks; once."""
        torch.autograd.grad(self.h, self.anchor, slopes)


def read_to_learn(
    model: Model, state: ModelState, read: Segment, rows: list[bool], sinks: list[Sink | None],
    among: list[int] | None = None, *, logits: bool, check_finite: bool = False, finite: Tensor | None = None,
) -> ReadToLearn:
    """The part of ``learn_segment`` before its gradient; grad mode is on."""
    lengths = read.lengths
    h, mixers, anchor = read_graph(model, state, read.mixers, read.ids, lengths, read.backend, sinks, among)
    heads = read_head(
        model, h.detach(), lengths, read.targets, logits=logits, learners=rows, check_finite=check_finite,
        finite=finite, backend=read.backend,
    )
    return ReadToLearn(h, anchor, heads, mixers)


def _descend(
    model: Model, state: ModelState, reading: Reading, read: Segment, marked: list[int], learners: list[int],
    counts: list[int] | None, among: list[int] | None, heads: Heads, slopes: Tensor
) -> None:
    """The levels of the draft ``state`` learn what ``reading`` kept, in the rows ``learners`` of the batch, which are
    the ``marked`` ones of those read."""
    assert heads.nats is not None
    of, known = dict(zip(learners, marked)), read.targets.known
    slopes = judged(model, state, read, marked, learners, heads.nats, slopes, reading.reader)
    if not learners:
        return
    tokens = [0] * state.batch
    for b in learners:
        tokens[b] = known[of[b]]
    plans = plans_of(model, state, learners, counts, tokens, reading.reader)
    here = {of[b] for b in learners}
    reading.learn([b in here for b in range(len(known))], slopes, plans)
    for cms, levels in zip(state.cms, plans):
        take_back(cms, levels)


@dataclass
class HeldReading:
    """``Held`` of a reading in C++."""

    reading: Reading
    read: Segment

    def learn(
        self, model: Model, state: ModelState, rows: list[bool], arriving: Tensor, counts: list[int] | None,
        backend: str | None,
    ) -> None:
        """As ``Held.learn``."""
        with torch.inference_mode(False), torch.no_grad():
            read = self.read._replace(targets=_arrived(self.read, arriving))
            marked = [b for b, r in enumerate(rows) if r]
            heads, slopes = self.reading.head(read.targets, logits=False, learners=rows)
            _descend(model, state, self.reading, read, marked, list(marked), counts, None, heads, slopes)


def _arrived(read: Segment, arriving: Tensor) -> Targets:
    """The targets of ``read`` once the tokens after its rows, ``arriving`` [B, 1], are known."""
    place = torch.tensor([[max(m - 1, 0)] for m in read.lengths], dtype=torch.long, device=arriving.device)
    return Targets(read.targets.ids.scatter(1, place, _usable(arriving)), read.lengths)


@dataclass
class Held:
    """The graph of segments that a call has read to their end, whose last losses the next token decides.

    h [B, n, d] is what the blocks made of them. late: where the factors of the blocks' levels go once it is
    known what is due. read: what was read, its last targets still unknown.
    """

    h: Tensor
    anchor: Tensor
    late: list[Late | None]
    read: Segment

    def learn(
        self, model: Model, state: ModelState, rows: list[bool], arriving: Tensor, counts: list[int] | None,
        backend: str | None,
    ) -> None:
        """As ``learn_segment``, for the marked rows, whose next tokens are ``arriving`` [B, 1]; once. The head is
        read again, in one product with all tokens: bit for bit what a state without the graph would learn."""
        with torch.inference_mode(False), torch.enable_grad():
            h, lengths, marked = self.h.detach(), self.read.lengths, [b for b, r in enumerate(rows) if r]
            targets = _arrived(self.read, arriving)
            heads = read_head(model, h, lengths, targets, logits=False, learners=rows, backend=backend)
            sinks = _sinks(model, state, marked, counts, backend, None, lengths, h.shape[1])
            for late, sink in zip(self.late, sinks):
                if late is not None:
                    late.sink = sink
            assert heads.slopes is not None and heads.nats is not None
            read = self.read._replace(targets=targets)
            slopes = judged(model, state, read, marked, marked, heads.nats, heads.slopes)
            torch.autograd.grad(self.h, self.anchor, slopes)


class Late:
    """A sink that is known only when the backward comes."""

    sink: Sink | None = None

    def __call__(self, l: int, factors: Factors) -> None:
        assert self.sink is not None
        self.sink(l, factors)


def read_and_hold(
    model: Model, state: ModelState, mixers: list[MixerState], ids: Tensor, targets: Targets, lengths: list[int],
    backend: str | None, *, losses: bool, check_finite: bool, reader: Reader
) -> tuple[Heads, list[MixerState], Held | HeldReading]:
    """Reads segments that end with the call, and holds their graph. mixers: nothing else may write into their
    tensors while it is held. losses: in place of logits."""
    with torch.inference_mode(False), torch.enable_grad():
        ids, targets = _usable(ids), targets._replace(ids=_usable(targets.ids))
        if reader.serves(state):
            reading, after = reader.read(state, mixers, ids, lengths, None, keep=True)
            wanted = targets if losses else None
            with torch.no_grad():
                heads, _ = reading.head(wanted, logits=not losses, check_finite=check_finite)
            return heads, after, HeldReading(reading, Segment(mixers, ids, targets, lengths, backend))
        late = [None if cms is None or block.cms is None else Late() for block, cms in zip(model.blocks, state.cms)]
        read = Segment([m.snapshot() for m in mixers], ids, targets, lengths, backend)
        h, mixers, anchor = read_graph(model, state, mixers, ids, lengths, backend, late, None)
    wanted = targets if losses else None
    heads = read_head(
        model, h.detach(), lengths, wanted, logits=not losses, check_finite=check_finite, backend=backend
    )
    return heads, mixers, Held(h, anchor, late, read)


def _sinks(
    model: Model, state: ModelState, learners: list[int], counts: list[int] | None, backend: str | None,
    among: list[int] | None, tokens: list[int], width: int
) -> list[Sink | None]:
    """Where the factors of each block's levels go: to its part of the draft ``state``. tokens: how many of the
    ``width`` of each row that is read contribute."""
    of = dict(zip(range(len(tokens)) if among is None else among, tokens))
    if all(of[b] == width for b in learners):
        return sinks_of(model, state, learners, counts, backend, among)
    real = mask(tokens, width, placement(model.embed).device)
    return sinks_of(model, state, learners, counts, backend, among, tokens, real)


def sinks_of(
    model: Model, state: ModelState, learners: list[int], counts: list[int] | None, backend: str | None,
    among: list[int] | None, tokens: list[int] | None = None, real: Tensor | None = None, rate: float = 1.0
) -> list[Sink | None]:
    """``ContinuumMemory.sink`` of each block, at ``rate`` times the rates that the guard of ``state`` allows."""
    allowed = None if state.guard is None else state.guard.rate
    scale = allowed if rate == 1 else (lambda b: rate * (1.0 if allowed is None else allowed(b)))
    like, found = placement(model.embed), []
    for block, cms in zip(model.blocks, state.cms):
        if cms is None or block.cms is None:
            found.append(None)
            continue
        ops = block.cms.ops(like.dtype, like.device, backend, inner=True)
        found.append(block.cms.sink(cms, learners, counts, ops, among, tokens, real, scale))
    return found


def plans_of(
    model: Model, state: ModelState, learners: list[int], counts: list[int] | None, tokens: list[int], reader: Reader
) -> list[dict[int, Plan]]:
    """``ContinuumMemory.plans`` of each block, at the rates that the guard of ``state`` allows."""
    scale = None if state.guard is None else state.guard.rate
    return [
        {} if cms is None or block.cms is None else block.cms.plans(cms, learners, counts, tokens, scale, known)
        for block, cms, known in zip(model.blocks, state.cms, reader.plans)
    ]


def judged(
    model: Model, state: ModelState, read: Segment, marked: list[int], learners: list[int], nats: Tensor,
    slopes: Tensor, reader: Reader | None = None
) -> Tensor:
    """``slopes`` of the segment ``read``, whose rows ``marked`` are the rows ``learners`` of the batch (or parts
    of a segment of its one learner), without those that the guard of ``state`` lets not learn; they leave
    ``learners``. reader: what has read the segment in C++, and does so with the model's own weights; or None."""
    if state.guard is None or not learners:
        return slopes

    def counted(found: Tensor) -> list[Tensor]:
        rows = [found[m, : read.targets.known[m]] for m in marked]
        return [torch.cat(rows)] if read.apart else rows

    def own() -> list[Tensor]:
        if reader is not None:
            return counted(reader.own_losses(state, read.mixers, read.ids, read.lengths, read.targets))
        mixers = [m.snapshot() for m in read.mixers]
        levels = [b.cms and b.cms.effective_levels(b.cms.init_state(len(read.lengths))) for b in model.blocks]
        with torch.no_grad():
            h, _ = model.run(model.embed(read.ids), mixers, levels, read.lengths, read.backend)
            found = read_head(model, h, read.lengths, read.targets, logits=False, backend=read.backend)
        assert found.nats is not None
        return counted(found.nats)

    bad = judge(state.guard, list(zip(model.blocks, state.cms)), list(learners), counted(nats), own)
    if not bad:
        return slopes
    if read.apart:
        learners.clear()
        return torch.zeros_like(slopes)
    keep = torch.ones(slopes.shape[0], 1, 1, dtype=torch.bool, device=slopes.device)
    keep[[m for m, b in zip(marked, learners) if b in bad]] = False
    learners[:] = [b for b in learners if b not in bad]
    return torch.where(keep, slopes, 0)


def read_graph(
    model: Model, state: ModelState, mixers: list[MixerState], ids: Tensor, lengths: list[int],
    backend: str | None, sinks: list[Sink | None] | list[Late | None], among: list[int] | None, apart: bool = False
) -> tuple[Tensor, list[MixerState], Tensor]:
    """The pass that learns, up to the head: h, the mixers after it, and the scalar its gradient is taken to."""
    anchor = torch.zeros((), dtype=torch.float32, device=ids.device, requires_grad=True)
    inner = [Inner(anchor, sink, among, apart) for sink in sinks]
    mixers = [_constant(m) for m in mixers]
    return *model.run(model.embed(ids).detach(), mixers, state.cms, lengths, backend, inner), anchor


def part_of(ids: Tensor, start: list[int], n: int) -> Tensor:
    """ids[b, start[b] : start[b] + n]; past the end of a row, its last token again."""
    if len(set(start)) == 1 and start[0] + n <= ids.shape[1]:
        return ids[:, start[0] : start[0] + n]
    first = torch.tensor(start, dtype=torch.long, device=ids.device).unsqueeze(1)
    index = first + torch.arange(n, device=ids.device)
    return ids.gather(1, index.clamp(max=ids.shape[1] - 1))


def _usable(t: Tensor) -> Tensor:
    """``t``, or a copy that autograd takes."""
    return t.clone() if t.is_inference() else t


def _constant(mixer: MixerState) -> MixerState:
    """A mixer's state as the inner graph may take it."""
    constant = not any(t.requires_grad or t.is_inference() for t in mixer.tensors())
    return mixer if constant else mixer.constant().usable()
