"""The commit backwards, what is done per hidden unit: grid (B H, memories, N / NT), C tokens in tiles of CT.

    sums_kernel, hidden_kernel    backward_hidden.py
    inputs_kernel                 adjoint of w2 (and of a scalar memory's w1s), and this tile's part of k's
    outputs_kernel                adjoint of w1, and M(v), which is a read backwards

Forwards (commit.py), with z = w2 k, a = sigma(z), back = w1^T e, d = sigma'(z) back, erase =
eta decay_before, gain_after = gain decay_after:

    u = gain d + erase (delta2 k)
    delta2' = decay_chunk delta2 - u Kg        delta1' = decay_chunk delta1 - (gain_after e) a^T

Backwards, with delta2'_bar and delta1'_bar given:

    u_bar = -delta2'_bar Kg^T                        Kg_bar -= u^T delta2'_bar
    decay_chunk_bar += <delta2'_bar, delta2> + <delta1'_bar, delta1>
    gain' = sum_n u_bar d    erase_bar = sum_n u_bar (delta2 k)    gain_after_bar = -sum_n a (delta1'_bar^T e)
    d_bar = gain u_bar + (m_bar / m) / (e2 + 1e-9) d                       back_bar = sigma'(z) d_bar
    e_bar += w1 back_bar - gain_after (delta1'_bar a)
    a_bar = (m_bar / m) a - gain_after (delta1'_bar^T e) + w1^T y_bar
    z_bar = sigma'(z) a_bar + sigma''(z) back d_bar
    zv_bar = sigma'(w2 v) (w1^T tau_bar)
    w1_bar += e back_bar^T + y_bar a^T + tau_bar sigma(w2 v)^T             w2_bar += z_bar k^T + zv_bar v^T
    k_bar += w2^T z_bar + delta2^T (erase u_bar) + y_bar                   v_bar += w2^T zv_bar + tau_bar
    delta2_bar = decay_chunk delta2'_bar + (erase u_bar) k^T + w2_bar
    delta1_bar = decay_chunk delta1'_bar + w1_bar

gain' is the gain's adjoint through d alone; y_bar, tau_bar are the adjoints of M(k) and M(v). w_bar goes to
the shared base as well. A skip row is a row of w2 whose d is e itself.
FLOPs a token and memory: 12 D N and 18 D N; bytes: the weights in force, their adjoints and the shared gradient,
fp32.
One kernel for all of it needs more than 255 registers on sm_80: it would hold five weight tiles in two
orientations.
"""

import triton
import triton.language as tl

from ...shared.triton_math import sigma_two
from .backward_common import columns, commits_here
from .evaluate import add, add_where, evaluate_adjoint, evaluate_scalar_adjoint


@triton.jit(do_not_specialize=["end", "S"])
def inputs_kernel(
    in_force, weights_bar, k_p, place, e_p, vectors_p, factors_p, u_bar_p, outputs_bar_p, parts_p,
    end: tl.int64, S: tl.int64, shape: tl.constexpr, rule: tl.constexpr, clock: tl.constexpr,
    CT: tl.constexpr, NT: tl.constexpr,
):
    """Adds to weights_bar: to delta2 (which ``hidden_kernel`` has turned into the old deviation's) and to the
    base, and turns delta1s. parts [B H, M, N / NT, 2, D, C]: the second half on entry (with DGD), and with it
    the first half on return, of k."""
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
        decay_chunk = tl.load(vectors_p + (g * 3 + 2) * C)
        off2 = (m * N + n[:, None]) * D + f[None, :]
        at2 = g * R * D + off2
        w2 = tl.load(in_force.delta2 + at2).to(dtype)
        w2_bar = tl.zeros([NT, D], tl.float32)
        parts_p += (gm * (N // NT) + tile) * 2 * D * C
        outputs_bar_p += gm * 2 * D * C
        factors_p += gm * 9 * C
        if m < MF:
            off1 = m * D * N + f[:, None] * N + n[None, :]
            at1 = g * MF * D * N + off1
            w1 = tl.load(in_force.delta1 + at1).to(dtype)
            delta1_bar = tl.load(weights_bar.delta1 + at1).to(dtype)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                wide = f[:, None] * C + c[None, :]
                gain = tl.load(factors_p + c)
                k = columns(k_p, b, h, end - C + c, S, H, D)
                a, slope, curve = sigma_two(tl.dot(w2, k, input_precision="ieee"), rule.ACT)
                e = tl.load(e_p + gm * D * C + wide).to(dtype)
                back = tl.dot(tl.trans(w1), e, input_precision="ieee")
                u_bar = tl.load(u_bar_p + (gm * N + n[:, None]) * C + c[None, :]).to(tl.float32)
                d_bar = gain[None, :] * u_bar + tl.load(factors_p + 2 * C + c)[None, :] * slope * back
                z_bar = curve * back * d_bar
                gain_after = gain * tl.load(vectors_p + (g * 3 + 1) * C + c)
                y_bar = tl.load(outputs_bar_p + wide)
                a_bar = tl.load(factors_p + C + c)[None, :] * a
                a_bar -= gain_after[None, :] * tl.dot(tl.trans(delta1_bar), e, input_precision="ieee")
                a_bar += tl.dot(tl.trans(w1), y_bar.to(dtype), input_precision="ieee")
                z_bar = (z_bar + slope * a_bar).to(dtype)
                w2_bar = tl.dot(z_bar, tl.trans(k), w2_bar, input_precision="ieee")
                k_bar = tl.where(tile == 0, y_bar, 0.0)
                k_bar += tl.dot(tl.trans(w2), z_bar, input_precision="ieee")
                if rule.DGD:
                    k_bar += tl.load(parts_p + D * C + wide)
                tl.store(parts_p + wide, k_bar)
        elif MS > 0:
            s = m - MF
            at1s = (g * MS + s) * N + n
            w1s = tl.load(in_force.delta1s + at1s)
            delta1s_bar = tl.load(weights_bar.delta1s + at1s)
            w1s_bar = tl.zeros([NT], tl.float32)
            skip_off = ((MF + MS) * N + s) * D + f
            skip = tl.zeros([D], tl.float32)
            skip_bar = tl.zeros([D], tl.float32)
            if rule.SKIP:
                skip = tl.load(in_force.delta2 + g * R * D + skip_off).to(tl.float32)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                wide = f[:, None] * C + c[None, :]
                gain = tl.load(factors_p + c)
                gain_after = gain * tl.load(vectors_p + (g * 3 + 1) * C + c)
                k = columns(k_p, b, h, end - C + c, S, H, D)
                es = tl.load(e_p + gm * D * C + c)
                y_bar = tl.load(outputs_bar_p + c)
                a, slope, curve = sigma_two(tl.dot(w2, k, input_precision="ieee"), rule.ACT)
                back = w1s[:, None] * es[None, :]
                u_bar = tl.load(u_bar_p + (gm * N + n[:, None]) * C + c[None, :]).to(tl.float32)
                d_bar = gain[None, :] * u_bar + tl.load(factors_p + 2 * C + c)[None, :] * slope * back
                a_bar = tl.load(factors_p + C + c)[None, :] * a
                a_bar += w1s[:, None] * y_bar[None, :] - delta1s_bar[:, None] * (gain_after * es)[None, :]
                z_bar = (slope * a_bar + curve * back * d_bar).to(dtype)
                w1s_bar += tl.sum(slope * d_bar * es[None, :] + a * y_bar[None, :], 1)
                w2_bar = tl.dot(z_bar, tl.trans(k), w2_bar, input_precision="ieee")
                k_bar = tl.dot(tl.trans(w2), z_bar, input_precision="ieee")
                if rule.DGD:
                    k_bar += tl.load(parts_p + D * C + wide)
                if rule.SKIP:
                    k_bar += tl.where(tile == 0, skip[:, None] * y_bar[None, :], 0.0)
                    skip_bar += tl.sum(k.to(tl.float32) * y_bar[None, :], 1)
                tl.store(parts_p + wide, k_bar)
            tl.store(weights_bar.delta1s + at1s, decay_chunk * delta1s_bar + w1s_bar)
            if rule.HAS_BASE:
                add(weights_bar.base1s, at1s, w1s_bar)
            if rule.SKIP:
                add_where(weights_bar.delta2, g * R * D + skip_off, skip_bar, tile == 0)
                if rule.HAS_BASE:
                    add_where(weights_bar.base2, g * R * D + skip_off, skip_bar, tile == 0)
        add(weights_bar.delta2, at2, w2_bar)
        if rule.HAS_BASE:
            add(weights_bar.base2, at2, w2_bar)


@triton.jit(do_not_specialize=["end", "S"])
def outputs_kernel(
    in_force, weights_bar, slots, place, e_p, vectors_p, factors_p, u_bar_p, outputs_bar_p, parts_p,
    end: tl.int64, S: tl.int64, shape: tl.constexpr, rule: tl.constexpr, clock: tl.constexpr,
    CT: tl.constexpr, NT: tl.constexpr,
):
    """After ``inputs_kernel``, which needs delta1 of weights_bar as it was: delta1 and base1 through e, M(k) and
    M(v), of the memories with D outputs; and of all memories what comes through M(v), whose adjoint is the second
    half of outputs_bar [B H, M, 2, D, C]. parts [B H, M, N / NT, 2, D, C], second half: of v. Without own values it
    is v that receives outputs_bar, from all but the scalar memories."""
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
        at2 = g * R * D + (m * N + n[:, None]) * D + f[None, :]
        outputs_bar_p += gm * 2 * D * C
        factors_p += gm * 9 * C
        parts_p += ((gm * (N // NT) + tile) * 2 + 1) * D * C
        w2 = tl.load(in_force.delta2 + at2).to(dtype)
        w2_bar = tl.zeros([NT, D], tl.float32)
        if m < MF:
            at1 = g * MF * D * N + m * D * N + f[:, None] * N + n[None, :]
            w1 = tl.load(in_force.delta1 + at1).to(dtype)
            w1_bar = tl.zeros([D, NT], tl.float32)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                wide = f[:, None] * C + c[None, :]
                k = columns(slots.k, b, h, end - C + c, S, H, D)
                # in the registers there are
                a, slope, _ = sigma_two(tl.dot(w2, k, input_precision="ieee"), rule.ACT)
                e = tl.load(e_p + gm * D * C + wide).to(dtype)
                d = slope * tl.dot(tl.trans(w1), e, input_precision="ieee")
                u_bar = tl.load(u_bar_p + (gm * N + n[:, None]) * C + c[None, :]).to(tl.float32)
                back_bar = slope * (
                    tl.load(factors_p + c)[None, :] * u_bar + tl.load(factors_p + 2 * C + c)[None, :] * d
                )
                w1_bar = tl.dot(e, tl.trans(back_bar.to(dtype)), w1_bar, input_precision="ieee")
                y_bar = tl.load(outputs_bar_p + wide).to(dtype)
                w1_bar = tl.dot(y_bar, tl.trans(a.to(dtype)), w1_bar, input_precision="ieee")
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                wide = f[:, None] * C + c[None, :]
                v_bar = tl.load(outputs_bar_p + D * C + wide)
                if rule.OWN_VALUES:
                    v = columns(slots.v, b, h, end - C + c, S, H, D)
                    v_bar, w2_bar, w1_bar = evaluate_adjoint(v, v_bar, w2, w1, w2_bar, w1_bar, tile, rule.ACT)
                else:
                    v_bar = tl.where(tile == 0, v_bar, 0.0)
                tl.store(parts_p + wide, v_bar)
            delta1_bar_at = weights_bar.delta1 + at1
            tl.store(delta1_bar_at, tl.load(vectors_p + (g * 3 + 2) * C) * tl.load(delta1_bar_at) + w1_bar)
            if rule.HAS_BASE:
                add(weights_bar.base1, at1, w1_bar)
        elif MS > 0:
            s = m - MF
            at1s = (g * MS + s) * N + n
            w1s = tl.load(in_force.delta1s + at1s)
            w1s_bar = tl.zeros([NT], tl.float32)
            skip_off = ((MF + MS) * N + s) * D + f
            skip = tl.zeros([D], tl.float32)
            skip_bar = tl.zeros([D], tl.float32)
            if rule.SKIP:
                skip = tl.load(in_force.delta2 + g * R * D + skip_off).to(tl.float32)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                v = columns(slots.v, b, h, end - C + c, S, H, D)
                y_bar = tl.load(outputs_bar_p + D * C + c)
                x_bar, w2_bar, w1s_bar, skip_bar = evaluate_scalar_adjoint(
                    v, y_bar, w2, w1s, skip, w2_bar, w1s_bar, skip_bar, tile, rule.ACT, rule.SKIP
                )
                tl.store(parts_p + f[:, None] * C + c[None, :], x_bar)
            add(weights_bar.delta1s, at1s, w1s_bar)
            if rule.HAS_BASE:
                add(weights_bar.base1s, at1s, w1s_bar)
            if rule.SKIP:
                add_where(weights_bar.delta2, g * R * D + skip_off, skip_bar, tile == 0)
                if rule.HAS_BASE:
                    add_where(weights_bar.base2, g * R * D + skip_off, skip_bar, tile == 0)
        if rule.OWN_VALUES or m >= MF:
            add(weights_bar.delta2, at2, w2_bar)
            if rule.HAS_BASE:
                add(weights_bar.base2, at2, w2_bar)
