"""The write of a full chunk of C tokens, in three kinds of tasks, each of which needs all tasks of the kind
before it (same row and head).

    errors   memories, C / CT   e at the outputs, |e|^2
    hidden   memories, N / NT   a = sigma(w2 k), d = sigma'(w2 k) (w1^T e), and this tile's part of |a|^2 and |d|^2
    update   memories, N / NT   delta2 -= U^T Kg and delta1 -= (gain e)^T a on its rows, with the step sizes of triton_steps.py.
                                With momentum s2 += (gain d)^T k and s1 += (gain e)^T a as well, and delta -= c_C s  (triton_momentum.py)

e needs all of N, step sizes need all of N. a and d travel through scratch (L2). Partial norms are stored per
tile and added in one order by everybody who needs them: no atomics.
"""

import triton
import triton.language as tl

from ...shared.triton_math import sigma, sigma_and_slope, unit_columns
from .common import weight
from .read import scalar_memory


@triton.jit
def _columns(p, b_slot, h, first, c0, H: tl.constexpr, D: tl.constexpr, CT: tl.constexpr):
    """[D, CT]: pending tokens first + c0 on, as columns."""
    at = (b_slot + first + c0 + tl.arange(0, CT)) * H + h
    return tl.load(p + at[None, :] * D + tl.arange(0, D)[:, None])


@triton.jit
def errors_task(
    base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, k_p, v_p, e_p, es_p, e2_p, g, m, c0, first,
    grad_scale,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, BIG: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr, ACT: tl.constexpr,
    HAS_BASE: tl.constexpr, SKIP: tl.constexpr,
    OWN: tl.constexpr, TARGET_NORM: tl.constexpr, DOT: tl.constexpr,
):
    """e [B H, MF, D, C], es [B H, MS, C], e2 [B H, M, C]."""
    b, h = g // H, g % H
    b_slot = b * BIG
    c = c0 + tl.arange(0, CT)
    d = tl.arange(0, D)
    w2_at, w2_base = (g * R + m * N) * D, (h * R + m * N) * D
    if m < MF:
        k = _columns(k_p, b_slot, h, first, c0, H, D, CT)
        v = _columns(v_p, b_slot, h, first, c0, H, D, CT)
        w1_at, w1_base = (g * MF + m) * D * N, (h * MF + m) * D * N
        # M is needed at v only for own values, at k only for the l2 objective; if at both, as columns k0 v0
        # k1 v1 ... of one product
        if OWN and not DOT:
            x = tl.reshape(tl.join(k, v), [D, 2 * CT])
        else:
            x = v if OWN else k
        out = x.to(tl.float32)
        if OWN or not DOT:
            for n0 in range(0, N, NT):
                n = n0 + tl.arange(0, NT)
                w2_off, w1_off = n[:, None] * D + d[None, :], d[:, None] * N + n[None, :]
                w2 = weight(delta2_p, base2_p, w2_at + w2_off, w2_base + w2_off, HAS_BASE).to(k.dtype)
                w1 = weight(delta1_p, base1_p, w1_at + w1_off, w1_base + w1_off, HAS_BASE).to(k.dtype)
                out = tl.dot(
                    w1, sigma(tl.dot(w2, x, input_precision="ieee"), ACT).to(k.dtype), out, input_precision="ieee"
                )
        if OWN and not DOT:
            at_k, target = tl.split(tl.reshape(out, [D, CT, 2]))
        elif OWN:
            at_k, target = k.to(tl.float32), out
        else:
            at_k, target = out, v.to(tl.float32)
        if TARGET_NORM:
            target = unit_columns(target)
        if DOT:
            e = -target
        else:
            e = grad_scale * (at_k - target)
        tl.store(e_p + (g * MF + m) * D * C + d[:, None] * C + c[None, :], e)
        tl.store(e2_p + (g * (MF + MS) + m) * C + c, tl.sum(e * e, 0))
    elif MS > 0:
        s = m - MF
        w1_at, w1_base = (g * MS + s) * N, (h * MS + s) * N
        skip_at, skip_base = (g * R + (MF + MS) * N + s) * D, (h * R + (MF + MS) * N + s) * D
        k = _columns(k_p, b_slot, h, first, c0, H, D, CT)
        v = _columns(v_p, b_slot, h, first, c0, H, D, CT)
        own_target = scalar_memory(
            v, delta2_p, base2_p, delta1s_p, base1s_p, w2_at, w2_base, w1_at, w1_base, skip_at, skip_base, D,
            N, NT, ACT, HAS_BASE, SKIP
        )
        if TARGET_NORM:
            own_target = tl.minimum(tl.maximum(own_target, -1.0), 1.0)
        es = -own_target
        if not DOT:
            es += scalar_memory(
                k, delta2_p, base2_p, delta1s_p, base1s_p, w2_at, w2_base, w1_at, w1_base, skip_at, skip_base,
                D, N, NT, ACT, HAS_BASE, SKIP,
            )
            es *= grad_scale
        tl.store(es_p + (g * MS + s) * C + c, es)
        tl.store(e2_p + (g * (MF + MS) + m) * C + c, es * es)


@triton.jit
def hidden_task(
    base2_p, base1_p, base1s_p, delta2_p, delta1_p, delta1s_p, k_p, e_p, es_p, a_p, d_p, norms_p, g, m, tile, first,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, BIG: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr, ACT: tl.constexpr,
    HAS_BASE: tl.constexpr, CLIP: tl.constexpr,
):
    """a, d [B H, M, N, C] in the dtype of k and in fp32; norms [B H, M, N / NT, 2, C]."""
    b, h = g // H, g % H
    b_slot = b * BIG
    d = tl.arange(0, D)
    n = tile * NT + tl.arange(0, NT)
    off = n[:, None] * D + d[None, :]
    w2 = weight(
        delta2_p, base2_p, (g * R + m * N) * D + off, (h * R + m * N) * D + off, HAS_BASE
    ).to(k_p.dtype.element_ty)
    own = g * (MF + MS) + m
    for c0 in range(0, C, CT):
        c = c0 + tl.arange(0, CT)
        k = _columns(k_p, b_slot, h, first, c0, H, D, CT)
        a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), ACT)
        if m < MF:
            off1 = d[None, :] * N + n[:, None]
            w1 = weight(
                delta1_p, base1_p, (g * MF + m) * D * N + off1, (h * MF + m) * D * N + off1, HAS_BASE
            ).to(k.dtype)
            e = tl.load(e_p + (g * MF + m) * D * C + d[:, None] * C + c[None, :]).to(k.dtype)
            grad = slope * tl.dot(w1, e, input_precision="ieee")
        else:
            s = m - MF
            w1s = weight(delta1s_p, base1s_p, (g * MS + s) * N + n, (h * MS + s) * N + n, HAS_BASE)
            grad = slope * (w1s[:, None] * tl.load(es_p + (g * MS + s) * C + c)[None, :])
        to = (own * N + n[:, None]) * C + c[None, :]
        tl.store(a_p + to, a.to(a_p.dtype.element_ty))
        tl.store(d_p + to, grad)
        if CLIP:
            part = norms_p + (own * (N // NT) + tile) * 2 * C + c
            tl.store(part, tl.sum(a * a, 0))
            tl.store(part + C, tl.sum(grad * grad, 0))


@triton.jit
def update_task(
    delta2_p, delta1_p, delta1s_p, s2_p, s1_p, s1s_p, k_p, steps_p, e_p, es_p, a_p, d_p, keys_p, vectors_p, g,
    m, tile, first,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, BIG: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr, SKIP: tl.constexpr, DGD: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    """delta2, delta1, delta1s (and s2, s1, s1s) in place, NT hidden units; steps [B H, M, C]: the tokens'
    step sizes.

    keys and vectors: ``clock_body``'s, or ``momentum_body``'s, and then gradients move by keys[1] and what is
    erased, of delta2 and s2, by keys[0].
    """
    VECTORS: tl.constexpr = 7 if MOMENTUM else 3
    KEYS: tl.constexpr = 2 if MOMENTUM else 1
    b, h = g // H, g % H
    b_slot = b * BIG
    own = g * (MF + MS) + m
    d = tl.arange(0, D)
    n = tile * NT + tl.arange(0, NT)
    dtype = k_p.dtype.element_ty
    vectors_p += g * VECTORS * C
    moving_p = keys_p + (g * KEYS + KEYS - 1) * C * D
    keep = tl.load(vectors_p + 2 * C)
    if MOMENTUM:
        arrive, carry_s = tl.load(vectors_p + 2 * C + 1), tl.load(vectors_p + 2 * C + 2)

    w2_off = (g * R + m * N) * D + n[:, None] * D + d[None, :]
    w2_at = delta2_p + w2_off
    delta2 = tl.load(w2_at)
    old = delta2.to(dtype)
    moved = tl.zeros([NT, D], tl.float32)
    if MOMENTUM and DGD:
        old_s = tl.load(s2_p + w2_off).to(dtype)
        for c0 in range(0, C, CT):
            c = c0 + tl.arange(0, CT)
            k = _columns(k_p, b_slot, h, first, c0, H, D, CT)
            erased = tl.load(vectors_p + c)[None, :] * tl.dot(old, k, input_precision="ieee")
            erased -= tl.load(vectors_p + 3 * C + c)[None, :] * tl.dot(old_s, k, input_precision="ieee")
            keys = tl.load(keys_p + (g * KEYS * C + c)[:, None] * D + d[None, :])
            moved = tl.dot(erased.to(dtype), keys.to(dtype), moved, input_precision="ieee")
    for c0 in range(0, C, CT):
        c = c0 + tl.arange(0, CT)
        gain = tl.load(steps_p + own * C + c)
        u = gain[None, :] * tl.load(d_p + (own * N + n[:, None]) * C + c[None, :])
        if DGD and not MOMENTUM:
            carry = tl.load(vectors_p + c)
            u += carry[None, :] * tl.dot(old, _columns(k_p, b_slot, h, first, c0, H, D, CT), input_precision="ieee")
        keys = tl.load(moving_p + c[:, None] * D + d[None, :])
        moved = tl.dot(u.to(dtype), keys.to(dtype), moved, input_precision="ieee")
    if MOMENTUM:
        s2 = tl.load(s2_p + w2_off)
        tl.store(w2_at, keep * delta2 - arrive * s2 - moved)
        s2 = carry_s * s2
        for c0 in range(0, C, CT):
            c = c0 + tl.arange(0, CT)
            gain = tl.load(steps_p + own * C + c)
            gain *= tl.load(vectors_p + 4 * C + c)
            u = gain[None, :] * tl.load(d_p + (own * N + n[:, None]) * C + c[None, :])
            k = _columns(k_p, b_slot, h, first, c0, H, D, CT)
            s2 = tl.dot(u.to(dtype), tl.trans(k), s2, input_precision="ieee")
        tl.store(s2_p + w2_off, s2)
    else:
        tl.store(w2_at, keep * delta2 - moved)

    if m < MF:
        w1_off = (g * MF + m) * D * N + d[:, None] * N + n[None, :]
        w1_at = delta1_p + w1_off
        delta1 = keep * tl.load(w1_at)
        if MOMENTUM:
            s1 = tl.load(s1_p + w1_off)
            delta1 -= arrive * s1
            s1 = carry_s * s1
        for c0 in range(0, C, CT):
            c = c0 + tl.arange(0, CT)
            step = tl.load(steps_p + own * C + c)
            if MOMENTUM:
                tail = step * tl.load(vectors_p + 4 * C + c)
            step *= tl.load(vectors_p + C + c)
            e = step[None, :] * tl.load(e_p + (g * MF + m) * D * C + d[:, None] * C + c[None, :])
            a = tl.load(a_p + (own * N + n[None, :]) * C + c[:, None])
            delta1 = tl.dot((-e).to(dtype), a, delta1, input_precision="ieee")
            if MOMENTUM:
                e = tail[None, :] * tl.load(e_p + (g * MF + m) * D * C + d[:, None] * C + c[None, :])
                s1 = tl.dot(e.to(dtype), a, s1, input_precision="ieee")
        tl.store(w1_at, delta1)
        if MOMENTUM:
            tl.store(s1_p + w1_off, s1)
    elif MS > 0:
        s = m - MF
        w1s_at = delta1s_p + (g * MS + s) * N + n
        delta1s = keep * tl.load(w1s_at)
        skip_off = (g * R + (MF + MS) * N + s) * D + d
        skip_at = delta2_p + skip_off
        skip = tl.zeros([D], tl.float32)
        if SKIP:
            skip = tl.load(skip_at, mask=tile == 0, other=0.0)
        kept = keep * skip
        if MOMENTUM:
            s1s = tl.load(s1s_p + (g * MS + s) * N + n)
            delta1s -= arrive * s1s
            s1s *= carry_s
            skip_s = tl.zeros([D], tl.float32)
            if SKIP:
                skip_s = tl.load(s2_p + skip_off, mask=tile == 0, other=0.0)
            kept -= arrive * skip_s
            kept_s = carry_s * skip_s
        for c0 in range(0, C, CT):
            c = c0 + tl.arange(0, CT)
            gain = tl.load(steps_p + own * C + c)
            es = tl.load(es_p + (g * MS + s) * C + c)
            step = gain * tl.load(vectors_p + C + c) * es
            rows = tl.load(a_p + (own * N + n[:, None]) * C + c[None, :]).to(tl.float32)
            delta1s -= tl.sum(rows * step[None, :], 1)
            if MOMENTUM:
                tail = gain * tl.load(vectors_p + 4 * C + c) * es
                s1s += tl.sum(rows * tail[None, :], 1)
            if SKIP:
                skip_u = gain * es
                if DGD or MOMENTUM:
                    columns = _columns(k_p, b_slot, h, first, c0, H, D, CT).to(tl.float32)
                if DGD:
                    erased = tl.load(vectors_p + c) * tl.sum(skip.to(dtype).to(tl.float32)[:, None] * columns, 0)
                    if MOMENTUM:
                        erased -= tl.load(vectors_p + 3 * C + c) * tl.sum(
                            skip_s.to(dtype).to(tl.float32)[:, None] * columns, 0
                        )
                        erasing = tl.load(
                            keys_p + (g * KEYS * C + c)[:, None] * D + d[None, :]
                        ).to(dtype).to(tl.float32)
                        kept -= tl.sum(erased.to(dtype).to(tl.float32)[:, None] * erasing, 0)
                    else:
                        skip_u += erased
                key_rows = tl.load(moving_p + c[:, None] * D + d[None, :]).to(dtype).to(tl.float32)
                kept -= tl.sum(skip_u.to(dtype).to(tl.float32)[:, None] * key_rows, 0)
                if MOMENTUM:
                    kept_s += tl.sum(tail.to(dtype).to(tl.float32)[None, :] * columns, 1)
        tl.store(w1s_at, delta1s)
        if SKIP:
            tl.store(skip_at, kept, mask=tile == 0)
        if MOMENTUM:
            tl.store(s1s_p + (g * MS + s) * N + n, s1s)
            if SKIP:
                tl.store(s2_p + skip_off, kept_s, mask=tile == 0)
