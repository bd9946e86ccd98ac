"""Segments one after another in one call of C++ (csrc/cpu/segments.cpp): whatever is read without learning, and
segments that are learned as they are read, as far as nothing is due between two of them that only Python can do.

What is learned, and the bits, are those of segments read one by one: the same functions are called.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model_state import ModelState
from ..ops.cms.plan import Plan, take_back
from ..ops.cms.state import CMSState
from ..ops.shared.cpu_library import POINTER, SIZE, Function
from ..state import Counters
from .guard import EVERY, SHARE, rise
from .head import Heads, Targets, read_head
from .native_reading import HEAD_MOST, INVERSES, STEPS, Reading, SegmentCall, arrays_of, zeros
from .native_segment import Reader

PIECE = 128  # tokens, of all rows together, that are read at a time: what they are on the way stays in the cache
AHEAD = 32  # segments that are planned ahead

PlansAt = Callable[[list[int]], list[dict[int, Plan]]]

_several = Function("hope_segments", "HopeForCausalLM", POINTER, POINTER)


class SegmentsCall(ctypes.Structure):
    """``SegmentsCall`` of csrc/cpu/segment.h."""

    _fields_ = [
        ("first", SegmentCall), ("count", SIZE), *((n, POINTER) for n in ("other", "steps", "mean")),
        ("rise", ctypes.c_double), ("share", ctypes.c_double),
    ]


class Read(NamedTuple):
    """Segments as far as they came. done: how many; heads: of all, where those that are not done do not count."""

    done: int
    heads: Heads
    mixers: list[Any]


def read_frozen(
    reader: Reader, state: ModelState, ids: Tensor, lengths: list[int], targets: Targets | None, *, logits: bool,
    check_finite: bool
) -> tuple[Heads, list[Any]]:
    """``lengths`` tokens of each row of ids [B, n], read with what ``state`` has learned: what ``read_head`` makes of
    them, and the mixers after it."""
    B, n = ids.shape
    threads = torch.get_num_threads()
    T = min(n, max(PIECE * threads // max(B, 1) // 16, 1) * 16)
    reading = reader.reading(B, T, False)
    if reading.call.vocab > HEAD_MOST:
        h = zeros(B, n, reading.call.d)
        read = _read(reading, state, ids, lengths, None, -(-n // T), False, False, h=h)
        return read_head(reader.model, h, lengths, targets, logits=logits, check_finite=check_finite), read.mixers
    read = _read(reading, state, ids, lengths, targets, -(-n // T), logits, check_finite)
    if read.done < -(-n // T):
        reading.refuse(read.done * T)
    return read.heads, read.mixers


def segments_ahead(model: Any, state: ModelState, known: list[int], reader: Reader) -> int:
    """How many segments, from where ``state`` stands, are learned in one call; known: tokens from here on whose next
    one is known, of each row. 0: they are to be read one by one."""
    C, guard = model.segment, state.guard
    if not reader.serves(state) or reader.call.vocab > HEAD_MOST or any(state.seen) or any(p % C for p in state.pos):
        return 0
    found = min([AHEAD, *[k // C for k in known]])
    if guard is not None:  # whose looks are Python's
        found = min([found, *[EVERY - n + looked if n > 1 else 0 for n, looked in zip(guard.pos, guard.looked)]])
    for cms in state.cms:
        if cms is not None:
            found = min([found, *_until_taken_back(cms, C)])
    return found if found > 1 else 0


def _until_taken_back(cms: CMSState, C: int) -> list[int]:
    """Segments until nested levels of some row go back to the shared weights, which is done behind the last one: what
    these levels sum up, and the weights they read with, are tensors of the whole call."""
    if cms.config.variant != "nested":
        return []
    return [(period - p % period) // C for period in cms.config.chunks[1:] for p in cms.pos]


def learn_several(
    model: Any, state: ModelState, ids: Tensor, targets: Targets, count: int, plans_at: PlansAt, reader: Reader, *,
    logits: bool, check_finite: bool
) -> Read:
    """Reads ``count`` segments of every row, ids [B, n], and learns them: the draft ``state.cms`` and the guard
    change. Ends before a segment that has to be read alone: of which logits are not finite, or whose losses the guard
    wants to look at. plans_at: what a segment does that ends at these counts."""
    C, B, guard = model.segment, state.batch, state.guard
    reading, marks, plans = reader.reading(B, C, True), [], []
    for i in range(count):
        marks.append([_counters(c) for c in state.cms])
        plans.append(plans_at([p + (i + 1) * C for p in state.pos]))
    steps, held = _pointers(plans, reader, B)
    mean = (ctypes.c_double * B)(*([] if guard is None else guard.mean.tolist()))
    read = _read(
        reading, state, ids, [count * C] * B, targets, count, logits, check_finite, steps=ctypes.addressof(steps),
        mean=None if guard is None else ctypes.addressof(mean), rise=rise(C), share=SHARE,
    )
    del held
    reader.give_back(reading, state.mixers if read.done else [])
    for cms, counters in zip(state.cms, marks[read.done]) if read.done < count else ():
        if cms is not None:
            cms.own[:], cms.tokens[:], cms.dirty[:], cms.steps[:] = counters
    if read.done == count:
        for cms, levels in zip(state.cms, plans[-1]):
            take_back(cms, levels)
    if guard is not None:
        guard.mean = torch.tensor(list(mean), dtype=torch.float64, device="cpu")
        guard.pos[:] = [n + read.done for n in guard.pos]
    return read


def _counters(cms: CMSState | None) -> list[list[Counters]]:
    """What a plan moves."""
    return [] if cms is None else [[Counters(c) for c in of] for of in (cms.own, cms.tokens, cms.dirty, cms.steps)]


def _pointers(plans: list[list[dict[int, Plan]]], reader: Reader, B: int) -> tuple[Any, list[Any]]:
    """``SegmentsCall.steps``, and what has to live on while they are used."""
    places, known, found = [(b, b) for b in range(B)], {}, []
    for segment in plans:
        for levels, planned in zip(reader.levels, segment):
            for l in range(len(levels)):
                plan = planned.get(l)
                if plan is not None and id(plan.steps) not in known:
                    known[id(plan.steps)] = plan, arrays_of(plan, B, places)
                arrays = [None] * len((*STEPS, *INVERSES)) if plan is None else known[id(plan.steps)][1]
                found += [None if array is None else ctypes.addressof(array) for array in arrays]
    return (POINTER * len(found))(*found), list(known.values())


def _read(
    reading: Reading, state: ModelState, ids: Tensor, lengths: list[int], targets: Targets | None, count: int,
    logits: bool, check_finite: bool, h: Tensor | None = None, **learning: Any
) -> Read:
    """``count`` segments. h: becomes what the head is given. learning: ``steps`` and more of a ``SegmentsCall``."""
    B, T = reading.shape
    under_way = reading.begin(state, state.mixers, ids.contiguous(), lengths, None, several=count > 1)
    heads, held = reading.results(targets, logits)
    good, marks = (ctypes.c_int32 * B)(), (ctypes.c_int32 * B)(*[1] * B)
    call = reading.call
    call.finite = ctypes.addressof(good) if check_finite else None
    call.learns = ctypes.addressof(marks) if learning else None
    call.h = None if h is None else h.data_ptr()
    done = ctypes.c_int64()
    several = SegmentsCall(first=call, count=count, other=ctypes.addressof(under_way.other), **learning)
    _several(ctypes.addressof(several), ctypes.addressof(done))
    del held
    after = under_way.ended([min(n, done.value * T) for n in lengths], done.value)
    return Read(done.value, heads, after)
