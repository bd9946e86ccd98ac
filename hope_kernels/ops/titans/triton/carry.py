"""A whole call where a memory's weights fit a program's registers: one program a memory, row and head, which
carries the deviations from chunk to chunk (fp32, N = D = 64: 64 registers a thread) and writes them once.

    member 0   M_memory: o, and for all the clock: transformed keys, decays, (k_s.k_t)^2 (carry_clock.py)
    member 1   M_k: k
    member 2   M_v: v
    member 3   M_eta and M_alpha, one above the other as 2 N hidden units (carry_gates.py)

In every chunk the members of a (row, head) exchange

    members 1-3   k, v, eta, alpha of the chunk, as soon as they have been read    -> all, counter READS
    member 0      keys, decays, squared products of keys                           -> all, counter CLOCK

in buffers of their own: two for what is read, which alternate, since member 0 may still be at the chunk
before; one for the clock, which member 0 does not write before the others have read the next chunk.
Everything else of a chunk stays in registers: weights are rounded once, and z = w2 k serves the error and the
gradient. By L2 go the base (16 bits), tokens and what is exchanged: 145 KB a chunk, an eighth of what tasks
load (schedule.py). FLOPs a chunk: those of the tasks, but for z, which is made once.

Members wait for each other, so all of a (row, head) must run. A program takes the next ticket when it begins;
four tickets in a row are one (row, head). At any time at most one (row, head) of a launch lacks members; all
others go on and end, and their places are taken by the next programs. So no order of scheduling can deadlock
where a device has room for more programs than the launches that run at once can leave waiting, three each.

A call of one token takes the same way with masked slots, and so does a pure read (UPDATE false, member 0
alone): a token's bits are the same however it was read.
"""

import triton
import triton.language as tl

from .carry_common import MEMBERS
from .carry_full import full_member
from .carry_gates import gates_member
from .schedule import LINE, _slots


@triton.jit(do_not_specialize=["B", "T"])
def carry_kernel(
    reads, weights, pending, exchange, biases, progress, scratch, B: tl.int32, T: tl.int64,
    eta_scale: tl.float32, grad_scale: tl.float32, UPDATE: tl.constexpr, C: tl.constexpr, shape: tl.constexpr,
    rule: tl.constexpr,
):
    """MEMBERS programs a (row, head), or one where nothing is learned. Groups of arguments: groups.py.

    Pending slots: C a row; pos, lengths [B] int64; sync [(1 + B H) * LINE] int64, zeros. exchange: k [B H, 2,
    2, C, D] (of two chunks k, then v), eta, alpha [B H, 2, 2, C] (their second halves unused); scratch:
    ``clock_block``'s.
    """
    H: tl.constexpr = shape.H
    ticket = tl.atomic_add(progress.sync, 1, sem="relaxed").to(tl.int32)
    m = 0
    if UPDATE:
        m = ticket % MEMBERS
        ticket = ticket // MEMBERS
    g = ticket.to(tl.int64)
    phase, stop = _slots(progress, ticket // H, True, T, C)
    if stop > phase:
        counters = progress.sync + (g + 1) * LINE
        if m < shape.MF:
            full_member(
                reads, weights, pending, exchange, scratch, counters, g, m, phase, stop, T, grad_scale,
                UPDATE=UPDATE, C=C, shape=shape, rule=rule,
            )
        else:
            gates_member(
                reads, weights, pending, exchange, biases, scratch, counters, g, phase, stop, T, eta_scale,
                grad_scale, C=C, shape=shape, rule=rule,
            )
