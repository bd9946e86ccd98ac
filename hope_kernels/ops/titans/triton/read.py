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

from ...shared.triton_math import log1p_exp, sigma, sigmoid, unit_columns
from .common import weight


@triton.jit
def read_task(
    x_p, q_p, o_p, given_beta_p, base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, k_p, v_p, eta_p,
    alpha_p, beta_p, eta_bias_p, alpha_bias_p, g, m, first, phase, stop, T, eta_scale,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    BIG: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr,
    SKIP: tl.constexpr,
    UNIT_K: tl.constexpr, SOFTPLUS: tl.constexpr, MOMENTUM: tl.constexpr, ADAPTIVE_Q: tl.constexpr,
):
    """Memory m of (row, head) g on slots first .. first + CT, of which the row reads phase .. stop in this
    call.
    x, q, o [B, T, H, D] (q is o with ADAPTIVE_Q); weights as in fast_weights.py; k, v [B, BIG, H, D]; eta,
    alpha, beta [B, BIG, H]."""
    b, h = g // H, g % H
    if (first < stop) & (first + CT > phase):
        slot = first + tl.arange(0, CT)
        live = (slot >= phase) & (slot < stop)
        d = tl.arange(0, D)
        token = ((b * T + slot - phase) * H + h) * D
        kept = (b * BIG + slot % BIG) * H + h
        if m == 0:
            x = tl.load(q_p + token[None, :] + d[:, None], mask=live[None, :], other=0.0)
        else:
            x = tl.load(x_p + token[None, :] + d[:, None], mask=live[None, :], other=0.0)
        w2_at, w2_base = (g * R + m * N) * D, (h * R + m * N) * D
        if m < MF:
            w1_at, w1_base = (g * MF + m) * D * N, (h * MF + m) * D * N
            out = x.to(tl.float32)
            for n0 in range(0, N, NT):
                n = n0 + tl.arange(0, NT)
                w2_off, w1_off = n[:, None] * D + d[None, :], d[:, None] * N + n[None, :]
                w2 = weight(delta2_p, base2_p, w2_at + w2_off, w2_base + w2_off, HAS_BASE).to(x.dtype)
                a = sigma(tl.dot(w2, x, input_precision="ieee"), ACT).to(x.dtype)
                w1 = weight(delta1_p, base1_p, w1_at + w1_off, w1_base + w1_off, HAS_BASE).to(x.dtype)
                out = tl.dot(w1, a, out, input_precision="ieee")
            if m == 0:
                tl.store(o_p + token[None, :] + d[:, None], out.to(o_p.dtype.element_ty), mask=live[None, :])
            elif m == 1:
                if UNIT_K:
                    out = unit_columns(out)
                tl.store(k_p + kept[None, :] * D + d[:, None], out.to(k_p.dtype.element_ty), mask=live[None, :])
            elif ADAPTIVE_Q and m == MF - 1:
                if UNIT_K:
                    out = unit_columns(out)
                tl.store(q_p + token[None, :] + d[:, None], out.to(q_p.dtype.element_ty), mask=live[None, :])
            else:
                tl.store(v_p + kept[None, :] * D + d[:, None], out.to(v_p.dtype.element_ty), mask=live[None, :])
        elif MS > 0:
            s = m - MF
            y = scalar_memory(
                x, delta2_p, base2_p, delta1s_p, base1s_p, w2_at, w2_base, (g * MS + s) * N, (h * MS + s) * N,
                (g * R + (MF + MS) * N + s) * D, (h * R + (MF + MS) * N + s) * D, D, N, NT, ACT, HAS_BASE, SKIP,
            )
            if s == 0:
                y += tl.load(eta_bias_p + h).to(tl.float32)
                gate = log1p_exp(y) if SOFTPLUS else sigmoid(y)
                tl.store(eta_p + kept, eta_scale * gate, mask=live)
                if MOMENTUM:
                    beta = tl.load(given_beta_p + (b * T + slot - phase) * H + h, mask=live, other=0.0)
                    tl.store(beta_p + kept, beta.to(tl.float32), mask=live)
            else:
                tl.store(alpha_p + kept, sigmoid(y + tl.load(alpha_bias_p + h).to(tl.float32)), mask=live)


@triton.jit
def scalar_memory(
    x, delta2_p, base2_p, delta1s_p, base1s_p, w2_at, w2_base, w1_at, w1_base, skip_at, skip_base,
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr,
    SKIP: tl.constexpr,
):
    """M(x) of a memory with one output, for columns x [D, C]: [C]."""
    d = tl.arange(0, D)
    y = tl.zeros([x.shape[1]], tl.float32)
    for n0 in range(0, N, NT):
        n = n0 + tl.arange(0, NT)
        off = n[:, None] * D + d[None, :]
        w2 = weight(delta2_p, base2_p, w2_at + off, w2_base + off, HAS_BASE).to(x.dtype)
        a = sigma(tl.dot(w2, x, input_precision="ieee"), ACT)
        w1 = weight(delta1s_p, base1s_p, w1_at + n, w1_base + n, HAS_BASE)
        y += tl.sum(w1[:, None] * a, 0)
    if SKIP:
        skip = weight(delta2_p, base2_p, skip_at + d, skip_base + d, HAS_BASE).to(x.dtype)
        y += tl.sum(skip[:, None].to(tl.float32) * x.to(tl.float32), 0)
    return y


@triton.jit
def append_task(
    given_k_p, given_v_p, given_eta_p, given_alpha_p, given_beta_p, k_p, v_p, eta_p, alpha_p, beta_p, g,
    first, phase, stop, T,
    H: tl.constexpr, D: tl.constexpr, BIG: tl.constexpr, CT: tl.constexpr, HAS_ALPHA: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    """Tokens whose k, v, eta, alpha, beta are given ([B, T, H, ...]) into the pending slots."""
    b, h = g // H, g % H
    slot = first + tl.arange(0, CT)
    live = (slot >= phase) & (slot < stop)
    d = tl.arange(0, D)[None, :]
    token, kept = (b * T + slot - phase) * H + h, (b * BIG + slot % BIG) * H + h
    wide = live[:, None]
    tl.store(
        k_p + kept[:, None] * D + d, tl.load(given_k_p + token[:, None] * D + d, mask=wide, other=0.0), mask=wide
    )
    tl.store(
        v_p + kept[:, None] * D + d, tl.load(given_v_p + token[:, None] * D + d, mask=wide, other=0.0), mask=wide
    )
    tl.store(eta_p + kept, tl.load(given_eta_p + token, mask=live, other=0.0).to(tl.float32), mask=live)
    if HAS_ALPHA:
        tl.store(alpha_p + kept, tl.load(given_alpha_p + token, mask=live, other=0.0).to(tl.float32), mask=live)
    if MOMENTUM:
        tl.store(beta_p + kept, tl.load(given_beta_p + token, mask=live, other=0.0).to(tl.float32), mask=live)


@triton.jit
def close_task(k_p, v_p, eta_p, alpha_p, beta_p, g, stop, H: tl.constexpr, D: tl.constexpr, BIG: tl.constexpr,
               CT: tl.constexpr,
               HAS_ALPHA: tl.constexpr, MOMENTUM: tl.constexpr):
    """Zeros in the slots behind the open chunk's tokens, where a chunk has been committed."""
    b, h = g // H, g % H
    d = tl.arange(0, D)
    for first in range(0, BIG, CT):
        slot = first + tl.arange(0, CT)
        free = slot >= stop % BIG
        kept = (b * BIG + slot) * H + h
        zeros = tl.zeros([CT, D], k_p.dtype.element_ty)
        tl.store(k_p + kept[:, None] * D + d[None, :], zeros, mask=free[:, None])
        tl.store(v_p + kept[:, None] * D + d[None, :], zeros, mask=free[:, None])
        tl.store(eta_p + kept, tl.zeros([CT], tl.float32), mask=free)
        if HAS_ALPHA:
            tl.store(alpha_p + kept, tl.zeros([CT], tl.float32), mask=free)
        if MOMENTUM:
            tl.store(beta_p + kept, tl.zeros([CT], tl.float32), mask=free)
