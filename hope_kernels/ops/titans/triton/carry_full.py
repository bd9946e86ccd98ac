"""A memory with D outputs, carried through a call: a program of carry.py."""

import triton
import triton.language as tl

from ...shared.triton_math import sigma, sigma_and_slope, unit_columns
from .carry_clock import clock_block
from .carry_common import CLOCK, MEMBERS, READS, beside, halves, later, sums3
from .schedule import _done, _wait


@triton.jit
def _kept(pending, g, m, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Where the open chunk's k (or v) begins."""
    kept_p = pending.k
    if m == 2:
        kept_p = pending.v
    return kept_p + (g // H * C * H + g % H) * D


@triton.jit
def _keep(kept_p, exchange_p, phase, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """The open chunk's tokens into the first buffer, where the chunk will be completed."""
    c, f = tl.arange(0, C)[:, None], tl.arange(0, D)[None, :]
    tl.store(exchange_p + c * D + f, tl.load(kept_p + c * H * D + f, mask=c < phase), mask=c < phase)


@triton.jit
def _close(kept_p, first, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Zeros in the slots from ``first`` on, where a chunk has been committed."""
    c, f = tl.arange(0, C)[:, None], tl.arange(0, D)[None, :]
    tl.store(kept_p + c * H * D + f, tl.zeros([C, D], kept_p.dtype.element_ty), mask=c >= first)


@triton.jit
def full_member(
    reads, weights, pending, exchange, scratch, counters, group, member, phase, stop, T, grad_scale,
    UPDATE: tl.constexpr, C: tl.constexpr, shape: tl.constexpr, rule: tl.constexpr,
):
    """Memory ``member`` < 3 of (row, head) ``group``, slots phase .. stop.

    There is one loop for chunks that are committed and for one that stays open: however a token is read, the
    same instructions do it. It is a while loop: a for loop would carry the deviations in the layout of every
    product.
    """
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    N: tl.constexpr = shape.N
    g, m, f, n = group, member, tl.arange(0, D), tl.arange(0, N)
    if UPDATE:
        if (m > 0) & (phase > 0) & (stop >= C):
            _keep(_kept(pending, g, m, H, D, C), exchange.k + (g * 4 + (m - 1)) * C * D, phase, H, D, C)
    w2_p, w1_p = weights.delta2 + (g * shape.R + m * N) * D, weights.delta1 + (g * shape.MF + m) * D * N
    delta2 = tl.load(w2_p + n[:, None] * D + f[None, :])
    delta1 = tl.load(w1_p + f[:, None] * N + n[None, :])
    chunk = 0
    while tl.condition(chunk * C < stop, disable_licm=True):
        g, m = later(group, chunk), later(member, chunk)
        start = (g * 4 + chunk % 2 * 2) * C  # row of the exchange: of two chunks, k and v
        committing = (chunk + 1) * C <= stop
        kept_p, stride = _kept(pending, g, m, H, D, C), H
        if UPDATE:
            if committing:
                kept_p, stride = exchange.k + (start + (m - 1) * C) * D, 1
        w2, w1 = rounded_full(delta2, delta1, weights, g, m, reads.x.dtype.element_ty, shape, rule)
        out = read_full(reads, w2, w1, g, m, chunk * C, phase, stop, T, C, shape, rule)
        if UPDATE or m == 0:
            put_full(out, reads.o, kept_p, g, m, chunk * C, phase, stop, T, stride, C, shape, rule)
        if UPDATE:
            if committing:
                if m > 0:
                    _done(counters + READS)
                _wait(counters + READS, (chunk + 1) * (MEMBERS - 1))
                if m == 0:
                    clock_block(exchange, scratch, g, start, shape, rule)
                    _done(counters + CLOCK)
                delta2, delta1 = commit_full(
                    delta2, delta1, w2, w1, exchange, scratch, counters, g, m, start, chunk, grad_scale, C,
                    shape, rule,
                )
        chunk += 1
    if UPDATE:
        if stop >= C:
            g, m = later(group, chunk), later(member, chunk)
            w2_p = weights.delta2 + (g * shape.R + m * N) * D
            w1_p = weights.delta1 + (g * shape.MF + m) * D * N
            tl.store(w2_p + n[:, None] * D + f[None, :], delta2)
            tl.store(w1_p + f[:, None] * N + n[None, :], delta1)
            if m > 0:
                _close(_kept(pending, g, m, H, D, C), stop % C, H, D, C)


@triton.jit
def rounded_full(delta2, delta1, weights, g, m, dtype: tl.constexpr, shape: tl.constexpr, rule: tl.constexpr):
    """w2 and w1 in force, for a chunk."""
    D: tl.constexpr = shape.D
    N: tl.constexpr = shape.N
    if rule.HAS_BASE:
        f, n, h = tl.arange(0, D), tl.arange(0, N), g % shape.H
        base2_p = weights.base2 + (h * shape.R + m * N) * D
        base1_p = weights.base1 + (h * shape.MF + m) * D * N
        base2 = tl.load(base2_p + n[:, None] * D + f[None, :])
        base1 = tl.load(base1_p + f[:, None] * N + n[None, :])
        delta2, delta1 = delta2 + base2.to(tl.float32), delta1 + base1.to(tl.float32)
    return delta2.to(dtype), delta1.to(dtype)


@triton.jit
def read_full(
    reads, w2, w1, g, m, first, phase, stop, T, C: tl.constexpr, shape: tl.constexpr, rule: tl.constexpr
):
    """M(x) [D, C], fp32, of the slots from ``first`` on."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    slot, f = first + tl.arange(0, C), tl.arange(0, D)
    live = (slot >= phase) & (slot < stop)
    x_p = reads.x
    if m == 0:
        x_p = reads.q
    at = (((g // H * T + slot - phase) * H + g % H) * D)[None, :] + f[:, None]
    x = tl.load(x_p + at, mask=live[None, :], other=0.0)
    a = sigma(tl.dot(w2, x, input_precision="ieee"), rule.ACT).to(x.dtype)
    return tl.dot(w1, a, x.to(tl.float32), input_precision="ieee")


@triton.jit
def put_full(
    out, o_p, kept_p, g, m, first, phase, stop, T, stride, C: tl.constexpr, shape: tl.constexpr,
    rule: tl.constexpr,
):
    """o, k or v of the slots from ``first`` on; stride: heads a row of ``kept_p``."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    c, f = tl.arange(0, C), tl.arange(0, D)
    slot = first + c
    live = (slot >= phase) & (slot < stop)
    if rule.UNIT_K:
        if m == 1:
            out = unit_columns(out)
    at = (c * stride * D).to(tl.int64)
    if m == 0:
        kept_p, at = o_p, ((g // H * T + slot - phase) * H + g % H) * D
    tl.store(kept_p + at[None, :] + f[:, None], out.to(kept_p.dtype.element_ty), mask=live[None, :])


@triton.jit
def commit_full(
    delta2, delta1, w2, w1, exchange, scratch, counters, g, m, start, chunk, grad_scale, C: tl.constexpr,
    shape: tl.constexpr, rule: tl.constexpr,
):
    """The deviations after the chunk whose tokens are in the exchange from row ``start`` on; m_t and the
    gain: gain.py."""
    D: tl.constexpr = shape.D
    c, f, r = tl.arange(0, C), tl.arange(0, D), tl.arange(0, 2 * C)
    k = tl.load(exchange.k + (start + c)[None, :] * D + f[:, None])
    eta = tl.load(exchange.eta + start + c)
    if rule.OWN_VALUES:
        kv = tl.load(exchange.k + (start + r)[None, :] * D + f[:, None])
        z, z_v = halves(tl.dot(w2, kv, input_precision="ieee"), C)
        a, slope = sigma_and_slope(z, rule.ACT)
        both = beside(a, sigma(z_v, rule.ACT), C).to(kv.dtype)
        at_k, target = halves(tl.dot(w1, both, kv.to(tl.float32), input_precision="ieee"), C)
    else:
        a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), rule.ACT)
        at_k = tl.dot(w1, a.to(k.dtype), k.to(tl.float32), input_precision="ieee")
        target = tl.load(exchange.k + (start + C + c)[None, :] * D + f[:, None]).to(tl.float32)
    if rule.TARGET_NORM:
        target = unit_columns(target)
    e = -target if rule.DOT else grad_scale * (at_k - target)
    d = slope * tl.dot(tl.trans(w1), e.to(k.dtype), input_precision="ieee")
    old = tl.dot(delta2.to(k.dtype), k, input_precision="ieee") if rule.DGD else d
    size = eta
    if rule.CLIP:
        a2, d2, e2 = sums3(a * a, d * d, e * e, 0)
        size = tl.sqrt(a2 + d2 / (e2 + 1e-9) + 1e-12)
    if m > 0:
        _wait(counters + CLOCK, chunk + 1)
    vectors_p = scratch.vectors + g * 3 * C
    keys = tl.load(scratch.keys + (g * C + c)[:, None] * D + f[None, :])
    erase, after, decay = tl.load(vectors_p + c), tl.load(vectors_p + C + c), tl.load(vectors_p + 3 * C - 1)
    gain = eta
    if rule.CLIP:
        gram2 = tl.load(scratch.gram2 + (g * C + c)[:, None] * C + c[None, :])
        gain = eta / tl.maximum(1.0, grad_scale * size * tl.sum((eta * size)[:, None] * gram2, 0))
    u = gain[None, :] * d
    if rule.DGD:
        u += erase[None, :] * old
    e *= (gain * after)[None, :]
    delta2 = tl.dot((-u).to(k.dtype), keys, decay * delta2, input_precision="ieee")
    delta1 = tl.dot((-e).to(k.dtype), tl.trans(a.to(k.dtype)), decay * delta1, input_precision="ieee")
    return delta2, delta1
