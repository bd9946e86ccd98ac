"""Learning segments over one set of buffers: what reading and learning a segment takes is recorded in CUDA
graphs once, and done again for every segment of the same kind.

    1. its tokens into the buffers; and of Adam the numbers that change from step to step
    2. read:  embedding, blocks, head, losses and their gradient by h            <- a graph
    3. the guard, where there is one, looks at the losses (on the host)
    4. learn: the gradient through the blocks, the steps of the levels that are due, mixers   <- a graph
    5. counters on the host

Python decides in 2 and 4 by numbers that the host knows. They are what makes a kind (``_kind``): which levels
are due, and what each has accumulated or keeps waiting; the phase of the memories' chunks; rates. (Adam's
corrections are other ones at every step: recorded steps read them from the device, where 1 puts them.) With
periods of 1, 2 and 4 segments there are four kinds once all levels have learned. The first segment of a kind
is learned as ever, which also compiles kernels and starts libraries; the second one is recorded. It is
learned both ways, the other time on a copy of the state, and unless all bits agree nothing is recorded any
more. So no result ever rests on a graph that has not been seen to do what the code does.

What a graph holds are addresses. All of the state's tensors are written in place; once some have been
exchanged, all kinds are recorded again.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..check import check_tensor
from ..identity import checksum
from ..layers.wrapped import is_hooked, placement
from ..model_state import ModelState, advance
from ..recorder import Part, Recorder, alike
from ..state import expanded, master_dtype
from . import segments
from .head import Heads, Losses, Targets
from .protocol import Model
from .recorded_steps import RecordedSteps
from .segments import Segment
from .unread import check_read_next
from .wavefront import chunk_of

BACKENDS = (None, "chunked", "triton")  # their memories ask the host for the phase of a chunk and nothing else
KINDS = 32  # recorded at most; any further one is learned as ever
Moved = dict[torch.dtype, tuple[list[Tensor], list[Tensor]]]  # from, to
_COUNTERS = ("own", "rank", "dirty", "tokens")  # of a level, by which it is decided what a segment does to it


def unserved(model: Model, backend: str | None) -> str | None:
    """Why segments of a model cannot be recorded, or None."""
    if model.parallel is not None:
        return "is divided over processes, which agree before every call of the model itself"
    if not model.learns:
        return "has no level that learns"
    if model.config.mixer == "attention":
        return "has attention, whose cache grows with the sequence"
    if backend not in BACKENDS:
        return f"reads on backend {backend!r}, not one of {BACKENDS}"
    for c in model.config.block_cms:
        if c is not None and c.precondition is not None:
            return "learns with precondition, whose factorization may wait for the device"
    inside = model.modules() if isinstance(model, nn.Module) else ()
    hooked = not model.plain or any(is_hooked(m) for m in inside)
    return "has hooks or a forward of its own, which a graph does not call" if hooked else None


@dataclass
class _Kind:
    """A kind of segments as it was recorded. tensors: of the state, which the graphs read and write; moved:
    (from, to), the mixers after a segment and the state's own, by dtype; after: counters of the levels,
    ``steps`` but for Adam's."""

    read: Part
    learn: Part
    heads: Heads
    tensors: list[Tensor]
    moved: Moved
    after: list[list[int]]
    steps: RecordedSteps
    checked: bool = False


class SegmentGraphs:
    """Reads whole segments with learn="next_token", advancing ``state`` in place: losses, state and counters
    of the model's own call under ``no_grad``, bit for bit.

    backend: as in the model's ``forward``. recorder: see ``recorder.py``. recorded, replayed: how many
    kinds, and how many segments from their graphs, so far. The state may be used by others between calls. A
    call that raises leaves it after some of its segments, unlike the model's ``forward``. Raises ValueError
    where ``unserved`` has a reason.
    """

    def __init__(self, model: Model, state: ModelState, backend: str | None, recorder: Recorder):
        reason = unserved(model, backend)
        if reason is not None:
            raise ValueError(f"SegmentGraphs: argument model {reason}")
        self.model, self.state, self.backend = model, state, backend
        self.recorder: Recorder | None = recorder  # None: nothing can be recorded after all
        self.recorded = self.replayed = 0
        like, shape = placement(model.embed), (state.batch, model.segment)
        self._dtype = master_dtype(like.dtype)
        self._lengths = [model.segment] * state.batch
        self._periods = sorted({p for c in model.config.block_cms if c is not None for p in c.chunks})
        self._chunk = chunk_of(model.config)
        with torch.inference_mode(False):
            if any(t.requires_grad or t.is_inference() or expanded(t) for t in state.tensors()):
                state.assign(state.usable())
            self._ids, self._following = (
                torch.zeros(shape, dtype=torch.int64, device=like.device) for _ in range(2)
            )
            self._finite = torch.ones((), dtype=torch.bool, device=like.device)
        self._kinds: dict[tuple, _Kind] = {}
        self._met: set[tuple] = set()  # kinds that have been learned once
        self._mark: object = None  # of the weights that the graphs read

    @torch.no_grad()
    def read(self, ids: Tensor, following: Tensor, guard: bool, check_finite: bool = False) -> Losses | None:
        """ids [B, T]: segments; following [B]: the token after them, all int64. guard, check_finite: as in
        the model's ``forward``; non-finite logits are seen once all of ids has been read.

        None where the model's own call has to read them: parts of segments, rows at several places, an open
        segment, no rows, segments that are kept, a guard that begins or ends. Nothing has happened then.
        Raises as ``forward`` does."""
        name, state, model = "SegmentGraphs.read", self.state, self.model
        C, B = model.segment, state.batch
        T = check_tensor(name, "ids", ids, (B, "T"), torch.int64, self._ids.device).get("T", 0)
        check_tensor(name, "following", following, (B,), torch.int64, ids.device)
        model.claim(name, state)
        if not T or T % C or not self._serves(guard):
            return None
        tokens = torch.cat([ids, following.unsqueeze(1)], 1)
        if check_finite or ids.device.type == "cpu":
            low, high = torch.stack([tokens.amin(), tokens.amax()]).tolist()
            if low < 0 or high >= model.config.vocab_size:
                return None  # whose call says what is wrong, and where
        check_read_next(name, state.unread, ids, [T] * B)
        mark = checksum(cast("nn.Module", model))
        if mark is None or mark is not self._mark:
            self._kinds, self._met, self._mark = {}, set(), mark
        nats = torch.empty(B, T, dtype=self._dtype, device=ids.device)
        with model.reading(name, state), torch.inference_mode(False):
            state.drop_held()
            state.unread = None
            self._finite.fill_(True)
            last = nats
            for a in range(0, T, C):
                found = self._segment(tokens[:, a : a + C], tokens[:, a + 1 : a + C + 1])
                assert found.nats is not None and found.last is not None
                nats[:, a : a + C].copy_(found.nats)
                last = found.last
            if check_finite and not bool(self._finite):
                raise ValueError(f"{name}: non-finite logits (weights, state or learning rates diverged); "
                                 "the state is past them")
            return Losses(nats, last.clone())

    def _serves(self, guard: bool) -> bool:
        """Whether the state is one that segments can be read into here."""
        state, C = self.state, self.model.segment
        if state.batch == 0 or state.pos[0] % C or len(set(state.pos)) > 1 or any(state.seen):
            return False
        return state.kept is None and guard == (state.guard is not None)

    def _kind(self) -> tuple | None:
        """All numbers by which Python decides what the next segment does; None: they are not those of one
        kind."""
        state, pos = self.state, self.state.pos[0]
        of = [c for c in state.cms if c is not None]
        counters = [level for c in of for n in _COUNTERS for level in getattr(c, n)]
        if any(n != level[0] for level in (*counters, *(l for c in of for l in c.steps)) for n in level):
            return None  # rows with weights of their own beside others: an index from the host
        if state.guard is not None and (state.batch > 1 or any(level[0] for c in of for level in c.rank)):
            return None  # of several rows some may go back; and what it keeps is folded first
        rates = None if state.guard is None else tuple(state.guard.rollbacks)
        ends = tuple([(pos + self.model.segment) % period == 0 for period in self._periods])
        return pos % self._chunk, ends, rates, tuple([level[0] for level in counters])

    def _segment(self, ids: Tensor, targets: Tensor) -> Heads:
        """Reads and learns one segment."""
        kind = None if self.recorder is None else self._kind()
        found = None if kind is None else self._kinds.get(kind)
        if found is not None and not _same(found.tensors, self._tensors()):
            self._kinds, found = {}, None
        if found is None and kind in self._met and len(self._kinds) < KINDS:
            found = self._record(kind)
        if found is None:
            if kind is not None and kind not in self._met and len(self._met) < 4 * KINDS:
                self._met.add(kind)
                return self._learn(self.state, ids, targets, first=True)
            return self._learn(self.state, ids, targets)
        if not found.checked:
            return self._both(found, ids, targets)
        return self._replay(found, ids, targets)

    def _learn(self, state: ModelState, ids: Tensor, targets: Tensor, first: bool = False) -> Heads:
        """As the model does it, in place. first: with every kernel that a recording launches, so that each has
        been compiled and loaded by then."""
        lengths, draft = self._lengths, segments.draft(state, "all")
        counts = [p + n for p, n in zip(state.pos, lengths)]
        if first:
            RecordedSteps(state, counts, self._dtype, at_once=True).used_by(draft)
            _move(_by_dtype((t, t) for mixer in state.mixers for t in mixer.tensors()))
        heads, mixers = segments.learn_segment(
            self.model, draft, state.mixers, ids, Targets(targets, lengths), [True] * len(lengths), lengths,
            counts, self.backend, logits=False, finite=self._finite,
        )
        state.assign(segments.finished(advance(draft, mixers, lengths)))
        return heads

    def _record(self, kind: tuple) -> _Kind | None:
        """The next segment, which is of this kind; None, and nothing any more, where that is impossible."""
        assert self.recorder is not None
        state, lengths, before = self.state, self._lengths, self._tensors()
        everybody, targets = list(range(state.batch)), Targets(self._following, lengths)
        counts = [p + n for p, n in zip(state.pos, lengths)]
        steps = RecordedSteps(state, counts, self._dtype)
        draft = steps.used_by(segments.draft(state, "all"))
        found: list[segments.ReadToLearn] = []
        moved: Moved = {}

        def read() -> None:
            sinks = segments.sinks_of(self.model, draft, everybody, counts, self.backend, None)
            of = Segment(state.mixers, self._ids, targets, lengths, self.backend)
            with torch.enable_grad():
                found.append(segments.read_to_learn(
                    self.model, draft, of, [True] * len(lengths), sinks, logits=False, finite=self._finite
                ))

        def learn() -> None:
            assert found[0].heads.slopes is not None
            with torch.enable_grad():
                found[0].learn(found[0].heads.slopes)
            pairs = zip(found[0].mixers, state.mixers)
            moved.update(_by_dtype(
                pair for new, old in pairs for pair in zip(new.tensors(), old.tensors(), strict=True)
                if pair[0] is not pair[1]
            ))
            _move(moved)

        try:
            again, learn_again = self.recorder.record([read, learn])
        except RuntimeError as e:
            self._refuse(f"learning segments cannot be recorded here ({e})")
            return None
        after = [level for c in draft.cms if c is not None for n in _COUNTERS for level in getattr(c, n)]
        if not _same(before, _tensors(draft)):  # it would make what the state is to keep
            self._met.discard(kind)
            return None
        self.recorded += 1
        self._kinds[kind] = made = _Kind(again, learn_again, found[0].heads, before, moved, after, steps)
        return made

    def _replay(self, kind: _Kind, ids: Tensor, targets: Tensor) -> Heads:
        state, lengths, learners = self.state, self._lengths, list(range(self.state.batch))
        self._ids.copy_(ids)
        self._following.copy_(targets)
        kind.read()
        if state.guard is not None:
            assert kind.heads.nats is not None and kind.heads.slopes is not None
            of = Segment(state.mixers, self._ids, Targets(self._following, lengths), lengths, self.backend)
            draft = segments.draft(state, "all")
            segments.judged(
                self.model, draft, of, list(learners), learners, kind.heads.nats, kind.heads.slopes
            )
            state.assign(segments.finished(draft))
        if learners:
            kind.steps.take()
            kind.learn()
            held = [level for c in state.cms if c is not None for n in _COUNTERS for level in getattr(c, n)]
            for level, counts in zip(held, kind.after):
                level[:] = counts
        else:
            _move(kind.moved)
        for part in (state, *state.mixers, *state.cms):
            if part is not None:
                part.pos[:] = [p + n for p, n in zip(part.pos, lengths)]
        self.replayed += 1
        return kind.heads

    def _both(self, kind: _Kind, ids: Tensor, targets: Tensor) -> Heads:
        """The first time: from the graph, and on a copy of the state as the model does it."""
        apart = self.state.clone()
        mine, heads = self._replay(kind, ids, targets), self._learn(apart, ids, targets)
        pairs = list(zip(self.state.tensors(), apart.tensors(), strict=True))
        pairs += [(a, b) for a, b in zip(mine, heads) if a is not None and b is not None]
        kind.checked = self.state._counters() == apart._counters() and alike(pairs)
        if kind.checked:
            return mine
        self._refuse("a recorded learning segment has other bits than the segment itself")
        self.state.assign(apart)
        return heads

    def _refuse(self, why: str) -> None:
        warnings.warn(f"SegmentGraphs: {why}; none is recorded any more", RuntimeWarning, stacklevel=2)
        self.recorder, self._kinds = None, {}

    def _tensors(self) -> list[Tensor]:
        return _tensors(self.state)


def _tensors(state: ModelState) -> list[Tensor]:
    """What a segment reads and writes of a state."""
    return [t for part in (*state.mixers, *state.cms) if part is not None for t in part.tensors()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _by_dtype(pairs: Iterable[tuple[Tensor, Tensor]]) -> Moved:
    found: Moved = {}
    for pair in pairs:
        for side, t in zip(found.setdefault(pair[0].dtype, ([], [])), pair):
            side.append(t)
    return found


def _move(tensors: Moved) -> None:
    """Copies, a launch or two for all of a dtype."""
    for new, old in tensors.values():
        torch.ops.aten._foreach_copy_.default(old, new)
