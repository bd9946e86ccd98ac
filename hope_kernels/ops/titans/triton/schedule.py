"""A whole call in one launch: every chunk of every row, read and written, in tasks that the programs of a
persistent kernel take in turn.

    for every chunk of the faster clock:
        read     memories x C / CT       o, and k, v, eta, alpha into the open chunk (read.py)
    and for each clock whose chunk ends there:
        clock    1                       decays and transformed keys (clock.py, momentum.py)
        errors   memories x C / CT       e (commit.py)
        hidden   memories x N / NT       a, d; a memory's last one its gain (gain.py)
        update   memories x N / NT       the new weights

Every task is for one (row, head) g. A task may start when the tasks before it *of its own g* are done: a
counter per g and kind, released after a task's stores and acquired before a task's loads. So rows and heads
drift apart freely, and the kernel has no other barrier.

With adaptive_q the read tasks of a g run through its memories backwards, and M_memory's wait for M_q's, a
counter of their own.

Tasks are taken in the order above (chunk, kind, g) by an atomic ticket. A task waits only for tasks with
smaller tickets, and those have been taken by programs that are running: no order of scheduling and no number
of programs can deadlock, and the grid is a matter of speed only. Which program runs a task changes nothing in
its arithmetic: reductions lie inside a task, in one order.

The device alone decides what there is to do, from pos and length of every row: which chunks, which commits.
The host knows shapes; a launch is the same whether it reads one token or many, and can be replayed from a
CUDA graph. States travel through L2 (50 MB on an H100 hold a layer of H = 32, N = 256), scratch likewise: e, a, d,
norms of the chunk in flight.
"""

import triton
import triton.language as tl

from .clock import clock_body
from .commit import errors_task, hidden_task, update_task
from .gain import gain_task
from .momentum import momentum_body
from .read import append_task, close_task, read_task

if triton.knobs.runtime.interpret:
    # the interpreter of Triton 3.6 takes any condition for true
    tl.condition.__bool__ = lambda self: bool(self.condition)

# Counters of a (row, head), of tasks done since the call began. Lines of their own keep rows apart.
READS, QUERIES = tl.constexpr(0), tl.constexpr(1)  # reads of all memories; of M_q among them
CLOCK, ERRORS, HIDDEN, UPDATES = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
SLOW = tl.constexpr(4)  # the slower clock's clock, errors, hidden and updates follow at this distance
TILES_DONE = tl.constexpr(10)  # and hidden tasks of each memory, at most 6
LINE = tl.constexpr(16)


@triton.jit
def _wait(counter_p, count):
    while tl.atomic_add(counter_p, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _done(counter_p):
    tl.debug_barrier()
    tl.atomic_add(counter_p, 1, sem="release")


@triton.jit
def _quotient(ticket, size):
    """ticket // size, int32: a quotient of 64 bits is dear, and seldom needed."""
    if ticket < 2147483648:
        found = ticket.to(tl.int32) // size
    else:
        found = (ticket // size).to(tl.int32)
    return found


@triton.jit
def _slots(progress, b, inside, T, BIG: tl.constexpr):
    """(phase, stop) of rows b: the slots they read, counted from the start of their open chunk of the slower
    clock."""
    phase = tl.load(progress.pos + b, mask=inside, other=0) % BIG
    # a length may have been computed on the device, where nothing has checked it
    n = tl.minimum(tl.maximum(tl.load(progress.lengths + b, mask=inside, other=0), 0), T)
    return phase.to(tl.int32), (phase + n).to(tl.int32)


@triton.jit
def _extent(progress, B, T, BIG: tl.constexpr):
    """(first, stop): the slots that some row reads in this call."""
    first, stop = tl.full([], BIG, tl.int32), tl.full([], 0, tl.int32)
    for b0 in range(0, B, 32):
        b = b0 + tl.arange(0, 32)
        phase, end = _slots(progress, b, b < B, T, BIG)
        first = tl.minimum(first, tl.min(tl.where(end > phase, phase, BIG), 0))
        stop = tl.maximum(stop, tl.max(tl.where(end > phase, end, 0), 0))
    return first, stop


@triton.jit
def _commit(
    weights, in_force, momentum, pending, scratch, progress, task, G, T, end, grad_scale, clock: tl.constexpr,
    tiles: tl.constexpr, KIND: tl.constexpr, READ_UNITS: tl.constexpr, SMALL: tl.constexpr, BIG: tl.constexpr,
    shape: tl.constexpr, rule: tl.constexpr, no_base: tl.constexpr,
):
    """Task number ``task`` of the commit of a clock's memories at slot ``end``; KIND: 0 or SLOW, where this
    clock's counters are."""
    H: tl.constexpr = shape.H
    C: tl.constexpr = clock.C
    PARTS: tl.constexpr = (clock.M1 - clock.M0) * (C // tiles.WALK_CT)
    TILES: tl.constexpr = (clock.M1 - clock.M0) * (shape.N // tiles.TILE_NT)
    local = task - G * (1 + PARTS)
    stage = tl.where(local < 0, 0, tl.where(local < G * TILES, 1, 2))
    local = tl.where(stage == 2, local - G * TILES, local)
    i_g = tl.where(stage == 0, task // (1 + PARTS), local // TILES)
    unit = tl.where(stage == 0, task % (1 + PARTS), local % TILES)
    phase, stop = _slots(progress, i_g // H, True, T, BIG)
    if (phase < end) & (end <= stop):
        counters = progress.sync + (i_g + 1) * LINE
        chunks = end // C - phase // C  # commits of this clock, this one included
        first = (end - C) % BIG
        # with momentum every task adds up its weights itself: one with both ways would spill on sm_80
        updated, more = False, False
        if not rule.MOMENTUM:
            updated, more = chunks > 1, end < stop
        g = i_g.to(tl.int64)
        if stage == 0:
            _wait(counters + READS, (end // SMALL - phase // SMALL) * READ_UNITS)
            if unit == 0:
                start = (g // H) * BIG + first
                clock_body(pending, scratch, g, start=start, h=g % H, shape=shape, rule=rule, C=C)
                if rule.MOMENTUM:
                    momentum_body(pending, scratch, g, start=start, h=g % H, shape=shape, rule=rule, C=C)
                _done(counters + KIND + CLOCK)
            else:
                m = clock.M0 + (unit - 1) // (C // tiles.WALK_CT)
                c0 = (unit - 1) % (C // tiles.WALK_CT) * tiles.WALK_CT
                errors_task(
                    weights, in_force, updated, pending, scratch, g, m, c0=c0,
                    start=(g // H) * BIG + first, grad_scale=grad_scale, shape=shape, rule=rule,
                    no_base=no_base, C=C, CT=tiles.WALK_CT, NT=tiles.WALK_NT,
                )
                _done(counters + KIND + ERRORS)
        else:
            m, tile = clock.M0 + unit // (shape.N // tiles.TILE_NT), unit % (shape.N // tiles.TILE_NT)
            if stage == 1:
                _wait(counters + KIND + ERRORS, chunks * PARTS)
                hidden_task(
                    weights, in_force, updated, pending, scratch, g, m, tile=tile,
                    start=(g // H) * BIG + first, shape=shape, rule=rule, C=C, CT=tiles.TILE_CT,
                    NT=tiles.TILE_NT,
                )
                tl.debug_barrier()
                done = tl.atomic_add(counters + TILES_DONE + m, 1, sem="acq_rel")
                if done == chunks * (shape.N // tiles.TILE_NT) - 1:
                    _wait(counters + KIND + CLOCK, chunks)
                    gain_task(
                        pending.eta, scratch, g, m, start=(g // H) * BIG + first, factor=grad_scale,
                        shape=shape, C=C, TILES=shape.N // tiles.TILE_NT, CLIP=rule.CLIP,
                    )
                _done(counters + KIND + HIDDEN)
            else:
                _wait(counters + KIND + HIDDEN, chunks * TILES)
                update_task(
                    weights, in_force, more, momentum, pending, scratch, g, m, tile=tile,
                    start=(g // H) * BIG + first, shape=shape, rule=rule, C=C, CT=tiles.TILE_CT,
                    NT=tiles.TILE_NT,
                )
                _done(counters + KIND + UPDATES)


@triton.jit(do_not_specialize=["B", "T"])
def scan_kernel(
    reads, given, weights, in_force, momentum, pending, biases, progress, fast_scratch, slow_scratch,
    B: tl.int32, T: tl.int64, eta_scale: tl.float32, grad_scale: tl.float32, UPDATE: tl.constexpr,
    PRODUCE: tl.constexpr, fast: tl.constexpr, slow: tl.constexpr, fast_tiles: tl.constexpr,
    slow_tiles: tl.constexpr, shape: tl.constexpr, rule: tl.constexpr, no_base: tl.constexpr,
):
    """The memories of clock ``fast`` commit every fast.C tokens, those of ``slow`` (if any) every slow.C; all
    of them are read every fast.C tokens. Groups of arguments: groups.py.

    Pending slots: slow.C a row; pos, lengths [B] int64; sync [(1 + B H) * LINE] int64, zeros. Scratch, for
    each clock: see ``_commit``'s tasks. PRODUCE: the memories make k, v, eta, alpha, else they are given.
    """
    H: tl.constexpr = shape.H
    SMALL: tl.constexpr = fast.C
    BIG: tl.constexpr = slow.C
    STEPS: tl.constexpr = BIG // SMALL
    MEMORIES: tl.constexpr = shape.MF + shape.MS
    READ_MEMORIES: tl.constexpr = MEMORIES if PRODUCE else 2 if rule.ADAPTIVE_Q else 1
    PARTS: tl.constexpr = SMALL // fast_tiles.WALK_CT
    READ_PARTS: tl.constexpr = READ_MEMORIES * PARTS
    READ_UNITS: tl.constexpr = READ_PARTS + (SMALL // 16 if UPDATE and not PRODUCE else 0)
    FAST_UPDATES: tl.constexpr = (fast.M1 - fast.M0) * (shape.N // fast_tiles.TILE_NT)
    FAST_UNITS: tl.constexpr = 1 + (fast.M1 - fast.M0) * PARTS + 2 * FAST_UPDATES if UPDATE else 0
    SLOW_UPDATES: tl.constexpr = (slow.M1 - slow.M0) * (shape.N // slow_tiles.TILE_NT)
    SLOW_PARTS: tl.constexpr = (slow.M1 - slow.M0) * (BIG // slow_tiles.WALK_CT)
    SLOW_UNITS: tl.constexpr = 1 + SLOW_PARTS + 2 * SLOW_UPDATES if UPDATE and slow.M1 > slow.M0 else 0
    G = B * H
    per_step = G * (READ_UNITS + FAST_UNITS)
    per_round = STEPS * per_step + G * SLOW_UNITS
    first, stop = _extent(progress, B, T, BIG)
    # tickets count the tasks of all steps since the slower clock's chunk began; those before the first slot
    # are not given out
    skipped = first // SMALL * per_step
    total = (stop // BIG).to(tl.int64) * per_round + stop % BIG // SMALL * per_step + (
        stop % SMALL > 0
    ) * G * READ_UNITS
    closing = total + (G if UPDATE else 0)

    ticket = skipped + tl.atomic_add(progress.sync, 1, sem="relaxed")
    # hoisting what does not change from task to task (addresses, mostly) out of the loop would take all
    # registers
    while tl.condition(ticket < closing, disable_licm=True):
        if ticket >= total:
            g = (ticket - total).to(tl.int32)
            phase, end = _slots(progress, g // H, True, T, BIG)
            if (end > phase) & (end >= BIG):
                counters = progress.sync + (g + 1) * LINE
                _wait(counters + UPDATES, (end // SMALL - phase // SMALL) * FAST_UPDATES)
                if SLOW_UNITS > 0:
                    _wait(counters + SLOW + UPDATES, end // BIG * SLOW_UPDATES)
                close_task(pending, g.to(tl.int64), stop=end, shape=shape, rule=rule, BIG=BIG, CT=16)
        else:
            turn = _quotient(ticket, per_round)
            task = (ticket - turn.to(tl.int64) * per_round).to(tl.int32)
            within = 0
            if STEPS > 1:
                within = tl.minimum(task // per_step, STEPS - 1)
            task -= within * per_step
            step = turn * STEPS + within
            if task < G * READ_UNITS:
                g, unit = task // READ_UNITS, task % READ_UNITS
                phase, end = _slots(progress, g // H, True, T, BIG)
                if (end > phase) & (step >= phase // SMALL) & (step * SMALL < end):
                    counters = progress.sync + (g + 1) * LINE
                    if UPDATE:
                        _wait(counters + UPDATES, (step - phase // SMALL) * FAST_UPDATES)
                        if SLOW_UNITS > 0:
                            _wait(counters + SLOW + UPDATES, turn * SLOW_UPDATES)
                    if unit < READ_PARTS:
                        m = unit // PARTS
                        if rule.ADAPTIVE_Q:
                            m = READ_MEMORIES - 1 - m if PRODUCE else (1 - m) * (shape.MF - 1)
                            # nothing else keeps the chunks of a pure read apart
                            if m == shape.MF - 1 and not UPDATE:
                                _wait(counters + QUERIES, (step - phase // SMALL) * PARTS)
                            if m == 0:
                                _wait(counters + QUERIES, (step + 1 - phase // SMALL) * PARTS)
                        updated = False
                        if UPDATE and not rule.MOMENTUM:
                            updated = step > phase // SMALL
                        if SLOW_UNITS > 0 and not rule.MOMENTUM:
                            updated = tl.where((m >= slow.M0) & (m < slow.M1), turn > 0, updated)
                        read_task(
                            reads, given, weights, in_force, updated, pending, biases, g.to(tl.int64), m,
                            first=step * SMALL + unit % PARTS * fast_tiles.WALK_CT, phase=phase, stop=end,
                            T=T, eta_scale=eta_scale, shape=shape, rule=rule, no_base=no_base, BIG=BIG,
                            CT=fast_tiles.WALK_CT, NT=fast_tiles.WALK_NT,
                        )
                        if rule.ADAPTIVE_Q:
                            if m == shape.MF - 1:
                                _done(counters + QUERIES)
                    elif UPDATE and not PRODUCE:
                        append_task(
                            given, pending, g.to(tl.int64), first=step * SMALL + (unit - READ_PARTS) * 16,
                            phase=phase, stop=end, T=T, shape=shape, rule=rule, BIG=BIG, CT=16,
                        )
                    if UPDATE:
                        _done(counters + READS)
            elif UPDATE:
                task -= G * READ_UNITS
                if task < G * FAST_UNITS:
                    _commit(
                        weights, in_force, momentum, pending, fast_scratch, progress, task=task, G=G, T=T,
                        end=(step + 1) * SMALL, grad_scale=grad_scale, clock=fast, tiles=fast_tiles, KIND=0,
                        READ_UNITS=READ_UNITS, SMALL=SMALL, BIG=BIG, shape=shape, rule=rule, no_base=no_base,
                    )
                elif slow.M1 > slow.M0:
                    _commit(
                        weights, in_force, momentum, pending, slow_scratch, progress,
                        task=task - G * FAST_UNITS, G=G, T=T, end=(turn + 1) * BIG, grad_scale=grad_scale,
                        clock=slow, tiles=slow_tiles, KIND=SLOW, READ_UNITS=READ_UNITS, SMALL=SMALL, BIG=BIG,
                        shape=shape, rule=rule, no_base=no_base,
                    )
        ticket = skipped + tl.atomic_add(progress.sync, 1, sem="relaxed")
