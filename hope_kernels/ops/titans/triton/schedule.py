"""A whole call in one launch: every chunk of every row, read and written, in tasks that the programs of a
persistent kernel take in turn.

    for every chunk of the faster clock:   read     memories x C / CT       o, and k, v, eta, alpha into the open chunk
    and for each clock that ends there:    clock    1                       decays and transformed keys   (triton_clock.py, _momentum)
                                           errors   memories x C / CT       e                             (triton_write.py)
                                           hidden   memories x N / NT       a, d; a memory's last one its step sizes  (triton_steps.py)
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

The device alone decides what there is to do, from pos and len of every row: which chunks, which commits. The
host knows shapes; a launch is the same whether it reads one token or many, and can be replayed from a CUDA
graph. States travel through L2 (50 MB on an H100 hold a layer of H = 32, N = 256), scratch likewise: e, a, d,
norms of the chunk in flight.
"""

import triton
import triton.language as tl

from .clock import clock_body
from .commit import errors_task, hidden_task, update_task
from .momentum import momentum_body
from .read import append_task, close_task, read_task
from .steps import steps_task

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
def _rows(pos_p, len_p, b, inside, T, BIG: tl.constexpr):
    """(phase, stop) of rows b: the slots they read, counted from the start of their open chunk of the slower
    clock."""
    phase = tl.load(pos_p + b, mask=inside, other=0) % BIG
    # a length from the device is nobody's promise
    n = tl.minimum(tl.maximum(tl.load(len_p + b, mask=inside, other=0), 0), T)
    return phase.to(tl.int32), (phase + n).to(tl.int32)


@triton.jit
def _extent(pos_p, len_p, B, T, BIG: tl.constexpr):
    """(first, stop): the slots that some row reads in this call."""
    first, stop = tl.full([], BIG, tl.int32), tl.full([], 0, tl.int32)
    for b0 in range(0, B, 32):
        b = b0 + tl.arange(0, 32)
        phase, end = _rows(pos_p, len_p, b, b < B, T, BIG)
        first = tl.minimum(first, tl.min(tl.where(end > phase, phase, BIG), 0))
        stop = tl.maximum(stop, tl.max(tl.where(end > phase, end, 0), 0))
    return first, stop


@triton.jit
def _commit(
    base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, s2_p, s1_p, s1s_p, k_p, v_p, eta_p, alpha_p, beta_p,
    e_p, es_p, e2_p, a_p, d_p, norms_p, keys_p, vectors_p, gram_p, steps_p, sync_p, pos_p, len_p, task, G, T,
    end, grad_scale, M0: tl.constexpr, M1: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr,
    OWN_CT: tl.constexpr, OWN_NT: tl.constexpr,
    KIND: tl.constexpr, READ_UNITS: tl.constexpr, SMALL: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    BIG: tl.constexpr,
    ACT: tl.constexpr, HAS_BASE: tl.constexpr, SKIP: tl.constexpr, HAS_ALPHA: tl.constexpr, OWN: tl.constexpr,
    TARGET_NORM: tl.constexpr,
    DOT: tl.constexpr, DGD: tl.constexpr, CLIP: tl.constexpr, MOMENTUM: tl.constexpr,
):
    """Task number ``task`` of the commit of memories M0 .. M1 at slot ``end``; KIND: 0 or SLOW, where this
    clock's counters are."""
    PARTS: tl.constexpr = (M1 - M0) * (C // CT)
    TILES: tl.constexpr = (M1 - M0) * (N // OWN_NT)
    local = task - G * (1 + PARTS)
    stage = tl.where(local < 0, 0, 1 + local // (G * TILES))
    i_g = tl.where(local < 0, task // (1 + PARTS), local // TILES % G)
    unit = tl.where(local < 0, task % (1 + PARTS), local % TILES)
    phase, stop = _rows(pos_p, len_p, i_g // H, True, T, BIG)
    if (phase < end) & (end <= stop):
        counters = sync_p + (i_g + 1) * LINE
        chunks = end // C - phase // C  # commits of this clock, this one included
        first = (end - C) % BIG
        g = i_g.to(tl.int64)
        if stage == 0:
            _wait(counters + READS, (end // SMALL - phase // SMALL) * READ_UNITS)
            if unit == 0:
                b_slot = (g // H) * BIG
                clock_body(
                    k_p, eta_p, alpha_p, keys_p, vectors_p, gram_p, g, b_slot, g % H, first, H, D, C,
                    HAS_ALPHA, DGD, CLIP, 2 if MOMENTUM else 1, 7 if MOMENTUM else 3,
                )
                if MOMENTUM:
                    momentum_body(
                        k_p, eta_p, alpha_p, beta_p, keys_p, vectors_p, g, b_slot, g % H, first, H, D, C,
                        HAS_ALPHA, DGD
                    )
                _done(counters + KIND + CLOCK)
            else:
                m, c0 = M0 + (unit - 1) // (C // CT), (unit - 1) % (C // CT) * CT
                errors_task(
                    base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, k_p, v_p, e_p, es_p, e2_p, g,
                    m, c0, first, grad_scale,
                    H, D, N, MF, MS, R, C, BIG, CT, NT, ACT, HAS_BASE, SKIP, OWN, TARGET_NORM, DOT,
                )
                _done(counters + KIND + ERRORS)
        else:
            m, tile = M0 + unit // (N // OWN_NT), unit % (N // OWN_NT)
            if stage == 1:
                _wait(counters + KIND + ERRORS, chunks * PARTS)
                hidden_task(
                    base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, k_p, e_p, es_p, a_p, d_p,
                    norms_p, g, m, tile, first,
                    H, D, N, MF, MS, R, C, BIG, OWN_CT, OWN_NT, ACT, HAS_BASE, CLIP,
                )
                tl.debug_barrier()
                if tl.atomic_add(counters + TILES_DONE + m, 1, sem="acq_rel") == chunks * (N // OWN_NT) - 1:
                    _wait(counters + KIND + CLOCK, chunks)
                    steps_task(
                        eta_p, norms_p, e2_p, gram_p, steps_p, g, m, first, grad_scale, H, MF + MS, C, BIG,
                        OWN_CT, N // OWN_NT, CLIP
                    )
                _done(counters + KIND + HIDDEN)
            else:
                _wait(counters + KIND + HIDDEN, chunks * TILES)
                update_task(
                    delta2_p, delta1_p, delta1s_p, s2_p, s1_p, s1s_p, k_p, steps_p, e_p, es_p, a_p, d_p,
                    keys_p, vectors_p,
                    g, m, tile, first, H, D, N, MF, MS, R, C, BIG, OWN_CT, OWN_NT, SKIP, DGD, MOMENTUM,
                )
                _done(counters + KIND + UPDATES)


@triton.jit(do_not_specialize=["B", "T"])
def scan_kernel(
    x_p, q_p, o_p, given_k_p, given_v_p, given_eta_p, given_alpha_p, given_beta_p, base2_p, base1_p, base1s_p,
    delta2_p, delta1_p, delta1s_p, s2_p, s1_p, s1s_p, k_p, v_p, eta_p, alpha_p, beta_p, eta_bias_p,
    alpha_bias_p, pos_p, len_p, sync_p,
    e_p, es_p, e2_p, a_p, d_p, norms_p, keys_p, vectors_p, gram_p, steps_p,
    slow_e_p, slow_es_p, slow_e2_p, slow_a_p, slow_d_p, slow_norms_p, slow_keys_p, slow_vectors_p,
    slow_gram_p, slow_steps_p, B: tl.int32, T: tl.int64, eta_scale: tl.float32, grad_scale: tl.float32,
    UPDATE: tl.constexpr, PRODUCE: tl.constexpr, FM0: tl.constexpr, FM1: tl.constexpr, SM0: tl.constexpr,
    SM1: tl.constexpr, SMALL: tl.constexpr, BIG: tl.constexpr,
    FAST_CT: tl.constexpr, FAST_NT: tl.constexpr, FAST_OWN_CT: tl.constexpr, FAST_OWN_NT: tl.constexpr,
    SLOW_CT: tl.constexpr, SLOW_NT: tl.constexpr, SLOW_OWN_CT: tl.constexpr, SLOW_OWN_NT: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    ACT: tl.constexpr, HAS_BASE: tl.constexpr, SKIP: tl.constexpr, HAS_ALPHA: tl.constexpr,
    UNIT_K: tl.constexpr, SOFTPLUS: tl.constexpr,
    OWN: tl.constexpr, TARGET_NORM: tl.constexpr, DOT: tl.constexpr, DGD: tl.constexpr, CLIP: tl.constexpr,
    MOMENTUM: tl.constexpr, ADAPTIVE_Q: tl.constexpr,
):
    """Memories FM0 .. FM1 commit every SMALL tokens, SM0 .. SM1 (if any) every BIG; all of them are read
    every SMALL tokens.

    x, q, o and given k, v [B, T, H, D] (q is o with ADAPTIVE_Q), given eta, alpha, beta [B, T, H]; weights
    and s as in fast_weights.py; pending k, v [B, BIG, H, D], eta, alpha, beta [B, BIG, H]; pos, len [B]
    int64; sync [(1 + B H) * LINE] int64,
    zeros. Scratch, for each clock of C tokens: see ``_commit``'s tasks.
    """
    STEPS: tl.constexpr = BIG // SMALL
    MEMORIES: tl.constexpr = MF + MS
    READ_MEMORIES: tl.constexpr = MEMORIES if PRODUCE else 2 if ADAPTIVE_Q else 1
    READ_PARTS: tl.constexpr = READ_MEMORIES * (SMALL // FAST_CT)
    READ_UNITS: tl.constexpr = READ_PARTS + (SMALL // 16 if UPDATE and not PRODUCE else 0)
    FAST_UPDATES: tl.constexpr = (FM1 - FM0) * (N // FAST_OWN_NT)
    FAST_UNITS: tl.constexpr = 1 + (FM1 - FM0) * (SMALL // FAST_CT) + 2 * FAST_UPDATES if UPDATE else 0
    SLOW_UPDATES: tl.constexpr = (SM1 - SM0) * (N // SLOW_OWN_NT)
    SLOW_UNITS: tl.constexpr = 1 + (SM1 - SM0) * (BIG // SLOW_CT) + 2 * SLOW_UPDATES if UPDATE and SM1 > SM0 else 0
    G = B * H
    per_step = G * (READ_UNITS + FAST_UNITS)
    per_round = STEPS * per_step + G * SLOW_UNITS
    first, stop = _extent(pos_p, len_p, B, T, BIG)
    # tickets count the tasks of all steps since the slower clock's chunk began; those before the first slot
    # are not given out
    skipped = first // SMALL * per_step
    total = (stop // BIG).to(tl.int64) * per_round + stop % BIG // SMALL * per_step + (
        stop % SMALL > 0
    ) * G * READ_UNITS
    closing = total + (G if UPDATE else 0)

    ticket = skipped + tl.atomic_add(sync_p, 1, sem="relaxed")
    # hoisting what does not change from task to task (addresses, mostly) out of the loop would take all registers
    while tl.condition(ticket < closing, disable_licm=True):
        if ticket >= total:
            g = (ticket - total).to(tl.int32)
            phase, end = _rows(pos_p, len_p, g // H, True, T, BIG)
            if (end > phase) & (end >= BIG):
                counters = sync_p + (g + 1) * LINE
                _wait(counters + UPDATES, (end // SMALL - phase // SMALL) * FAST_UPDATES)
                if SLOW_UNITS > 0:
                    _wait(counters + SLOW + UPDATES, end // BIG * SLOW_UPDATES)
                close_task(
                    k_p, v_p, eta_p, alpha_p, beta_p, g.to(tl.int64), end, H, D, BIG, 16, HAS_ALPHA, MOMENTUM
                )
        else:
            turn = (ticket // per_round).to(tl.int32)
            task = (ticket - turn.to(tl.int64) * per_round).to(tl.int32)
            within = tl.minimum(task // per_step, STEPS - 1)
            task -= within * per_step
            step = turn * STEPS + within
            if task < G * READ_UNITS:
                g, unit = task // READ_UNITS, task % READ_UNITS
                phase, end = _rows(pos_p, len_p, g // H, True, T, BIG)
                if (end > phase) & (step >= phase // SMALL) & (step * SMALL < end):
                    counters = sync_p + (g + 1) * LINE
                    if UPDATE:
                        _wait(counters + UPDATES, (step - phase // SMALL) * FAST_UPDATES)
                        if SLOW_UNITS > 0:
                            _wait(counters + SLOW + UPDATES, turn * SLOW_UPDATES)
                    if unit < READ_PARTS:
                        m = unit // (SMALL // FAST_CT)
                        if ADAPTIVE_Q:
                            m = READ_MEMORIES - 1 - m if PRODUCE else (1 - m) * (MF - 1)
                            if m == MF - 1 and not UPDATE:  # nothing else keeps the chunks of a pure read apart
                                _wait(counters + QUERIES, (step - phase // SMALL) * (SMALL // FAST_CT))
                            if m == 0:
                                _wait(counters + QUERIES, (step + 1 - phase // SMALL) * (SMALL // FAST_CT))
                        read_task(
                            x_p, q_p, o_p, given_beta_p, base2_p, base1_p, base1s_p, delta2_p, delta1_p,
                            delta1s_p, k_p, v_p, eta_p,
                            alpha_p, beta_p, eta_bias_p, alpha_bias_p, g.to(tl.int64), m,
                            step * SMALL + unit % (SMALL // FAST_CT) * FAST_CT, phase, end, T, eta_scale,
                            H, D, N, MF, MS, R, BIG, FAST_CT, FAST_NT, ACT, HAS_BASE, SKIP, UNIT_K, SOFTPLUS,
                            MOMENTUM, ADAPTIVE_Q,
                        )
                        if ADAPTIVE_Q:
                            if m == MF - 1:
                                _done(counters + QUERIES)
                    elif UPDATE and not PRODUCE:
                        append_task(
                            given_k_p, given_v_p, given_eta_p, given_alpha_p, given_beta_p, k_p, v_p, eta_p,
                            alpha_p, beta_p,
                            g.to(tl.int64), step * SMALL + (unit - READ_PARTS) * 16, phase, end, T, H, D, BIG,
                            16, HAS_ALPHA, MOMENTUM,
                        )
                    if UPDATE:
                        _done(counters + READS)
            elif UPDATE:
                task -= G * READ_UNITS
                if task < G * FAST_UNITS:
                    _commit(
                        base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, s2_p, s1_p, s1s_p, k_p,
                        v_p, eta_p, alpha_p, beta_p,
                        e_p, es_p, e2_p, a_p, d_p, norms_p, keys_p, vectors_p, gram_p, steps_p, sync_p, pos_p,
                        len_p, task, G, T, (step + 1) * SMALL, grad_scale,
                        FM0, FM1, SMALL, FAST_CT, FAST_NT, FAST_OWN_CT, FAST_OWN_NT, 0, READ_UNITS, SMALL,
                        H, D, N, MF, MS, R, BIG, ACT, HAS_BASE, SKIP, HAS_ALPHA, OWN, TARGET_NORM, DOT, DGD,
                        CLIP, MOMENTUM,
                    )
                elif SM1 > SM0:
                    _commit(
                        base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, s2_p, s1_p, s1s_p, k_p,
                        v_p, eta_p, alpha_p, beta_p,
                        slow_e_p, slow_es_p, slow_e2_p, slow_a_p, slow_d_p, slow_norms_p, slow_keys_p,
                        slow_vectors_p, slow_gram_p, slow_steps_p, sync_p, pos_p, len_p,
                        task - G * FAST_UNITS, G, T, (turn + 1) * BIG, grad_scale,
                        SM0, SM1, BIG, SLOW_CT, SLOW_NT, SLOW_OWN_CT, SLOW_OWN_NT, SLOW, READ_UNITS, SMALL,
                        H, D, N, MF, MS, R, BIG, ACT, HAS_BASE, SKIP, HAS_ALPHA, OWN, TARGET_NORM, DOT, DGD,
                        CLIP, MOMENTUM,
                    )
        ticket = skipped + tl.atomic_add(sync_p, 1, sem="relaxed")
