"""Reads of a span, again and backwards.

    kernel         grid
    reread         B H, memories but M_memory, chunks C / CT   k, v, eta, alpha of chunks of the faster clock,
                                                        into the span's slots; sizes: |k| before it is
                                                        normalised, and the slopes of the gates
    unit_adjoint   B H, C / CT                          the normalisation of k backwards
    read_adjoint   B H, memories, chunks N / NT         y = M(x) of a chunk backwards, on its hidden units; of
                                                        several chunks where the memories are constants
    collect        B H, chunks C / 16, 1 or 2           sums over memories and tiles, in one order

Of several chunks weights in force are [chunks, B H, ...], at the start of each, and so are parts.

FLOPs backwards: 10 D N a token and memory; bytes: 2 D N (2 + 8 + 8) a memory and chunk, for the weights in force,
the adjoint and the shared gradient.
"""

import triton
import triton.language as tl

from ...shared.triton_math import log1p_exp, sigmoid
from .backward_common import columns
from .evaluate import add, add_where, evaluate, evaluate_adjoint, evaluate_scalar, evaluate_scalar_adjoint


@triton.jit(do_not_specialize=["slot", "S"])
def reread_kernel(
    x_p, in_force, slots, sizes_p, biases, place, slot: tl.int64, S: tl.int64, eta_scale: tl.float32,
    shape: tl.constexpr, rule: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr,
):
    """x, k, v [B, S, H, D]; eta, alpha [B, S, H]; sizes [3, B, S, H]: |k|, d eta / d y, d alpha / d y. Slots
    from ``slot`` on, where a chunk begins."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    MF: tl.constexpr = shape.MF
    MS: tl.constexpr = shape.MS
    g = tl.program_id(0).to(tl.int64)
    m = 1 + tl.program_id(1)
    b, h = g // H, g % H
    lo, hi = tl.load(place.lo + b), tl.load(place.hi + b)
    first = slot + tl.program_id(2) * CT
    if (first < hi) & (first + CT > lo):
        t = first + tl.arange(0, CT)
        live = (t >= lo) & (t < hi)
        f = tl.arange(0, D)
        at = (b * S + t) * H + h
        plane = tl.num_programs(0) * S
        x = columns(x_p, b, h, t, S, H, D)
        g += tl.program_id(2) * CT // C * tl.num_programs(0)
        if m < MF:
            out = evaluate(x, in_force, g, h, m, shape=shape, rule=rule, NT=NT, EARLY=D < 128)
            if m == 1:
                if rule.UNIT_K:
                    size = tl.sqrt(tl.sum(out * out, 0))
                    out /= tl.maximum(size, 1e-6)[None, :]
                    tl.store(sizes_p + at, size, mask=live)
                k_at = slots.k + at[None, :] * D + f[:, None]
                tl.store(k_at, out.to(slots.k.dtype.element_ty), mask=live[None, :])
            else:
                v_at = slots.v + at[None, :] * D + f[:, None]
                tl.store(v_at, out.to(slots.v.dtype.element_ty), mask=live[None, :])
        elif MS > 0:
            y = evaluate_scalar(x, in_force, g, h, m, shape=shape, rule=rule, NT=NT)
            if m == MF:
                y += tl.load(biases.eta + h).to(tl.float32)
                gate = sigmoid(y)
                if rule.SOFTPLUS:
                    tl.store(slots.eta + at, eta_scale * log1p_exp(y), mask=live)
                    tl.store(sizes_p + plane + at, eta_scale * gate, mask=live)
                else:
                    tl.store(slots.eta + at, eta_scale * gate, mask=live)
                    tl.store(sizes_p + plane + at, eta_scale * gate * (1.0 - gate), mask=live)
            else:
                gate = sigmoid(y + tl.load(biases.alpha + h).to(tl.float32))
                tl.store(slots.alpha + at, gate, mask=live)
                tl.store(sizes_p + 2 * plane + at, gate * (1.0 - gate), mask=live)


@triton.jit(do_not_specialize=["slot", "S"])
def unit_adjoint_kernel(
    k_p, k_bar_p, sizes_p, place, slot: tl.int64, S: tl.int64, H: tl.constexpr, D: tl.constexpr,
    CT: tl.constexpr,
):
    """k_bar of the slots read in this chunk: from the adjoint of k = y / max(|y|, 1e-6) to that of y."""
    g = tl.program_id(0).to(tl.int64)
    b, h = g // H, g % H
    t = slot + tl.program_id(1) * CT + tl.arange(0, CT)
    live = (t >= tl.load(place.lo + b)) & (t < tl.load(place.hi + b))
    at = (b * S + t) * H + h
    wide = at[None, :] * D + tl.arange(0, D)[:, None]
    k_bar = tl.load(k_bar_p + wide, mask=live[None, :], other=0.0)
    unit = tl.load(k_p + wide, mask=live[None, :], other=0.0).to(tl.float32)
    size = tl.load(sizes_p + at, mask=live, other=1.0)
    along = tl.where(size > 1e-6, tl.sum(unit * k_bar, 0), 0.0)
    y_bar = (k_bar - along[None, :] * unit) / tl.maximum(size, 1e-6)[None, :]
    tl.store(k_bar_p + wide, y_bar, mask=live[None, :])


@triton.jit(do_not_specialize=["slot", "S"])
def read_adjoint_kernel(
    read_p, in_force, weights_bar, okv_bar_p, slots_bar, sizes_p, parts_p, place, slot: tl.int64, S: tl.int64,
    shape: tl.constexpr, rule: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr,
    CONSTANT: tl.constexpr,
):
    """read [2, B, S, H, D]: q, x; okv_bar [3, B, S, H, D]: of o, k and v. Adds to weights_bar, but not with
    CONSTANT memories; parts [chunks, B H, M, N / NT, 2, D, C], first half: the adjoint of x (of q, from M_memory)."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    N: tl.constexpr = shape.N
    MF: tl.constexpr = shape.MF
    MS: tl.constexpr = shape.MS
    R: tl.constexpr = shape.R
    g = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1)
    chunk, tile = tl.program_id(2) // (N // NT), tl.program_id(2) % (N // NT)
    slot += chunk * C
    b, h = g // H, g % H
    lo, hi = tl.load(place.lo + b), tl.load(place.hi + b)
    if (slot < hi) & (slot + C > lo):
        g += chunk * tl.num_programs(0)
        f = tl.arange(0, D)
        n = tile * NT + tl.arange(0, NT)
        off2 = (m * N + n[:, None]) * D + f[None, :]
        w2 = tl.load(in_force.delta2 + g * R * D + off2).to(read_p.dtype.element_ty)
        w2_bar = tl.zeros([NT, D], tl.float32)
        plane = tl.num_programs(0) * S
        read_p += tl.minimum(m, 1) * plane * D
        okv_bar_p += tl.minimum(m, 2) * plane * D
        parts_p += ((g * (MF + MS) + m) * (N // NT) + tile) * 2 * D * C
        if m < MF:
            off1 = m * D * N + f[:, None] * N + n[None, :]
            w1 = tl.load(in_force.delta1 + g * MF * D * N + off1).to(read_p.dtype.element_ty)
            w1_bar = tl.zeros([D, NT], tl.float32)
            for c0 in range(0, C, CT):
                t = slot + c0 + tl.arange(0, CT)
                live = (t >= lo) & (t < hi)
                at = (b * S + t) * H + h
                wide = at[None, :] * D + f[:, None]
                x = tl.load(read_p + wide)
                y_bar = tl.load(okv_bar_p + wide, mask=live[None, :], other=0.0)
                x_bar, w2_bar, w1_bar = evaluate_adjoint(x, y_bar, w2, w1, w2_bar, w1_bar, tile, rule.ACT)
                tl.store(parts_p + f[:, None] * C + (c0 + tl.arange(0, CT))[None, :], x_bar)
            if not CONSTANT:
                add(weights_bar.delta1, g * MF * D * N + off1, w1_bar)
                if rule.HAS_BASE:
                    add(weights_bar.base1, g * MF * D * N + off1, w1_bar)
        elif MS > 0:
            s = m - MF
            off1s = (g * MS + s) * N + n
            w1s = tl.load(in_force.delta1s + off1s)
            w1s_bar = tl.zeros([NT], tl.float32)
            skip_off = ((MF + MS) * N + s) * D + f
            skip = tl.zeros([D], tl.float32)
            skip_bar = tl.zeros([D], tl.float32)
            if rule.SKIP:
                skip = tl.load(in_force.delta2 + g * R * D + skip_off).to(tl.float32)
            for c0 in range(0, C, CT):
                t = slot + c0 + tl.arange(0, CT)
                live = (t >= lo) & (t < hi)
                at = (b * S + t) * H + h
                x = tl.load(read_p + at[None, :] * D + f[:, None])
                if s == 0:
                    y_bar = tl.load(slots_bar.eta + at, mask=live, other=0.0) * tl.load(sizes_p + plane + at)
                else:
                    y_bar = tl.load(slots_bar.alpha + at, mask=live, other=0.0)
                    y_bar *= tl.load(sizes_p + 2 * plane + at)
                x_bar, w2_bar, w1s_bar, skip_bar = evaluate_scalar_adjoint(
                    x, y_bar, w2, w1s, skip, w2_bar, w1s_bar, skip_bar, tile, rule.ACT, rule.SKIP
                )
                tl.store(parts_p + f[:, None] * C + (c0 + tl.arange(0, CT))[None, :], x_bar)
            add(weights_bar.delta1s, off1s, w1s_bar)
            if rule.HAS_BASE:
                add(weights_bar.base1s, off1s, w1s_bar)
            if rule.SKIP:
                add_where(weights_bar.delta2, g * R * D + skip_off, skip_bar, tile == 0)
                if rule.HAS_BASE:
                    add_where(weights_bar.base2, g * R * D + skip_off, skip_bar, tile == 0)
        if not CONSTANT:
            add(weights_bar.delta2, g * R * D + off2, w2_bar)
            if rule.HAS_BASE:
                add(weights_bar.base2, g * R * D + off2, w2_bar)


@triton.jit(do_not_specialize=["slot", "S"])
def collect_kernel(
    parts_p, out_p, place, slot: tl.int64, S: tl.int64, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, M0: tl.constexpr, M1: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr,
):
    """Adds sums of parts [chunks, B H, M, TILES, 2, D, C] to out [1 or 2, B, S, H, D]: with FULL, for rows
    that commit these C slots, over memories M0 .. M1, each half of parts to its plane of out; else, for rows
    that read in them, the first half, M_memory's to the first plane, that of the others up to M1 to the
    second."""
    g = tl.program_id(0).to(tl.int64)
    b, h = g // H, g % H
    chunk, plane = tl.program_id(1) // (C // 16), tl.program_id(2)
    slot += chunk * C
    lo, hi = tl.load(place.lo + b), tl.load(place.hi + b)
    if (slot + C <= hi if FULL else slot < hi) & (slot + C > lo):
        g += chunk * tl.num_programs(0)
        out_p += plane * tl.num_programs(0) * S * D
        begin, stop, half = plane, tl.where(plane == 0, 1, M1), 0
        if FULL:
            begin, stop, half = M0, M1, plane
        c = tl.program_id(1) % (C // 16) * 16 + tl.arange(0, 16)
        f = tl.arange(0, D)
        total = tl.zeros([D, 16], tl.float32)
        for m in range(begin, stop):
            for tile in range(TILES):
                total += tl.load(
                    parts_p + ((((g * M + m) * TILES + tile) * 2 + half) * D + f[:, None]) * C + c[None, :]
                )
        to = out_p + ((b * S + slot + c) * H + h)[None, :] * D + f[:, None]
        tl.store(to, tl.load(to) + total)
