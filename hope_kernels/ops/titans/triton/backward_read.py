"""Reads of a span, again and backwards.

    reread_kernel    grid (B H, memories but M_memory, SMALL / CT)   k, v, eta, alpha of one chunk of the faster clock, into the span's
                                                                     slots; sizes: |k| before it is normalised, and the slopes of the gates
    unit_adjoint     grid (B H, SMALL / CT)                          the normalisation of k backwards
    read_adjoint     grid (B H, memories, N / NT)                    y = M(x) of one chunk backwards, on its hidden units
    values_kernel    grid (B H, memories, N / NT)                    M(v) of a commit backwards, likewise
    collect_kernel   grid (B H, C / 16)                              sums over memories and tiles, in one order, into the tokens

FLOPs backwards: 10 D N a token and memory; bytes: 2 D N x 4 (1 + 1 + 2 + 2) a memory and chunk, for
deviation, base, the adjoint and the shared gradient.
"""

import triton
import triton.language as tl

from ...shared.triton_math import log1p_exp, sigmoid
from .backward_common import columns, commits_here
from .common import weight
from .evaluate import add, add_where, evaluate, evaluate_adjoint, evaluate_scalar, evaluate_scalar_adjoint


@triton.jit(do_not_specialize=["slot", "S"])
def reread_kernel(
    x_p, base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, k_p, v_p, eta_p, alpha_p, sizes_p,
    eta_bias_p, alpha_bias_p, lo_p, hi_p, slot: tl.int64, S: tl.int64, eta_scale: tl.float32,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    CT: tl.constexpr,
    NT: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, SKIP: tl.constexpr, UNIT_K: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """x, k, v [B, S, H, D]; eta, alpha [B, S, H]; sizes [3, B, S, H]: |k|, d eta / d y, d alpha / d y. Slots
    from ``slot`` on."""
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
            y = evaluate_scalar(
                x, delta2_p, base2_p, delta1s_p, base1s_p, g, h, m, D, N, NT, MF, MS, R, ACT, HAS_BASE, SKIP
            )
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
def unit_adjoint_kernel(
    k_p, dk_p, sizes_p, lo_p, hi_p, slot: tl.int64, S: tl.int64, H: tl.constexpr, D: tl.constexpr, CT: tl.constexpr
):
    """dk of the slots read in this chunk: from the adjoint of k = y / max(|y|, 1e-6) to that of y. Grid (B H,
    SMALL / CT)."""
    g = tl.program_id(0).to(tl.int64)
    b, h = g // H, g % H
    t = slot + tl.program_id(1) * CT + tl.arange(0, CT)
    live = (t >= tl.load(lo_p + b)) & (t < tl.load(hi_p + b))
    at = (b * S + t) * H + h
    wide = at[None, :] * D + tl.arange(0, D)[:, None]
    error = tl.load(dk_p + wide, mask=live[None, :], other=0.0)
    unit = tl.load(k_p + wide, mask=live[None, :], other=0.0).to(tl.float32)
    size = tl.load(sizes_p + at, mask=live, other=1.0)
    along = tl.where(size > 1e-6, tl.sum(unit * error, 0), 0.0)
    tl.store(dk_p + wide, (error - along[None, :] * unit) / tl.maximum(size, 1e-6)[None, :], mask=live[None, :])


@triton.jit(do_not_specialize=["slot", "S"])
def read_adjoint_kernel(
    read_p, base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, adj2_p, adj1_p, adj1s_p, grad2_p,
    grad1_p, grad1s_p, errors_p, deta_p, dalpha_p, sizes_p, parts_p, lo_p, hi_p, slot: tl.int64, S: tl.int64,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
    CT: tl.constexpr, NT: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, SKIP: tl.constexpr,
):
    """read [2, B, S, H, D]: q, x; errors [3, B, S, H, D] and deta, dalpha [B, S, H]: what came back to o, k,
    v, eta, alpha. Adds to adj (deviations) and grad (shared base), laid out like the state; parts [B H, M, N
    / NT, 2, D, C], first half: the adjoint of x (of q, from M_memory)."""
    g = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1)
    tile = tl.program_id(2)
    b, h = g // H, g % H
    lo, hi = tl.load(lo_p + b), tl.load(hi_p + b)
    if (slot < hi) & (slot + C > lo):
        d = tl.arange(0, D)
        n = tile * NT + tl.arange(0, NT)
        off2 = (m * N + n[:, None]) * D + d[None, :]
        dtype = read_p.dtype.element_ty
        w2 = weight(delta2_p, base2_p, g * R * D + off2, h * R * D + off2, HAS_BASE).to(dtype)
        acc2 = tl.zeros([NT, D], tl.float32)
        plane = tl.num_programs(0) * S
        read_p += tl.minimum(m, 1) * plane * D
        errors_p += tl.minimum(m, 2) * plane * D
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
                x = tl.load(read_p + wide)
                y_bar = tl.load(errors_p + wide, mask=live[None, :], other=0.0)
                x_bar, acc2, acc1 = evaluate_adjoint(x, y_bar, w2, w1, acc2, acc1, tile, ACT)
                tl.store(parts_p + d[:, None] * C + (c0 + tl.arange(0, CT))[None, :], x_bar)
            add(adj1_p, g * MF * D * N + off1, acc1)
            if HAS_BASE:
                add(grad1_p, g * MF * D * N + off1, acc1)
        elif MS > 0:
            s = m - MF
            off1s = (g * MS + s) * N + n
            w1s = weight(delta1s_p, base1s_p, off1s, (h * MS + s) * N + n, HAS_BASE)
            acc1s = tl.zeros([NT], tl.float32)
            skip_off = ((MF + MS) * N + s) * D + d
            skip = tl.zeros([D], tl.float32)
            skip_bar = tl.zeros([D], tl.float32)
            if SKIP:
                skip = weight(
                    delta2_p, base2_p, g * R * D + skip_off, h * R * D + skip_off, HAS_BASE
                ).to(dtype).to(tl.float32)
            for c0 in range(0, C, CT):
                t = slot + c0 + tl.arange(0, CT)
                live = (t >= lo) & (t < hi)
                at = (b * S + t) * H + h
                x = tl.load(read_p + at[None, :] * D + d[:, None])
                if s == 0:
                    y_bar = tl.load(deta_p + at, mask=live, other=0.0) * tl.load(sizes_p + plane + at)
                else:
                    y_bar = tl.load(dalpha_p + at, mask=live, other=0.0) * tl.load(sizes_p + 2 * plane + at)
                x_bar, acc2, acc1s, skip_bar = evaluate_scalar_adjoint(
                    x, y_bar, w2, w1s, skip, acc2, acc1s, skip_bar, tile, ACT, SKIP
                )
                tl.store(parts_p + d[:, None] * C + (c0 + tl.arange(0, CT))[None, :], x_bar)
            add(adj1s_p, off1s, acc1s)
            if HAS_BASE:
                add(grad1s_p, off1s, acc1s)
            if SKIP:
                add_where(adj2_p, g * R * D + skip_off, skip_bar, tile == 0)
                if HAS_BASE:
                    add_where(grad2_p, g * R * D + skip_off, skip_bar, tile == 0)
        add(adj2_p, g * R * D + off2, acc2)
        if HAS_BASE:
            add(grad2_p, g * R * D + off2, acc2)


@triton.jit(do_not_specialize=["end", "S"])
def values_kernel(
    base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, adj2_p, adj1_p, adj1s_p, grad2_p, grad1_p,
    grad1s_p, v_p, lo_p, hi_p, outputs_bar_p, parts_p, end: tl.int64, S: tl.int64,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    M0: tl.constexpr,
    C: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr,
    SKIP: tl.constexpr, OWN: tl.constexpr,
):
    """outputs_bar [B H, M, 2, D, C], second half: adjoint of M(v). Adds to adj and grad; parts [B H, M, N /
    NT, 2, D, C], second half: of v. Without own values it is v that receives outputs_bar, from all but the
    scalar memories."""
    g = tl.program_id(0).to(tl.int64)
    m = M0 + tl.program_id(1)
    tile = tl.program_id(2)
    b, h = g // H, g % H
    if commits_here(lo_p, hi_p, b, end):
        d = tl.arange(0, D)
        n = tile * NT + tl.arange(0, NT)
        off2 = (m * N + n[:, None]) * D + d[None, :]
        own = g * (MF + MS) + m
        outputs_bar_p += (own * 2 + 1) * D * C
        parts_p += ((own * (N // NT) + tile) * 2 + 1) * D * C
        w2 = weight(delta2_p, base2_p, g * R * D + off2, h * R * D + off2, HAS_BASE).to(v_p.dtype.element_ty)
        acc2 = tl.zeros([NT, D], tl.float32)
        if m < MF:
            off1 = m * D * N + d[:, None] * N + n[None, :]
            w1 = weight(delta1_p, base1_p, g * MF * D * N + off1, h * MF * D * N + off1, HAS_BASE).to(w2.dtype)
            acc1 = tl.zeros([D, NT], tl.float32)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                v_bar = tl.load(outputs_bar_p + d[:, None] * C + c[None, :])
                if OWN:
                    v = columns(v_p, b, h, end - C + c, S, H, D)
                    v_bar, acc2, acc1 = evaluate_adjoint(v, v_bar, w2, w1, acc2, acc1, tile, ACT)
                else:
                    v_bar = tl.where(tile == 0, v_bar, 0.0)
                tl.store(parts_p + d[:, None] * C + c[None, :], v_bar)
            if OWN:
                add(adj1_p, g * MF * D * N + off1, acc1)
                if HAS_BASE:
                    add(grad1_p, g * MF * D * N + off1, acc1)
        elif MS > 0:
            s = m - MF
            off1s = (g * MS + s) * N + n
            w1s = weight(delta1s_p, base1s_p, off1s, (h * MS + s) * N + n, HAS_BASE)
            acc1s = tl.zeros([NT], tl.float32)
            skip_off = ((MF + MS) * N + s) * D + d
            skip = tl.zeros([D], tl.float32)
            skip_bar = tl.zeros([D], tl.float32)
            if SKIP:
                skip = weight(
                    delta2_p, base2_p, g * R * D + skip_off, h * R * D + skip_off, HAS_BASE
                ).to(w2.dtype).to(tl.float32)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                v = columns(v_p, b, h, end - C + c, S, H, D)
                y_bar = tl.load(outputs_bar_p + c)
                x_bar, acc2, acc1s, skip_bar = evaluate_scalar_adjoint(
                    v, y_bar, w2, w1s, skip, acc2, acc1s, skip_bar, tile, ACT, SKIP
                )
                tl.store(parts_p + d[:, None] * C + c[None, :], x_bar)
            add(adj1s_p, off1s, acc1s)
            if HAS_BASE:
                add(grad1s_p, off1s, acc1s)
            if SKIP:
                add_where(adj2_p, g * R * D + skip_off, skip_bar, tile == 0)
                if HAS_BASE:
                    add_where(grad2_p, g * R * D + skip_off, skip_bar, tile == 0)
        if OWN or m >= MF:
            add(adj2_p, g * R * D + off2, acc2)
            if HAS_BASE:
                add(grad2_p, g * R * D + off2, acc2)


@triton.jit(do_not_specialize=["slot", "S", "half"])
def collect_kernel(
    parts_p, out_p, lo_p, hi_p, slot: tl.int64, S: tl.int64, half: tl.int64,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr, M0: tl.constexpr, M1: tl.constexpr,
    TILES: tl.constexpr, FULL: tl.constexpr,
):
    """Adds the sum of parts [B H, M, TILES, 2, D, C], one ``half`` of it, over memories M0 .. M1 to out [B,
    S, H, D], for rows that read in these C slots, or with FULL for rows that commit them."""
    g = tl.program_id(0).to(tl.int64)
    b, h = g // H, g % H
    lo, hi = tl.load(lo_p + b), tl.load(hi_p + b)
    if (slot + C <= hi if FULL else slot < hi) & (slot + C > lo):
        c = tl.program_id(1) * 16 + tl.arange(0, 16)
        d = tl.arange(0, D)
        total = tl.zeros([D, 16], tl.float32)
        for m in range(M0, M1):
            for tile in range(TILES):
                total += tl.load(
                    parts_p + ((((g * M + m) * TILES + tile) * 2 + half) * D + d[:, None]) * C + c[None, :]
                )
        to = out_p + ((b * S + slot + c) * H + h)[None, :] * D + d[:, None]
        tl.store(to, tl.load(to) + total)
