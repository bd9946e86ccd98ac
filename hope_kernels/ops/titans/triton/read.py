"""Reads of one chunk of the faster clock: o from M_memory, and k, v, eta, alpha from the others, appended to
the open chunk.

A task evaluates one memory on CT tokens, M(x) = x + w1 sigma(w2 x), N in tiles of NT. It writes where the
next stage looks for it: k (normalised), v, eta and alpha into the state's pending slots, o into the output.
M_q (adaptive_q, the last with D outputs) leaves q in the output too, where M_memory takes it up before it
writes o there. A given beta joins eta. Weights come from L2.
FLOPs a task: 4 D N CT; bytes: 8 D N (16 with a base) for the weights.
"""

import triton
import triton.language as tl

from ...shared.triton_math import log1p_exp, sigmoid, unit_columns
from .evaluate import evaluate_in_force, evaluate_scalar_in_force


@triton.jit
def read_task(
    reads, given, weights, in_force, updated, pending, biases, g, m, first, phase, stop, T, eta_scale,
    shape: tl.constexpr, rule: tl.constexpr, no_base: tl.constexpr, BIG: tl.constexpr, CT: tl.constexpr,
    NT: tl.constexpr,
):
    """Memory m of (row, head) g on slots first .. first + CT, of which the row reads phase .. stop in this
    call; pending has BIG slots a row. updated: the call has written the memory, and in_force is true."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    MF: tl.constexpr = shape.MF
    b, h = g // H, g % H
    if (first < stop) & (first + CT > phase):
        slot = first + tl.arange(0, CT)
        live = (slot >= phase) & (slot < stop)
        f = tl.arange(0, D)
        token = ((b * T + slot - phase) * H + h) * D
        kept = (b * BIG + slot % BIG) * H + h
        if m == 0:
            x = tl.load(reads.q + token[None, :] + f[:, None], mask=live[None, :], other=0.0)
        else:
            x = tl.load(reads.x + token[None, :] + f[:, None], mask=live[None, :], other=0.0)
        if m < MF:
            out = evaluate_in_force(
                x, weights, in_force, updated, g, h, m, shape=shape, rule=rule, no_base=no_base, NT=NT
            )
            if m == 0:
                tl.store(
                    reads.o + token[None, :] + f[:, None], out.to(reads.o.dtype.element_ty),
                    mask=live[None, :]
                )
            elif m == 1:
                if rule.UNIT_K:
                    out = unit_columns(out)
                tl.store(
                    pending.k + kept[None, :] * D + f[:, None], out.to(pending.k.dtype.element_ty),
                    mask=live[None, :]
                )
            elif rule.ADAPTIVE_Q and m == MF - 1:
                if rule.UNIT_K:
                    out = unit_columns(out)
                tl.store(
                    reads.q + token[None, :] + f[:, None], out.to(reads.q.dtype.element_ty),
                    mask=live[None, :]
                )
            else:
                tl.store(
                    pending.v + kept[None, :] * D + f[:, None], out.to(pending.v.dtype.element_ty),
                    mask=live[None, :]
                )
        elif shape.MS > 0:
            y = evaluate_scalar_in_force(
                x, weights, in_force, updated, g, h, m, shape=shape, rule=rule, no_base=no_base, NT=NT
            )
            if m == MF:
                y += tl.load(biases.eta + h).to(tl.float32)
                gate = log1p_exp(y) if rule.SOFTPLUS else sigmoid(y)
                tl.store(pending.eta + kept, eta_scale * gate, mask=live)
                if rule.MOMENTUM:
                    beta = tl.load(given.beta + (b * T + slot - phase) * H + h, mask=live, other=0.0)
                    tl.store(pending.beta + kept, beta.to(tl.float32), mask=live)
            else:
                tl.store(
                    pending.alpha + kept, sigmoid(y + tl.load(biases.alpha + h).to(tl.float32)), mask=live
                )


@triton.jit
def append_task(
    given, pending, g, first, phase, stop, T, shape: tl.constexpr, rule: tl.constexpr, BIG: tl.constexpr,
    CT: tl.constexpr,
):
    """Tokens whose k, v, eta, alpha, beta are given ([B, T, H, ...]) into the pending slots."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    b, h = g // H, g % H
    slot = first + tl.arange(0, CT)
    live = (slot >= phase) & (slot < stop)
    f = tl.arange(0, D)[None, :]
    token, kept = (b * T + slot - phase) * H + h, (b * BIG + slot % BIG) * H + h
    wide = live[:, None]
    k = tl.load(given.k + token[:, None] * D + f, mask=wide, other=0.0)
    tl.store(pending.k + kept[:, None] * D + f, k, mask=wide)
    v = tl.load(given.v + token[:, None] * D + f, mask=wide, other=0.0)
    tl.store(pending.v + kept[:, None] * D + f, v, mask=wide)
    tl.store(pending.eta + kept, tl.load(given.eta + token, mask=live, other=0.0).to(tl.float32), mask=live)
    if rule.HAS_ALPHA:
        alpha = tl.load(given.alpha + token, mask=live, other=0.0)
        tl.store(pending.alpha + kept, alpha.to(tl.float32), mask=live)
    if rule.MOMENTUM:
        beta = tl.load(given.beta + token, mask=live, other=0.0)
        tl.store(pending.beta + kept, beta.to(tl.float32), mask=live)


@triton.jit
def close_task(
    pending, g, stop, shape: tl.constexpr, rule: tl.constexpr, BIG: tl.constexpr, CT: tl.constexpr
):
    """Zeros in the slots after the open chunk's tokens, where a chunk has been committed."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    b, h = g // H, g % H
    f = tl.arange(0, D)
    for first in range(0, BIG, CT):
        slot = first + tl.arange(0, CT)
        free = slot >= stop % BIG
        kept = (b * BIG + slot) * H + h
        zeros = tl.zeros([CT, D], pending.k.dtype.element_ty)
        tl.store(pending.k + kept[:, None] * D + f[None, :], zeros, mask=free[:, None])
        tl.store(pending.v + kept[:, None] * D + f[None, :], zeros, mask=free[:, None])
        tl.store(pending.eta + kept, tl.zeros([CT], tl.float32), mask=free)
        if rule.HAS_ALPHA:
            tl.store(pending.alpha + kept, tl.zeros([CT], tl.float32), mask=free)
        if rule.MOMENTUM:
            tl.store(pending.beta + kept, tl.zeros([CT], tl.float32), mask=free)
