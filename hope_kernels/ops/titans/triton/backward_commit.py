"""The commit backwards, what is done per hidden unit: grid (B H, memories, N / NT), C tokens in tiles of CT.

    sums_kernel, hidden_kernel    triton_backward_hidden.py
    inputs_kernel                 adjoint of w2 (and of a scalar memory's w1s), and this tile's part of that of k
    outputs_kernel                adjoint of w1
    values_kernel                 M(v), which is a read backwards: triton_backward_read.py

Forwards (memory.py), with z = w2 k, a = sigma(z), back = w1^T e, d = sigma'(z) back, carry = eta before, step
= gain end:

    u = gain d + carry delta2 k        delta2' = keep delta2 - u Kg        delta1' = keep delta1 - (step e) a^T

Backwards, with adj2, adj1 the adjoints of delta2', delta1':

    u_bar = -adj2 Kg^T                 Kg_bar -= u^T adj2                  keep_bar += <adj2, delta2> + <adj1, delta1>
    gain' = sum_n u_bar d              carry' = sum_n u_bar (delta2 k)     step' = -sum_n a (adj1^T e)
    d_bar = gain u_bar + (m_bar / m) / (e2 + 1e-9) d                       back_bar = sigma'(z) d_bar
    e_bar += w1 back_bar - step (adj1 a)                                   w1_bar += e back_bar^T + y_bar a^T + t_bar sigma(w2 v)^T
    a_bar = (m_bar / m) a - step (adj1^T e) + w1^T y_bar                   z_bar = sigma'(z) a_bar + sigma''(z) back d_bar
    zv_bar = sigma'(w2 v) (w1^T t_bar)                                     w2_bar += z_bar k^T + zv_bar v^T
    k_bar += w2^T z_bar + delta2^T (carry u_bar) + y_bar                   v_bar += w2^T zv_bar + t_bar
    adj delta2 = keep adj2 + (carry u_bar) k^T + w2_bar                    adj delta1 = keep adj1 + w1_bar

y_bar, t_bar: adjoints of M(k) and M(v). w_bar goes to the shared base as well. A skip row is a row of w2
whose d is e itself.
FLOPs a token and memory: 12 D N and 8 D N; bytes: the weights, their adjoints and the shared gradient, fp32.
One kernel for all of it needs more than 255 registers on sm_80: it would hold five weight tiles in two
orientations.
"""

import triton
import triton.language as tl

from ...shared.triton_math import sigma_and_slope, sigma_two
from .backward_common import columns, commits_here
from .common import weight
from .evaluate import add, add_where


@triton.jit(do_not_specialize=["end", "S"])
def inputs_kernel(
    base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, adj2_p, adj1_p, adj1s_p, grad2_p, grad1_p,
    grad1s_p, k_p, lo_p, hi_p,
    e_p, vectors_p, steps_p, u_bar_p, outputs_bar_p, parts_p, end: tl.int64, S: tl.int64,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    M0: tl.constexpr,
    C: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr,
    SKIP: tl.constexpr, DGD: tl.constexpr,
):
    """Adds to adj2 (which ``hidden_kernel`` has turned), to grad, and makes adj1s the old deviation's. parts
    [B H, M, N / NT, 2, D, C]: the second half on entry (with DGD), and with it the first half on return, of
    k."""
    g = tl.program_id(0).to(tl.int64)
    m = M0 + tl.program_id(1)
    tile = tl.program_id(2)
    b, h = g // H, g % H
    if commits_here(lo_p, hi_p, b, end):
        d = tl.arange(0, D)
        n = tile * NT + tl.arange(0, NT)
        own = g * (MF + MS) + m
        dtype = k_p.dtype.element_ty
        keep = tl.load(vectors_p + (g * 3 + 2) * C)
        off2 = (m * N + n[:, None]) * D + d[None, :]
        at2 = g * R * D + off2
        w2 = weight(delta2_p, base2_p, at2, h * R * D + off2, HAS_BASE).to(dtype)
        acc2 = tl.zeros([NT, D], tl.float32)
        parts_p += (own * (N // NT) + tile) * 2 * D * C
        outputs_bar_p += own * 2 * D * C
        steps_p += own * 9 * C
        if m < MF:
            off1 = m * D * N + d[:, None] * N + n[None, :]
            at1 = g * MF * D * N + off1
            w1 = weight(delta1_p, base1_p, at1, h * MF * D * N + off1, HAS_BASE).to(dtype)
            adj1 = tl.load(adj1_p + at1).to(dtype)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                wide = d[:, None] * C + c[None, :]
                gain = tl.load(steps_p + c)
                k = columns(k_p, b, h, end - C + c, S, H, D)
                a, slope, curve = sigma_two(tl.dot(w2, k, input_precision="ieee"), ACT)
                e = tl.load(e_p + own * D * C + wide).to(dtype)
                back = tl.dot(tl.trans(w1), e, input_precision="ieee")
                u_bar = tl.load(u_bar_p + (own * N + n[:, None]) * C + c[None, :])
                d_bar = gain[None, :] * u_bar + tl.load(steps_p + 2 * C + c)[None, :] * slope * back
                z_bar = curve * back * d_bar
                step = gain * tl.load(vectors_p + (g * 3 + 1) * C + c)
                y_bar = tl.load(outputs_bar_p + wide)
                a_bar = tl.load(steps_p + C + c)[None, :] * a
                a_bar -= step[None, :] * tl.dot(tl.trans(adj1), e, input_precision="ieee")
                a_bar += tl.dot(tl.trans(w1), y_bar.to(dtype), input_precision="ieee")
                z_bar = (z_bar + slope * a_bar).to(dtype)
                acc2 = tl.dot(z_bar, tl.trans(k), acc2, input_precision="ieee")
                k_bar = tl.where(tile == 0, y_bar, 0.0)
                k_bar += tl.dot(tl.trans(w2), z_bar, input_precision="ieee")
                if DGD:
                    k_bar += tl.load(parts_p + D * C + wide)
                tl.store(parts_p + wide, k_bar)
        elif MS > 0:
            s = m - MF
            at1s = (g * MS + s) * N + n
            w1s = weight(delta1s_p, base1s_p, at1s, (h * MS + s) * N + n, HAS_BASE)
            adj1s = tl.load(adj1s_p + at1s)
            acc1s = tl.zeros([NT], tl.float32)
            skip_off = ((MF + MS) * N + s) * D + d
            skip_w = tl.zeros([D], tl.float32)
            skip_acc = tl.zeros([D], tl.float32)
            if SKIP:
                skip_w = weight(delta2_p, base2_p, g * R * D + skip_off, h * R * D + skip_off, HAS_BASE)
            for c0 in range(0, C, CT):
                c = c0 + tl.arange(0, CT)
                wide = d[:, None] * C + c[None, :]
                gain = tl.load(steps_p + c)
                step = gain * tl.load(vectors_p + (g * 3 + 1) * C + c)
                k = columns(k_p, b, h, end - C + c, S, H, D)
                es = tl.load(e_p + own * D * C + c)
                y_bar = tl.load(outputs_bar_p + c)
                a, slope, curve = sigma_two(tl.dot(w2, k, input_precision="ieee"), ACT)
                back = w1s[:, None] * es[None, :]
                u_bar = tl.load(u_bar_p + (own * N + n[:, None]) * C + c[None, :])
                d_bar = gain[None, :] * u_bar + tl.load(steps_p + 2 * C + c)[None, :] * slope * back
                a_bar = tl.load(steps_p + C + c)[None, :] * a
                a_bar += w1s[:, None] * y_bar[None, :] - adj1s[:, None] * (step * es)[None, :]
                z_bar = (slope * a_bar + curve * back * d_bar).to(dtype)
                acc1s += tl.sum(slope * d_bar * es[None, :] + a * y_bar[None, :], 1)
                acc2 = tl.dot(z_bar, tl.trans(k), acc2, input_precision="ieee")
                k_bar = tl.dot(tl.trans(w2), z_bar, input_precision="ieee")
                if DGD:
                    k_bar += tl.load(parts_p + D * C + wide)
                if SKIP:
                    k_bar += tl.where(tile == 0, skip_w[:, None] * y_bar[None, :], 0.0)
                    skip_acc += tl.sum(k.to(tl.float32) * y_bar[None, :], 1)
                tl.store(parts_p + wide, k_bar)
            tl.store(adj1s_p + at1s, keep * adj1s + acc1s)
            if HAS_BASE:
                add(grad1s_p, at1s, acc1s)
            if SKIP:
                add_where(adj2_p, g * R * D + skip_off, skip_acc, tile == 0)
                if HAS_BASE:
                    add_where(grad2_p, g * R * D + skip_off, skip_acc, tile == 0)
        add(adj2_p, at2, acc2)
        if HAS_BASE:
            add(grad2_p, at2, acc2)


@triton.jit(do_not_specialize=["end", "S"])
def outputs_kernel(
    base2_p, base1_p, delta2_p, delta1_p, adj1_p, grad1_p, k_p, lo_p, hi_p, e_p, vectors_p, steps_p, u_bar_p,
    outputs_bar_p, end: tl.int64, S: tl.int64,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    M0: tl.constexpr,
    C: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr,
):
    """adj1 and grad1 of the memories with D outputs, after ``inputs_kernel``, which needs adj1 as it was."""
    g = tl.program_id(0).to(tl.int64)
    m = M0 + tl.program_id(1)
    b, h = g // H, g % H
    if commits_here(lo_p, hi_p, b, end):
        d = tl.arange(0, D)
        n = tl.program_id(2) * NT + tl.arange(0, NT)
        own = g * (MF + MS) + m
        dtype = k_p.dtype.element_ty
        off2, off1 = (m * N + n[:, None]) * D + d[None, :], m * D * N + d[:, None] * N + n[None, :]
        at1 = g * MF * D * N + off1
        w2 = weight(delta2_p, base2_p, g * R * D + off2, h * R * D + off2, HAS_BASE).to(dtype)
        w1 = weight(delta1_p, base1_p, at1, h * MF * D * N + off1, HAS_BASE).to(dtype)
        acc1 = tl.zeros([D, NT], tl.float32)
        steps_p += own * 9 * C
        for c0 in range(0, C, CT):
            c = c0 + tl.arange(0, CT)
            wide = own * D * C + d[:, None] * C + c[None, :]
            k = columns(k_p, b, h, end - C + c, S, H, D)
            a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), ACT)
            e = tl.load(e_p + wide).to(dtype)
            grad = slope * tl.dot(tl.trans(w1), e, input_precision="ieee")
            u_bar = tl.load(u_bar_p + (own * N + n[:, None]) * C + c[None, :])
            back_bar = slope * (
                tl.load(steps_p + c)[None, :] * u_bar + tl.load(steps_p + 2 * C + c)[None, :] * grad
            )
            acc1 = tl.dot(e, tl.trans(back_bar.to(dtype)), acc1, input_precision="ieee")
            y_bar = tl.load(outputs_bar_p + own * D * C + wide).to(dtype)
            acc1 = tl.dot(y_bar, tl.trans(a.to(dtype)), acc1, input_precision="ieee")
        tl.store(adj1_p + at1, tl.load(vectors_p + (g * 3 + 2) * C) * tl.load(adj1_p + at1) + acc1)
        if HAS_BASE:
            add(grad1_p, at1, acc1)
