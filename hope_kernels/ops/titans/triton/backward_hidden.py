"""The commit backwards up to the hidden units: grid (B H, memories, N / NT), C tokens in tiles of CT.
Equations: backward_commit.py.

    sums_kernel      u_bar, and what the gain needs of all hidden units, by tiles
    hidden_kernel    this tile's parts of the adjoints of e and of Kg, and what goes past the gradient:
                     decay_chunk delta2 and delta2 k

FLOPs a token and memory: 10 D N and 16 D N; bytes: the weights in force, deviations and their adjoints, fp32, and
u_bar through scratch (L2) in the dtype of the operands.
"""

import triton
import triton.language as tl

from ...shared.triton_math import sigma_and_slope
from .backward_common import columns, commits_here


@triton.jit
def kg_columns(keys_p, g, c, C: tl.constexpr, D: tl.constexpr):
    """Kg as columns [D, CT]."""
    return tl.load(keys_p + (g * C + c)[None, :] * D + tl.arange(0, D)[:, None])


@triton.jit
def _late(p, at, early, AGAIN: tl.constexpr):
    """``early``, or with AGAIN its numbers loaded after a barrier: where the chunk is one tile nothing else
    keeps the compiler from holding every weight tile at once, and at D = 128 five of them take 160
    registers."""
    if AGAIN:
        tl.debug_barrier()
        early = tl.load(p + at).to(early.dtype)
    return early


@triton.jit(do_not_specialize=["end", "S"])
def sums_kernel(
    weights, in_force, weights_bar, k_p, place, e_p, keys_p, u_bar_p, sums_p, end: tl.int64, S: tl.int64,
    shape: tl.constexpr, rule: tl.constexpr, clock: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr,
):
    """u_bar [B H, M, N, C]; sums [B H, M, N / NT, 6, C]: |a|^2, |d|^2, gain', erase_bar, gain_after_bar, and
    decay_chunk_bar in the first place of the last row."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    N: tl.constexpr = shape.N
    MF: tl.constexpr = shape.MF
    MS: tl.constexpr = shape.MS
    R: tl.constexpr = shape.R
    M0: tl.constexpr = clock.M0
    C: tl.constexpr = clock.C
    g = tl.program_id(0).to(tl.int64)
    m = M0 + tl.program_id(1)
    tile = tl.program_id(2)
    b, h = g // H, g % H
    if commits_here(place, b, end):
        f = tl.arange(0, D)
        n = tile * NT + tl.arange(0, NT)
        gm = g * (MF + MS) + m
        dtype = k_p.dtype.element_ty
        off2 = (m * N + n[:, None]) * D + f[None, :]
        delta2 = tl.load(weights.delta2 + g * R * D + off2)
        delta2_bar = tl.load(weights_bar.delta2 + g * R * D + off2)
        decay_chunk_bar = tl.sum(tl.sum(delta2 * delta2_bar, 1), 0)
        w2 = tl.load(in_force.delta2 + g * R * D + off2).to(dtype)
        delta2, delta2_bar = delta2.to(dtype), delta2_bar.to(dtype)
        sums_p += (gm * (N // NT) + tile) * 6 * C
        if m < MF:
            off1 = m * D * N + f[None, :] * N + n[:, None]
            w1 = tl.load(in_force.delta1 + g * MF * D * N + off1).to(dtype)
            delta1_bar = tl.load(weights_bar.delta1 + g * MF * D * N + off1)
            delta1 = tl.load(weights.delta1 + g * MF * D * N + off1)
            decay_chunk_bar += tl.sum(tl.sum(delta1 * delta1_bar, 1), 0)
            delta1_bar = delta1_bar.to(dtype)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                k = columns(k_p, b, h, end - C + c, S, H, D)
                a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), rule.ACT)
                e = tl.load(e_p + (gm * D + f[:, None]) * C + c[None, :]).to(dtype)
                d = slope * tl.dot(w1, e, input_precision="ieee")
                delta2_bar = _late(weights_bar.delta2, g * R * D + off2, delta2_bar, D == 128 and C == CT)
                u_bar = -tl.dot(delta2_bar, kg_columns(keys_p, g, c, C, D).to(dtype), input_precision="ieee")
                tl.store(u_bar_p + (gm * N + n[:, None]) * C + c[None, :], u_bar)
                tl.store(sums_p + c, tl.sum(a * a, 0))
                tl.store(sums_p + C + c, tl.sum(d * d, 0))
                tl.store(sums_p + 2 * C + c, tl.sum(u_bar * d, 0))
                delta2 = _late(weights.delta2, g * R * D + off2, delta2, D == 128 and C == CT)
                tl.store(sums_p + 3 * C + c, tl.sum(u_bar * tl.dot(delta2, k, input_precision="ieee"), 0))
                delta1_bar = _late(weights_bar.delta1, g * MF * D * N + off1, delta1_bar, D == 128 and C == CT)
                tl.store(sums_p + 4 * C + c, -tl.sum(a * tl.dot(delta1_bar, e, input_precision="ieee"), 0))
        elif MS > 0:
            s = m - MF
            w1s = tl.load(in_force.delta1s + (g * MS + s) * N + n)
            delta1s_bar = tl.load(weights_bar.delta1s + (g * MS + s) * N + n)
            decay_chunk_bar += tl.sum(delta1s_bar * tl.load(weights.delta1s + (g * MS + s) * N + n), 0)
            skip = tl.zeros([D], tl.float32)
            skip_bar = tl.zeros([D], tl.float32)
            if rule.SKIP:
                skip_at = (g * R + (MF + MS) * N + s) * D + f
                skip = tl.load(weights.delta2 + skip_at, mask=tile == 0, other=0.0)
                skip_bar = tl.load(weights_bar.delta2 + skip_at, mask=tile == 0, other=0.0)
                decay_chunk_bar += tl.sum(skip * skip_bar, 0)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                k = columns(k_p, b, h, end - C + c, S, H, D)
                keys = kg_columns(keys_p, g, c, C, D)
                a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), rule.ACT)
                es = tl.load(e_p + gm * D * C + c)
                d = slope * w1s[:, None] * es[None, :]
                u_bar = -tl.dot(delta2_bar, keys.to(dtype), input_precision="ieee")
                gain_bar = tl.sum(u_bar * d, 0)
                erase_bar = tl.sum(u_bar * tl.dot(delta2, k, input_precision="ieee"), 0)
                if rule.SKIP:
                    skip_u = -tl.sum(skip_bar[:, None] * keys, 0)
                    gain_bar += skip_u * es
                    erase_bar += skip_u * tl.sum(skip[:, None] * k.to(tl.float32), 0)
                tl.store(u_bar_p + (gm * N + n[:, None]) * C + c[None, :], u_bar)
                tl.store(sums_p + c, tl.sum(a * a, 0))
                tl.store(sums_p + C + c, tl.sum(d * d, 0))
                tl.store(sums_p + 2 * C + c, gain_bar)
                tl.store(sums_p + 3 * C + c, erase_bar)
                tl.store(sums_p + 4 * C + c, -es * tl.sum(a * delta1s_bar[:, None], 0))
        tl.store(sums_p + 5 * C, decay_chunk_bar)


@triton.jit(do_not_specialize=["end", "S"])
def hidden_kernel(
    weights, in_force, weights_bar, slots, place, e_p, keys_p, vectors_p, factors_p, u_bar_p, parts_p, keys_bar_p,
    end: tl.int64, S: tl.int64, shape: tl.constexpr, rule: tl.constexpr, clock: tl.constexpr,
    CT: tl.constexpr, NT: tl.constexpr,
):
    """parts [B H, M, N / NT, 2, D, C]: the adjoints of e (first row: of a scalar memory's) and of k through
    delta2 k; keys_bar [B H, M, N / NT, C, D]. weights_bar.delta2, of the new deviation on entry, returns as
    the old one's but for what comes through w2."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    N: tl.constexpr = shape.N
    MF: tl.constexpr = shape.MF
    MS: tl.constexpr = shape.MS
    R: tl.constexpr = shape.R
    M0: tl.constexpr = clock.M0
    C: tl.constexpr = clock.C
    g = tl.program_id(0).to(tl.int64)
    m = M0 + tl.program_id(1)
    tile = tl.program_id(2)
    b, h = g // H, g % H
    if commits_here(place, b, end):
        f = tl.arange(0, D)
        n = tile * NT + tl.arange(0, NT)
        gm = g * (MF + MS) + m
        dtype = slots.k.dtype.element_ty
        off2 = (m * N + n[:, None]) * D + f[None, :]
        w2 = tl.load(in_force.delta2 + g * R * D + off2).to(dtype)
        delta2 = tl.load(weights.delta2 + g * R * D + off2).to(dtype)
        delta2_bar = tl.load(weights_bar.delta2 + g * R * D + off2).to(dtype)
        decay_chunk = tl.load(vectors_p + (g * 3 + 2) * C)
        erased2_bar = tl.zeros([NT, D], tl.float32)
        parts_p += (gm * (N // NT) + tile) * 2 * D * C
        keys_bar_p += (gm * (N // NT) + tile) * C * D
        factors_p += gm * 9 * C
        if m < MF:
            off1 = m * D * N + f[:, None] * N + n[None, :]
            w1 = tl.load(in_force.delta1 + g * MF * D * N + off1).to(dtype)
            delta1_bar = tl.load(weights_bar.delta1 + g * MF * D * N + off1).to(dtype)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                gain = tl.load(factors_p + c)
                gain_after = gain * tl.load(vectors_p + (g * 3 + 1) * C + c)
                k = columns(slots.k, b, h, end - C + c, S, H, D)
                a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), rule.ACT)
                e = tl.load(e_p + (gm * D + f[:, None]) * C + c[None, :]).to(dtype)
                d = slope * tl.dot(tl.trans(w1), e, input_precision="ieee")
                u_bar = tl.load(u_bar_p + (gm * N + n[:, None]) * C + c[None, :]).to(tl.float32)
                back_bar = slope * (gain[None, :] * u_bar + tl.load(factors_p + 2 * C + c)[None, :] * d)
                e_bar = tl.dot(w1, back_bar.to(dtype), input_precision="ieee")
                delta1_bar = _late(weights_bar.delta1, g * MF * D * N + off1, delta1_bar, D == 128 and C == CT)
                e_bar -= tl.dot(delta1_bar, a.to(dtype), input_precision="ieee") * gain_after[None, :]
                tl.store(parts_p + f[:, None] * C + c[None, :], e_bar)
                u = gain[None, :] * d
                if rule.DGD:
                    erase = tl.load(vectors_p + g * 3 * C + c)
                    erase *= tl.load(slots.eta + (b * S + end - C + c) * H + h)
                    delta2 = _late(weights.delta2, g * R * D + off2, delta2, D == 128 and C == CT)
                    u += erase[None, :] * tl.dot(delta2, k, input_precision="ieee")
                    erased = (erase[None, :] * u_bar).to(dtype)
                    erased2_bar = tl.dot(erased, tl.trans(k), erased2_bar, input_precision="ieee")
                    k_bar = tl.dot(tl.trans(delta2), erased, input_precision="ieee")
                    tl.store(parts_p + D * C + f[:, None] * C + c[None, :], k_bar)
                delta2_bar = _late(weights_bar.delta2, g * R * D + off2, delta2_bar, D == 128 and C == CT)
                tl.store(
                    keys_bar_p + c[:, None] * D + f[None, :],
                    -tl.dot(tl.trans(u.to(dtype)), delta2_bar, input_precision="ieee")
                )
        elif MS > 0:
            s = m - MF
            w1s = tl.load(in_force.delta1s + (g * MS + s) * N + n)
            delta1s_bar = tl.load(weights_bar.delta1s + (g * MS + s) * N + n)
            skip_at = (g * R + (MF + MS) * N + s) * D + f
            skip = tl.zeros([D], tl.float32)
            skip_bar = tl.zeros([D], tl.float32)
            skip_erased_bar = tl.zeros([D], tl.float32)
            if rule.SKIP:
                skip = tl.load(weights.delta2 + skip_at, mask=tile == 0, other=0.0)
                skip_bar = tl.load(weights_bar.delta2 + skip_at, mask=tile == 0, other=0.0)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                gain = tl.load(factors_p + c)
                gain_after = gain * tl.load(vectors_p + (g * 3 + 1) * C + c)
                k = columns(slots.k, b, h, end - C + c, S, H, D)
                a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), rule.ACT)
                es = tl.load(e_p + gm * D * C + c)
                d = slope * w1s[:, None] * es[None, :]
                u_bar = tl.load(u_bar_p + (gm * N + n[:, None]) * C + c[None, :]).to(tl.float32)
                back_bar = slope * (gain[None, :] * u_bar + tl.load(factors_p + 2 * C + c)[None, :] * d)
                es_bar = tl.sum(w1s[:, None] * back_bar, 0) - gain_after * tl.sum(delta1s_bar[:, None] * a, 0)
                u = gain[None, :] * d
                erase = tl.zeros([CT], tl.float32)
                k_bar = tl.zeros([D, CT], tl.float32)
                if rule.DGD:
                    erase = tl.load(vectors_p + g * 3 * C + c)
                    erase *= tl.load(slots.eta + (b * S + end - C + c) * H + h)
                    u += erase[None, :] * tl.dot(delta2, k, input_precision="ieee")
                    erased = (erase[None, :] * u_bar).to(dtype)
                    erased2_bar = tl.dot(erased, tl.trans(k), erased2_bar, input_precision="ieee")
                    k_bar = tl.dot(tl.trans(delta2), erased, input_precision="ieee")
                keys_bar = -tl.dot(tl.trans(u.to(dtype)), delta2_bar, input_precision="ieee")
                if rule.SKIP:
                    k32 = k.to(tl.float32)
                    skip_u_bar = -tl.sum(skip_bar[:, None] * kg_columns(keys_p, g, c, C, D), 0)
                    es_bar += gain * skip_u_bar
                    k_bar += skip[:, None] * (erase * skip_u_bar)[None, :]
                    skip_erased_bar += tl.sum(k32 * (erase * skip_u_bar)[None, :], 1)
                    skip_u = gain * es + erase * tl.sum(skip[:, None] * k32, 0)
                    keys_bar -= skip_u[:, None] * skip_bar[None, :]
                tl.store(parts_p + c, es_bar)
                if rule.DGD:
                    tl.store(parts_p + D * C + f[:, None] * C + c[None, :], k_bar)
                tl.store(keys_bar_p + c[:, None] * D + f[None, :], keys_bar)
            if rule.SKIP:
                skip_bar = decay_chunk * skip_bar + skip_erased_bar
                tl.store(weights_bar.delta2 + skip_at, skip_bar, mask=tile == 0)
        delta2_bar_at = weights_bar.delta2 + g * R * D + off2
        tl.store(delta2_bar_at, decay_chunk * tl.load(delta2_bar_at) + erased2_bar)
