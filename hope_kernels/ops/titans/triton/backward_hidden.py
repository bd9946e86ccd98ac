"""The commit backwards up to the hidden units: grid (B H, memories, N / NT), C tokens in tiles of CT.
Equations: triton_backward_write.py.

    sums_kernel      u_bar, and what the step sizes need of all hidden units, by tiles
    hidden_kernel    this tile's parts of the adjoints of e and of Kg, and what goes past the gradient: keep delta2 and delta2 k

FLOPs a token and memory: 10 D N and 16 D N; bytes: the weights and their adjoints, fp32, and u_bar through
scratch (L2).
"""

import triton
import triton.language as tl

from ...shared.triton_math import sigma_and_slope
from .backward_common import columns, commits_here
from .common import weight


@triton.jit
def kg_columns(keys_p, g, c, C: tl.constexpr, D: tl.constexpr):
    """Kg as columns [D, CT]."""
    return tl.load(keys_p + (g * C + c)[None, :] * D + tl.arange(0, D)[:, None])


@triton.jit
def _late(p, at, early, AGAIN: tl.constexpr):
    """``early``, or with AGAIN its numbers loaded behind a barrier: where the chunk is one tile nothing else
    keeps the compiler from holding every weight tile at once, and at D = 128 five of them take 160
    registers."""
    if AGAIN:
        tl.debug_barrier()
        early = tl.load(p + at).to(early.dtype)
    return early


@triton.jit(do_not_specialize=["end", "S"])
def sums_kernel(
    base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, adj2_p, adj1_p, adj1s_p, k_p, lo_p, hi_p, e_p,
    keys_p, u_bar_p, sums_p, end: tl.int64, S: tl.int64,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    M0: tl.constexpr,
    C: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr,
    SKIP: tl.constexpr,
):
    """u_bar [B H, M, N, C]; sums [B H, M, N / NT, 6, C]: |a|^2, |d|^2, gain', carry', step', and keep' in its
    last row's first place."""
    g = tl.program_id(0).to(tl.int64)
    m = M0 + tl.program_id(1)
    tile = tl.program_id(2)
    b, h = g // H, g % H
    if commits_here(lo_p, hi_p, b, end):
        d = tl.arange(0, D)
        n = tile * NT + tl.arange(0, NT)
        own = g * (MF + MS) + m
        dtype = k_p.dtype.element_ty
        off2 = (m * N + n[:, None]) * D + d[None, :]
        delta2 = tl.load(delta2_p + g * R * D + off2)
        adj2 = tl.load(adj2_p + g * R * D + off2)
        keep_bar = tl.sum(tl.sum(delta2 * adj2, 1), 0)
        w2 = weight(delta2_p, base2_p, g * R * D + off2, h * R * D + off2, HAS_BASE).to(dtype)
        delta2, adj2 = delta2.to(dtype), adj2.to(dtype)
        sums_p += (own * (N // NT) + tile) * 6 * C
        if m < MF:
            off1 = m * D * N + d[None, :] * N + n[:, None]
            w1 = weight(delta1_p, base1_p, g * MF * D * N + off1, h * MF * D * N + off1, HAS_BASE).to(dtype)
            adj1 = tl.load(adj1_p + g * MF * D * N + off1)
            keep_bar += tl.sum(tl.sum(tl.load(delta1_p + g * MF * D * N + off1) * adj1, 1), 0)
            adj1 = adj1.to(dtype)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                k = columns(k_p, b, h, end - C + c, S, H, D)
                a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), ACT)
                e = tl.load(e_p + (own * D + d[:, None]) * C + c[None, :]).to(dtype)
                grad = slope * tl.dot(w1, e, input_precision="ieee")
                adj2 = _late(adj2_p, g * R * D + off2, adj2, D == 128 and C == CT)
                u_bar = -tl.dot(adj2, kg_columns(keys_p, g, c, C, D).to(dtype), input_precision="ieee")
                tl.store(u_bar_p + (own * N + n[:, None]) * C + c[None, :], u_bar)
                tl.store(sums_p + c, tl.sum(a * a, 0))
                tl.store(sums_p + C + c, tl.sum(grad * grad, 0))
                tl.store(sums_p + 2 * C + c, tl.sum(u_bar * grad, 0))
                delta2 = _late(delta2_p, g * R * D + off2, delta2, D == 128 and C == CT)
                tl.store(sums_p + 3 * C + c, tl.sum(u_bar * tl.dot(delta2, k, input_precision="ieee"), 0))
                adj1 = _late(adj1_p, g * MF * D * N + off1, adj1, D == 128 and C == CT)
                tl.store(sums_p + 4 * C + c, -tl.sum(a * tl.dot(adj1, e, input_precision="ieee"), 0))
        elif MS > 0:
            s = m - MF
            w1s = weight(delta1s_p, base1s_p, (g * MS + s) * N + n, (h * MS + s) * N + n, HAS_BASE)
            adj1s = tl.load(adj1s_p + (g * MS + s) * N + n)
            keep_bar += tl.sum(adj1s * tl.load(delta1s_p + (g * MS + s) * N + n), 0)
            skip = tl.zeros([D], tl.float32)
            skip_adj = tl.zeros([D], tl.float32)
            if SKIP:
                skip_at = (g * R + (MF + MS) * N + s) * D + d
                skip = tl.load(delta2_p + skip_at, mask=tile == 0, other=0.0)
                skip_adj = tl.load(adj2_p + skip_at, mask=tile == 0, other=0.0)
                keep_bar += tl.sum(skip * skip_adj, 0)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                k = columns(k_p, b, h, end - C + c, S, H, D)
                keys = kg_columns(keys_p, g, c, C, D)
                a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), ACT)
                es = tl.load(e_p + own * D * C + c)
                grad = slope * w1s[:, None] * es[None, :]
                u_bar = -tl.dot(adj2, keys.to(dtype), input_precision="ieee")
                gain_bar = tl.sum(u_bar * grad, 0)
                carry_bar = tl.sum(u_bar * tl.dot(delta2, k, input_precision="ieee"), 0)
                if SKIP:
                    skip_u = -tl.sum(skip_adj[:, None] * keys, 0)
                    gain_bar += skip_u * es
                    carry_bar += skip_u * tl.sum(skip[:, None] * k.to(tl.float32), 0)
                tl.store(u_bar_p + (own * N + n[:, None]) * C + c[None, :], u_bar)
                tl.store(sums_p + c, tl.sum(a * a, 0))
                tl.store(sums_p + C + c, tl.sum(grad * grad, 0))
                tl.store(sums_p + 2 * C + c, gain_bar)
                tl.store(sums_p + 3 * C + c, carry_bar)
                tl.store(sums_p + 4 * C + c, -es * tl.sum(a * adj1s[:, None], 0))
        tl.store(sums_p + 5 * C, keep_bar)


@triton.jit(do_not_specialize=["end", "S"])
def hidden_kernel(
    base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, adj2_p, adj1_p, adj1s_p, k_p, eta_p, lo_p,
    hi_p, e_p, keys_p, vectors_p, steps_p, u_bar_p, parts_p, keys_bar_p, end: tl.int64, S: tl.int64,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    M0: tl.constexpr,
    C: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr,
    SKIP: tl.constexpr, DGD: tl.constexpr,
):
    """parts [B H, M, N / NT, 2, D, C]: the adjoints of e (first row: of a scalar memory's) and of k through
    delta2 k; keys_bar [B H, M, N / NT, C, D]. adj2, of the new deviation on entry, returns as the old one's
    but for what comes through w2."""
    g = tl.program_id(0).to(tl.int64)
    m = M0 + tl.program_id(1)
    tile = tl.program_id(2)
    b, h = g // H, g % H
    if commits_here(lo_p, hi_p, b, end):
        d = tl.arange(0, D)
        n = tile * NT + tl.arange(0, NT)
        own = g * (MF + MS) + m
        dtype = k_p.dtype.element_ty
        off2 = (m * N + n[:, None]) * D + d[None, :]
        w2 = weight(delta2_p, base2_p, g * R * D + off2, h * R * D + off2, HAS_BASE).to(dtype)
        delta2 = tl.load(delta2_p + g * R * D + off2).to(dtype)
        adj2 = tl.load(adj2_p + g * R * D + off2).to(dtype)
        keep = tl.load(vectors_p + (g * 3 + 2) * C)
        erase2 = tl.zeros([NT, D], tl.float32)
        parts_p += (own * (N // NT) + tile) * 2 * D * C
        keys_bar_p += (own * (N // NT) + tile) * C * D
        steps_p += own * 9 * C
        if m < MF:
            off1 = m * D * N + d[:, None] * N + n[None, :]
            w1 = weight(delta1_p, base1_p, g * MF * D * N + off1, h * MF * D * N + off1, HAS_BASE).to(dtype)
            adj1 = tl.load(adj1_p + g * MF * D * N + off1).to(dtype)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                gain = tl.load(steps_p + c)
                step = gain * tl.load(vectors_p + (g * 3 + 1) * C + c)
                k = columns(k_p, b, h, end - C + c, S, H, D)
                a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), ACT)
                e = tl.load(e_p + (own * D + d[:, None]) * C + c[None, :]).to(dtype)
                grad = slope * tl.dot(tl.trans(w1), e, input_precision="ieee")
                u_bar = tl.load(u_bar_p + (own * N + n[:, None]) * C + c[None, :])
                back_bar = slope * (gain[None, :] * u_bar + tl.load(steps_p + 2 * C + c)[None, :] * grad)
                e_bar = tl.dot(w1, back_bar.to(dtype), input_precision="ieee")
                adj1 = _late(adj1_p, g * MF * D * N + off1, adj1, D == 128 and C == CT)
                e_bar -= tl.dot(adj1, a.to(dtype), input_precision="ieee") * step[None, :]
                tl.store(parts_p + d[:, None] * C + c[None, :], e_bar)
                u = gain[None, :] * grad
                if DGD:
                    carry = tl.load(vectors_p + g * 3 * C + c) * tl.load(eta_p + (b * S + end - C + c) * H + h)
                    delta2 = _late(delta2_p, g * R * D + off2, delta2, D == 128 and C == CT)
                    u += carry[None, :] * tl.dot(delta2, k, input_precision="ieee")
                    erased = (carry[None, :] * u_bar).to(dtype)
                    erase2 = tl.dot(erased, tl.trans(k), erase2, input_precision="ieee")
                    k_bar = tl.dot(tl.trans(delta2), erased, input_precision="ieee")
                    tl.store(parts_p + D * C + d[:, None] * C + c[None, :], k_bar)
                adj2 = _late(adj2_p, g * R * D + off2, adj2, D == 128 and C == CT)
                tl.store(
                    keys_bar_p + c[:, None] * D + d[None, :],
                    -tl.dot(tl.trans(u.to(dtype)), adj2, input_precision="ieee")
                )
        elif MS > 0:
            s = m - MF
            w1s = weight(delta1s_p, base1s_p, (g * MS + s) * N + n, (h * MS + s) * N + n, HAS_BASE)
            adj1s = tl.load(adj1s_p + (g * MS + s) * N + n)
            skip_at = (g * R + (MF + MS) * N + s) * D + d
            skip = tl.zeros([D], tl.float32)
            skip_adj = tl.zeros([D], tl.float32)
            skip_erase = tl.zeros([D], tl.float32)
            if SKIP:
                skip = tl.load(delta2_p + skip_at, mask=tile == 0, other=0.0)
                skip_adj = tl.load(adj2_p + skip_at, mask=tile == 0, other=0.0)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                gain = tl.load(steps_p + c)
                step = gain * tl.load(vectors_p + (g * 3 + 1) * C + c)
                k = columns(k_p, b, h, end - C + c, S, H, D)
                a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), ACT)
                es = tl.load(e_p + own * D * C + c)
                grad = slope * w1s[:, None] * es[None, :]
                u_bar = tl.load(u_bar_p + (own * N + n[:, None]) * C + c[None, :])
                back_bar = slope * (gain[None, :] * u_bar + tl.load(steps_p + 2 * C + c)[None, :] * grad)
                es_bar = tl.sum(w1s[:, None] * back_bar, 0) - step * tl.sum(adj1s[:, None] * a, 0)
                u = gain[None, :] * grad
                carry = tl.zeros([CT], tl.float32)
                k_bar = tl.zeros([D, CT], tl.float32)
                if DGD:
                    carry = tl.load(vectors_p + g * 3 * C + c) * tl.load(eta_p + (b * S + end - C + c) * H + h)
                    u += carry[None, :] * tl.dot(delta2, k, input_precision="ieee")
                    erased = (carry[None, :] * u_bar).to(dtype)
                    erase2 = tl.dot(erased, tl.trans(k), erase2, input_precision="ieee")
                    k_bar = tl.dot(tl.trans(delta2), erased, input_precision="ieee")
                keys_bar = -tl.dot(tl.trans(u.to(dtype)), adj2, input_precision="ieee")
                if SKIP:
                    k32 = k.to(tl.float32)
                    skip_u_bar = -tl.sum(skip_adj[:, None] * kg_columns(keys_p, g, c, C, D), 0)
                    es_bar += gain * skip_u_bar
                    k_bar += skip[:, None] * (carry * skip_u_bar)[None, :]
                    skip_erase += tl.sum(k32 * (carry * skip_u_bar)[None, :], 1)
                    skip_u = gain * es + carry * tl.sum(skip[:, None] * k32, 0)
                    keys_bar -= skip_u[:, None] * skip_adj[None, :]
                tl.store(parts_p + c, es_bar)
                if DGD:
                    tl.store(parts_p + D * C + d[:, None] * C + c[None, :], k_bar)
                tl.store(keys_bar_p + c[:, None] * D + d[None, :], keys_bar)
            if SKIP:
                tl.store(adj2_p + skip_at, keep * skip_adj + skip_erase, mask=tile == 0)
        tl.store(adj2_p + g * R * D + off2, keep * tl.load(adj2_p + g * R * D + off2) + erase2)
