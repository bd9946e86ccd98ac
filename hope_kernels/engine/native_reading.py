"""What csrc/cpu/segment.h is handed for one segment: tokens, what mixers and levels have, and where all of it
lies."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_state import MixerState, ModelState
from ..ops.cms.plan import Plan, RowInverse, RowStep
from ..ops.cms.schedule import learning_levels
from ..ops.cms.state import CMSState
from ..ops.shared.cpu_library import POINTER, SIZE, Function, address, row_array
from ..ops.titans.cpp import TitansCall
from .head import Heads, Targets, check_logits, read_head
from .native import floats
from .native_level import LevelLowRank, LevelVectors
from .native_memories import Memory
from .native_mixer import GATES, SQUARE

MATRICES = ("up", "gate", "down")  # of a level; of those without a gate two
STEPS = tuple(f"{name}_step" for name in MATRICES)
INVERSES = {"inverse": "up", "inverse_down": "down"}  # of the inputs of these, where steps are preconditioned
HEAD_MOST = 4096  # as segment.h has it: the head of a larger vocabulary is PyTorch's, in pieces


class LevelCall(ctypes.Structure):
    """``SegmentLevel``."""

    _fields_ = [
        *((n, SIZE) for n in ("kind", "N", "learns", "preconditioned")), ("vectors", LevelVectors),
        *((n, POINTER) for n in MATRICES), ("low", LevelLowRank), *((n, POINTER) for n in (*STEPS, *INVERSES)),
        ("share", ctypes.c_float),
    ]


class BlockCall(ctypes.Structure):
    """``SegmentBlock``."""

    _fields_ = [
        *((n, POINTER) for n in ("attention", "post_gain", "gain", "conv", *SQUARE, *GATES, "beta_bias")),
        ("beta", ctypes.c_float), ("out_gain", POINTER), ("titans", TitansCall),
        ("before", Memory), ("after", Memory), ("levels", SIZE), ("level", POINTER), ("mixture", SIZE),
    ]


class SegmentCall(ctypes.Structure):
    """``SegmentCall``."""

    _fields_ = [
        *((n, SIZE) for n in ("B", "T", "d", "W", "vocab", "blocks", "threads", "stride", "rotations")),
        ("keep", ctypes.c_int32), ("eps", ctypes.c_float), ("scale", ctypes.c_float),
        *((n, POINTER) for n in ("ids", "len", "embed", "gain", "head", "block", "work", "targets", "known", "logits",
                                 "nats", "last", "h", "finite", "learns", "slopes")),
    ]


_read, _head, _learn = (Function(f"hope_segment_{n}", "HopeForCausalLM", POINTER) for n in ("read", "head", "learn"))


class Reading:
    """A segment of B rows of T tokens. Used again for the next segment of that shape, once it is done with."""

    reader: Any

    def __init__(self, reader: Any, B: int, T: int, keep: bool):
        self.reader, self.keep, self.shape, self._under_way = reader, keep, (B, T), None
        self.call = call = SegmentCall.from_buffer_copy(reader.call)
        self._blocks = blocks = type(reader.blocks).from_buffer_copy(reader.blocks)
        self._len = row_array([0] * B, B)
        self._levels: list[Any] = [type(of).from_buffer_copy(of) if len(of) else None for of in reader.levels]
        call.B, call.T, call.keep, call.block = B, T, keep, ctypes.addressof(blocks)
        call.stride = T
        call.len = ctypes.addressof(self._len)
        for block, levels in zip(blocks, self._levels):
            block.level = None if levels is None else ctypes.addressof(levels)
        self._places = reader.mixers.placed(call, blocks)
        self._weights: dict[tuple[int, int], tuple] = {}  # of (block, level): what its addresses were made of
        self._steps: dict[tuple[int, int], tuple] = {}
        self._work: Tensor | None = None

    def read(
        self, state: ModelState, mixers: Sequence[MixerState], ids: Tensor, lengths: list[int],
        among: list[int] | None
    ) -> list[MixerState]:
        """Reads ``lengths`` tokens of each row of ids: the mixers after it. ``mixers`` stay as they are."""
        under_way = self.begin(state, mixers, ids, lengths, among)
        _read(ctypes.addressof(self.call))
        return under_way.ended(lengths)

    def begin(
        self, state: ModelState, mixers: Sequence[MixerState], ids: Tensor, lengths: list[int],
        among: list[int] | None, several: bool = False
    ) -> Any:
        """Everything that a reading of ids [B, n] is told: the reading of the mixers, which is to be told its end.
        several: segments, one after another."""
        call, (B, _) = self.call, self.shape
        self.ids, self.lengths, self.among, self.before = ids, lengths, among, mixers
        call.ids, call.stride = address(ids, ids.numel(), "ids", torch.int64), ids.shape[1]
        found = self.reader.mixers.begin(self._places, call, self._blocks, mixers, lengths, several)
        self._under_way = found
        for i, cms in enumerate(state.cms):
            if cms is not None:
                self._take_weights(i, cms, range(B) if among is None else among, state.batch)
        if self._work is None:
            self._work = torch.empty(floats("hope_segment_floats", call), dtype=torch.float32, device="cpu")
            call.work = self._work.data_ptr()
        self._len[:] = lengths
        call.targets = call.nats = call.last = call.logits = call.learns = call.slopes = call.h = call.finite = None
        return found

    def results(self, targets: Targets | None, logits: bool) -> tuple[Heads, list[Any]]:
        """Where the head of ids [B, n] puts what it makes of them; and what has to live on until then."""
        call, (B, n), V = self.call, self.ids.shape, self.call.vocab
        made = nats = last = None
        call.targets = call.nats = call.last = call.logits = call.learns = call.slopes = call.h = call.finite = None
        held: list[Any] = []
        if logits:
            whole = min(self.lengths, default=n) == n
            made = torch.empty(B, n, V, dtype=torch.float32, device="cpu") if whole else zeros(B, n, V)
            call.logits = made.data_ptr()
        if targets is not None:
            nats, last = zeros(B, n), zeros(B, V)
            held = [targets.ids.contiguous(), row_array(targets.known, B)]
            call.targets = address(held[0], B * n, "targets", torch.int64)
            call.known, call.nats, call.last = ctypes.addressof(held[1]), nats.data_ptr(), last.data_ptr()
        return Heads(made, nats, last, None), held

    def head(
        self, targets: Targets | None, *, logits: bool, learners: list[bool] | None = None,
        check_finite: bool = False
    ) -> tuple[Heads, Tensor]:
        """What ``read_head`` makes of the reading; and what ``judged`` takes for slopes, where any are wanted: a
        stand-in where the slopes themselves stay in C++."""
        call, B = self.call, self.shape[0]
        if call.vocab > HEAD_MOST:
            _, held = self.results(None, False)
            h = zeros(*self.ids.shape, call.d)
            call.h = h.data_ptr()
            _head(ctypes.addressof(call))
            heads = read_head(
                self.reader.model, h, self.lengths, targets, logits=logits, learners=learners,
                check_finite=check_finite
            )
            return heads, h if heads.slopes is None else heads.slopes
        heads, held = self.results(targets, logits)
        marks = None if learners is None else (ctypes.c_int32 * B)(*learners)
        good = (ctypes.c_int32 * B)(*[1] * B)
        call.learns = None if marks is None else ctypes.addressof(marks)
        call.finite = ctypes.addressof(good) if check_finite else None
        _head(ctypes.addressof(call))
        del held
        if not all(good):
            self.refuse()
        return heads, zeros(B, 1, 1)

    def refuse(self, past: int = 0) -> None:
        """Raises ValueError for logits that are not finite: of the segment read last, behind ``past`` tokens."""
        T = self.shape[1]
        self.lengths = [min(max(n - past, 0), T) for n in self.lengths]
        part = self.ids[:, past : past + T]
        self.ids = F.pad(part, (0, T - part.shape[1])).contiguous()
        self._len[:], self.call.ids, self.call.stride = self.lengths, self.ids.data_ptr(), T
        heads, _ = self.results(None, True)
        assert heads.logits is not None
        _head(ctypes.addressof(self.call))
        check_logits(heads.logits, self.lengths)

    def learn(self, rows: list[bool], slopes: Tensor, plans: list[dict[int, Plan]]) -> None:
        """The steps that ``plans`` has for the marked rows, by block and level. slopes: as ``head`` has them."""
        call, B, marks = self.call, len(rows), (ctypes.c_int32 * len(rows))(*rows)
        places = [(b, b if self.among is None else self.among[b]) for b in range(B) if rows[b]]
        for i, planned in enumerate(plans):
            for l, plan in planned.items():
                self._take_steps(i, l, plan, places)
        call.learns = ctypes.addressof(marks)
        if call.vocab > HEAD_MOST:
            slopes = slopes.contiguous()
            call.slopes = address(slopes, B * call.T * call.d)
        _learn(ctypes.addressof(call))

    def done(self) -> None:
        """Nobody needs what was kept any more, nor the mixers before it."""
        self.reader.give_back(self, self.before)

    def rest(self) -> None:
        """Nobody needs it until it is used again: what it holds would otherwise live on until garbage is collected."""
        self.reader = self._under_way = None

    def _take_weights(self, i: int, state: CMSState, among: Sequence[int], batch: int) -> None:
        """The levels of block ``i`` are what ``state`` has of them."""
        levels = self._levels[i]
        learns = learning_levels(state.config) if self.keep else []
        for l, names in enumerate(self.reader.matrices[i]):
            held, own = state.weights[l], state.own[l]
            tensors, known = [] if held is None else list(held.values()), self._weights.get((i, l))
            same = known is not None and len(tensors) == len(known[0]) and all(map(is_, tensors, known[0]))
            if known is not None and same and known[1] == own and known[2] == among:
                continue
            at, kept = levels[l], []
            at.learns, low = l in learns, at.low if at.low.rank else None
            for name, shared, count in names:
                first = None if held is None else address(held[name], batch * count)
                mine = [first + 4 * count * b if first and own[b] else None for b in among]
                found = [(at, [m or shared for m in mine])] if low is None else [
                    (at, [shared] * len(mine)), (low, mine)]
                for to, of in found:
                    rows = (POINTER * len(of))(*of)
                    kept.append(rows)
                    setattr(to, name, ctypes.addressof(rows))
            self._weights[i, l] = (tensors, list(own), among, kept)

    def _take_steps(self, i: int, l: int, plan: Plan, places: list[tuple[int, int]]) -> None:
        """Level ``l`` of block ``i`` does what ``plan`` says in the rows (of the reading, of the batch)."""
        known, level = self._steps.get((i, l)), self._levels[i][l]
        if known is None or known[0] is not plan.steps or known[1] != places:
            self._steps[i, l] = known = (plan.steps, places, arrays_of(plan, self.shape[0], places), plan.held)
        for name, array in zip((*STEPS, *INVERSES), known[2]):
            setattr(level, name, None if array is None else ctypes.addressof(array))


def arrays_of(plan: Plan, B: int, places: list[tuple[int, int]]) -> list[Any]:
    """What ``plan`` has for ``STEPS`` and ``INVERSES``, for the rows ``places`` (of a reading of B rows, of the batch);
    None: for none of them."""
    arrays: list[Any] = []
    for name in MATRICES:
        steps = (RowStep * B)()
        for here, b in places:
            if (name, b) in plan.steps:
                steps[here] = plan.steps[name, b]
        arrays.append(steps)
    for name in INVERSES.values():
        inverses = (RowInverse * B)()
        for here, b in places:
            if (name, b) in plan.inverses:
                inverses[here] = plan.inverses[name, b]
        arrays.append(inverses if plan.inverses else None)
    return arrays


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")
