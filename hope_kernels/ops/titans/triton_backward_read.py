"""Reads of a span, again and backwards.

    reread_kernel    grid (B H, memories but M_memory, SMALL / CT)   k, v, eta, alpha of one chunk of the faster clock, into the span's
                                                                     slots; sizes: |k| before it is normalised, and the slopes of the gates
    read_adjoint     grid (B H, memories, N / NT)                    y = x + w1 sigma(w2 x) of one chunk, backwards, on its hidden units
    collect_kernel   grid (B H, C / 16)                              sums over memories and tiles, in one order, into the tokens

With y_bar the adjoint of y: z_bar = sigma'(z) w1^T y_bar, w1 += y_bar a^T, w2 += z_bar x^T, x += y_bar + w2^T z_bar. FLOPs: 10 D N a token
and memory; bytes: 4 D N x (2 + 8) a memory and chunk, for the weights, their adjoint and the shared gradient.
"""

import triton
import triton.language as tl

from .triton_backward_common import columns
from .triton_common import log1p_exp, sigma, sigma_and_slope, sigmoid, weight


@triton.jit
def evaluate_scalar(
    x, delta2_p, base2_p, delta1s_p, base1s_p, g, h, m,
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr,
    HAS_BASE: tl.constexpr, SKIP: tl.constexpr,
):
    """M(x) [CT] of scalar memory m for columns x [D, CT]."""
    d = tl.arange(0, D)
    s = m - MF
    y = tl.zeros([x.shape[1]], tl.float32)
    for n0 in range(0, N, NT):
        n = n0 + tl.arange(0, NT)
        off = (m * N + n[:, None]) * D + d[None, :]
        w2 = weight(delta2_p, base2_p, g * R * D + off, h * R * D + off, HAS_BASE).to(x.dtype)
        a = sigma(tl.dot(w2, x, input_precision="ieee"), ACT)
        y += tl.sum(weight(delta1s_p, base1s_p, (g * MS + s) * N + n, (h * MS + s) * N + n, HAS_BASE)[:, None] * a, 0)
    if SKIP:
        off = ((MF + MS) * N + s) * D + d
        skip = weight(delta2_p, base2_p, g * R * D + off, h * R * D + off, HAS_BASE).to(x.dtype)
        y += tl.sum(skip[:, None].to(tl.float32) * x.to(tl.float32), 0)
    return y


@triton.jit
def evaluate(
    x, delta2_p, base2_p, delta1_p, base1_p, g, h, m,
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, MF: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr,
):
    """M(x) [D, CT] of memory m < MF for columns x [D, CT]."""
    d = tl.arange(0, D)
    out = x.to(tl.float32)
    for n0 in range(0, N, NT):
        n = n0 + tl.arange(0, NT)
        off2, off1 = (m * N + n[:, None]) * D + d[None, :], m * D * N + d[:, None] * N + n[None, :]
        w2 = weight(delta2_p, base2_p, g * R * D + off2, h * R * D + off2, HAS_BASE).to(x.dtype)
        w1 = weight(delta1_p, base1_p, g * MF * D * N + off1, h * MF * D * N + off1, HAS_BASE).to(x.dtype)
        out = tl.dot(w1, sigma(tl.dot(w2, x, input_precision="ieee"), ACT).to(x.dtype), out, input_precision="ieee")
    return out


@triton.jit(do_not_specialize=["slot", "S"])
def reread_kernel(
    x_p, base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, k_p, v_p, eta_p, alpha_p, sizes_p, eta_bias_p, alpha_bias_p, lo_p, hi_p,
    slot: tl.int64, S: tl.int64, eta_scale: tl.float32,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr, CT: tl.constexpr,
    NT: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, SKIP: tl.constexpr, UNIT_K: tl.constexpr, SOFTPLUS: tl.constexpr,
):
    """x, k, v [B, S, H, D]; eta, alpha [B, S, H]; sizes [3, B, S, H]: |k|, d eta / d y, d alpha / d y. Slots from ``slot`` on."""
    g = tl.program_id(0).to(tl.int64)
    m = 1 + tl.program_id(1)
    b, h = g // H, g % H
    lo, hi = tl.load(lo_p + b), tl.load(hi_p + b)
    first = slot + tl.program_id(2) * CT
    if (first < hi) & (first + CT > lo):
        t = first + tl.arange(0, CT)
        live = (t >= lo) & (t < hi)
        d = tl.arange(0, D)
        at = (b * S + t) * H + h
        plane = tl.num_programs(0) * S
        x = columns(x_p, b, h, t, S, H, D)
        if m < MF:
            out = evaluate(x, delta2_p, base2_p, delta1_p, base1_p, g, h, m, D, N, NT, MF, R, ACT, HAS_BASE)
            if m == 1:
                if UNIT_K:
                    size = tl.sqrt(tl.sum(out * out, 0))
                    out /= tl.maximum(size, 1e-6)[None, :]
                    tl.store(sizes_p + at, size, mask=live)
                tl.store(k_p + at[None, :] * D + d[:, None], out.to(k_p.dtype.element_ty), mask=live[None, :])
            else:
                tl.store(v_p + at[None, :] * D + d[:, None], out.to(v_p.dtype.element_ty), mask=live[None, :])
        elif MS > 0:
            y = evaluate_scalar(x, delta2_p, base2_p, delta1s_p, base1s_p, g, h, m, D, N, NT, MF, MS, R, ACT, HAS_BASE, SKIP)
            if m == MF:
                y += tl.load(eta_bias_p + h).to(tl.float32)
                gate = sigmoid(y)
                if SOFTPLUS:
                    tl.store(eta_p + at, eta_scale * log1p_exp(y), mask=live)
                    tl.store(sizes_p + plane + at, eta_scale * gate, mask=live)
                else:
                    tl.store(eta_p + at, eta_scale * gate, mask=live)
                    tl.store(sizes_p + plane + at, eta_scale * gate * (1.0 - gate), mask=live)
            else:
                gate = sigmoid(y + tl.load(alpha_bias_p + h).to(tl.float32))
                tl.store(alpha_p + at, gate, mask=live)
                tl.store(sizes_p + 2 * plane + at, gate * (1.0 - gate), mask=live)


@triton.jit(do_not_specialize=["slot", "S"])
def read_adjoint_kernel(
    x_p, q_p, base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, adj2_p, adj1_p, adj1s_p, grad2_p, grad1_p, grad1s_p,
    k_p, do_p, dk_p, dv_p, deta_p, dalpha_p, sizes_p, parts_p, lo_p, hi_p, slot: tl.int64, S: tl.int64,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    CT: tl.constexpr, NT: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, SKIP: tl.constexpr, UNIT_K: tl.constexpr,
):
    """do, dk, dv [B, S, H, D] and deta, dalpha [B, S, H]: what came back to the outputs. Adds to adj (deviations) and grad (shared base),
    laid out like the state; parts [B H, M, N / NT, 2, D, C], its first half: the adjoint of x (of q, from M_memory)."""
    g = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1)
    tile = tl.program_id(2)
    b, h = g // H, g % H
    lo, hi = tl.load(lo_p + b), tl.load(hi_p + b)
    if (slot < hi) & (slot + C > lo):
        d = tl.arange(0, D)
        n = tile * NT + tl.arange(0, NT)
        off2 = (m * N + n[:, None]) * D + d[None, :]
        dtype = x_p.dtype.element_ty
        w2 = weight(delta2_p, base2_p, g * R * D + off2, h * R * D + off2, HAS_BASE).to(dtype)
        acc2 = tl.zeros([NT, D], tl.float32)
        plane = tl.num_programs(0) * S
        parts_p += ((g * (MF + MS) + m) * (N // NT) + tile) * 2 * D * C
        if m < MF:
            off1 = m * D * N + d[:, None] * N + n[None, :]
            w1 = weight(delta1_p, base1_p, g * MF * D * N + off1, h * MF * D * N + off1, HAS_BASE).to(dtype)
            acc1 = tl.zeros([D, NT], tl.float32)
            for c0 in range(0, C, CT):
                t = slot + c0 + tl.arange(0, CT)
                live = (t >= lo) & (t < hi)
                at = (b * S + t) * H + h
                wide = at[None, :] * D + d[:, None]
                if m == 0:
                    x = tl.load(q_p + wide)
                    y_bar = tl.load(do_p + wide, mask=live[None, :], other=0.0).to(tl.float32)
                else:
                    x = tl.load(x_p + wide)
                    if m == 1:
                        y_bar = tl.load(dk_p + wide, mask=live[None, :], other=0.0)
                        if UNIT_K:
                            unit = tl.load(k_p + wide).to(tl.float32)
                            size = tl.load(sizes_p + at)
                            along = tl.where(size > 1e-6, tl.sum(unit * y_bar, 0), 0.0)
                            y_bar = (y_bar - along[None, :] * unit) / tl.maximum(size, 1e-6)[None, :]
                    else:
                        y_bar = tl.load(dv_p + wide, mask=live[None, :], other=0.0)
                a, slope = sigma_and_slope(tl.dot(w2, x, input_precision="ieee"), ACT)
                error = y_bar.to(dtype)
                z_bar = (slope * tl.dot(tl.trans(w1), error, input_precision="ieee")).to(dtype)
                acc1 = tl.dot(error, tl.trans(a.to(dtype)), acc1, input_precision="ieee")
                acc2 = tl.dot(z_bar, tl.trans(x), acc2, input_precision="ieee")
                x_bar = tl.dot(tl.trans(w2), z_bar, input_precision="ieee")
                x_bar += tl.where(tile == 0, y_bar, 0.0)
                tl.store(parts_p + d[:, None] * C + (c0 + tl.arange(0, CT))[None, :], x_bar)
            tl.store(adj1_p + g * MF * D * N + off1, tl.load(adj1_p + g * MF * D * N + off1) + acc1)
            if HAS_BASE:
                tl.store(grad1_p + g * MF * D * N + off1, tl.load(grad1_p + g * MF * D * N + off1) + acc1)
        elif MS > 0:
            s = m - MF
            off1s = (g * MS + s) * N + n
            w1s = weight(delta1s_p, base1s_p, off1s, (h * MS + s) * N + n, HAS_BASE)
            acc1s = tl.zeros([NT], tl.float32)
            skip_off = ((MF + MS) * N + s) * D + d
            skip = tl.zeros([D], tl.float32)
            skip_bar = tl.zeros([D], tl.float32)
            if SKIP:
                skip = weight(delta2_p, base2_p, g * R * D + skip_off, h * R * D + skip_off, HAS_BASE).to(dtype).to(tl.float32)
            for c0 in range(0, C, CT):
                t = slot + c0 + tl.arange(0, CT)
                live = (t >= lo) & (t < hi)
                at = (b * S + t) * H + h
                x = tl.load(x_p + at[None, :] * D + d[:, None])
                if s == 0:
                    y_bar = tl.load(deta_p + at, mask=live, other=0.0) * tl.load(sizes_p + plane + at)
                else:
                    y_bar = tl.load(dalpha_p + at, mask=live, other=0.0) * tl.load(sizes_p + 2 * plane + at)
                a, slope = sigma_and_slope(tl.dot(w2, x, input_precision="ieee"), ACT)
                z_bar = (slope * w1s[:, None] * y_bar[None, :]).to(dtype)
                acc1s += tl.sum(a * y_bar[None, :], 1)
                acc2 = tl.dot(z_bar, tl.trans(x), acc2, input_precision="ieee")
                x_bar = tl.dot(tl.trans(w2), z_bar, input_precision="ieee")
                if SKIP:
                    x_bar += tl.where(tile == 0, skip[:, None] * y_bar[None, :], 0.0)
                    skip_bar += tl.sum(x.to(tl.float32) * y_bar[None, :], 1)
                tl.store(parts_p + d[:, None] * C + (c0 + tl.arange(0, CT))[None, :], x_bar)
            tl.store(adj1s_p + off1s, tl.load(adj1s_p + off1s) + acc1s)
            if HAS_BASE:
                tl.store(grad1s_p + off1s, tl.load(grad1s_p + off1s) + acc1s)
            if SKIP:
                skip_at = g * R * D + skip_off
                tl.store(adj2_p + skip_at, tl.load(adj2_p + skip_at, mask=tile == 0, other=0.0) + skip_bar, mask=tile == 0)
                if HAS_BASE:
                    tl.store(grad2_p + skip_at, tl.load(grad2_p + skip_at, mask=tile == 0, other=0.0) + skip_bar, mask=tile == 0)
        tl.store(adj2_p + g * R * D + off2, tl.load(adj2_p + g * R * D + off2) + acc2)
        if HAS_BASE:
            tl.store(grad2_p + g * R * D + off2, tl.load(grad2_p + g * R * D + off2) + acc2)


@triton.jit(do_not_specialize=["slot", "S", "half"])
def collect_kernel(
    parts_p, out_p, lo_p, hi_p, slot: tl.int64, S: tl.int64, half: tl.int64,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr, M0: tl.constexpr, M1: tl.constexpr, TILES: tl.constexpr,
    FULL: tl.constexpr,
):
    """Adds the sum of parts [B H, M, TILES, 2, D, C], one ``half`` of it, over memories M0 .. M1 to out [B, S, H, D], for rows that read in
    these C slots, or with FULL for rows that commit them."""
    g = tl.program_id(0).to(tl.int64)
    b, h = g // H, g % H
    lo, hi = tl.load(lo_p + b), tl.load(hi_p + b)
    if (slot + C <= hi if FULL else slot < hi) & (slot + C > lo):
        c = tl.program_id(1) * 16 + tl.arange(0, 16)
        d = tl.arange(0, D)
        total = tl.zeros([D, 16], tl.float32)
        for m in range(M0, M1):
            for tile in range(TILES):
                total += tl.load(parts_p + ((((g * M + m) * TILES + tile) * 2 + half) * D + d[:, None]) * C + c[None, :])
        to = out_p + ((b * S + slot + c) * H + h)[None, :] * D + d[:, None]
        tl.store(to, tl.load(to) + total)
