"""The write of a full chunk of C tokens, in three kinds of tasks, each of which needs all tasks of the kind
before it (same row and head).

    errors   memories, C / CT   e at the outputs, |e|^2
    hidden   memories, N / NT   a = sigma(w2 k), d = sigma'(w2 k) (w1^T e), this tile's part of |a|^2 and |d|^2
    update   memories, N / NT   delta2 -= u^T Kg and delta1 -= (gain e)^T a on its rows, with the gain of
                                gain.py; with momentum s2 += (gain d)^T k and s1 += (gain e)^T a as well, and
                                delta -= c_C s (momentum.py)

e needs all of N, and so does the gain. a and d travel through scratch (L2). Partial norms are stored per tile
and added in one order by everybody who needs them: no atomics.

``start``: the chunk's first token, counted over the pending slots of all rows.
"""

import triton
import triton.language as tl

from ...shared.triton_math import sigma_and_slope, unit_columns
from .clock import erases_at_once
from .common import load_w1s, rounded_w1, rounded_w2
from .evaluate import evaluate_in_force, evaluate_scalar_in_force


@triton.jit
def _columns(p, start, h, c0, H: tl.constexpr, D: tl.constexpr, CT: tl.constexpr):
    """[D, CT]: pending tokens start + c0 on, as columns."""
    at = (start + c0 + tl.arange(0, CT)) * H + h
    return tl.load(p + at[None, :] * D + tl.arange(0, D)[:, None])


@triton.jit
def errors_task(
    weights, in_force, updated, pending, scratch, g, m, c0, start, grad_scale, shape: tl.constexpr,
    rule: tl.constexpr, no_base: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr,
):
    """e [B H, MF, D, C], es [B H, MS, C], e2 [B H, M, C]. updated: this call has written the memory before, and
    in_force is true."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    MF: tl.constexpr = shape.MF
    MS: tl.constexpr = shape.MS
    h = g % H
    c = c0 + tl.arange(0, CT)
    f = tl.arange(0, D)
    if m < MF:
        k = _columns(pending.k, start, h, c0, H, D, CT)
        v = _columns(pending.v, start, h, c0, H, D, CT)
        # M is needed at v only for own values, at k only for the l2 objective; if at both, as columns k0 v0
        # k1 v1 ... of one product
        if rule.OWN_VALUES and not rule.DOT:
            x = tl.reshape(tl.join(k, v), [D, 2 * CT])
        else:
            x = v if rule.OWN_VALUES else k
        out = x.to(tl.float32)
        if rule.OWN_VALUES or not rule.DOT:
            out = evaluate_in_force(
                x, weights, in_force, updated, g, h, m, shape=shape, rule=rule, no_base=no_base, NT=NT,
                EARLY=True,
            )
        if rule.OWN_VALUES and not rule.DOT:
            at_k, target = tl.split(tl.reshape(out, [D, CT, 2]))
        elif rule.OWN_VALUES:
            at_k, target = k.to(tl.float32), out
        else:
            at_k, target = out, v.to(tl.float32)
        if rule.TARGET_NORM:
            target = unit_columns(target)
        if rule.DOT:
            e = -target
        else:
            e = grad_scale * (at_k - target)
        e_at = scratch.e + (g * MF + m) * D * C + f[:, None] * C + c[None, :]
        tl.store(e_at, e.to(scratch.e.dtype.element_ty))
        tl.store(scratch.e2 + (g * (MF + MS) + m) * C + c, tl.sum(e * e, 0))
    elif MS > 0:
        s = m - MF
        # own names: a branch of the kernel may not leave x with another shape
        x_s = _columns(pending.v, start, h, c0, H, D, CT)
        if not rule.DOT:
            x_s = tl.reshape(tl.join(_columns(pending.k, start, h, c0, H, D, CT), x_s), [D, 2 * CT])
        out_s = evaluate_scalar_in_force(
            x_s, weights, in_force, updated, g, h, m, shape=shape, rule=rule, no_base=no_base, NT=NT
        )
        if rule.DOT:
            target_s = out_s
        else:
            at_k_s, target_s = tl.split(tl.reshape(out_s, [CT, 2]))
        if rule.TARGET_NORM:
            target_s = tl.minimum(tl.maximum(target_s, -1.0), 1.0)
        es = -target_s
        if not rule.DOT:
            es = grad_scale * (at_k_s - target_s)
        tl.store(scratch.es + (g * MS + s) * C + c, es)
        tl.store(scratch.e2 + (g * (MF + MS) + m) * C + c, es * es)


@triton.jit
def hidden_task(
    weights, in_force, updated, pending, scratch, g, m, tile, start, shape: tl.constexpr, rule: tl.constexpr,
    C: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr,
):
    """a, d [B H, M, N, C]; norms [B H, M, N / NT, 2, C]."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    N: tl.constexpr = shape.N
    MF: tl.constexpr = shape.MF
    MS: tl.constexpr = shape.MS
    R: tl.constexpr = shape.R
    h = g % H
    f = tl.arange(0, D)
    n = tile * NT + tl.arange(0, NT)
    off2 = n[:, None] * D + f[None, :]
    at2, base2 = (g * R + m * N) * D + off2, (h * R + m * N) * D + off2
    w2 = rounded_w2(weights, in_force, updated, at2, base2, rule)
    gm = g * (MF + MS) + m
    for c0 in range(0, C, CT):
        c = c0 + tl.arange(0, CT)
        k = _columns(pending.k, start, h, c0, H, D, CT)
        a, slope = sigma_and_slope(tl.dot(w2, k, input_precision="ieee"), rule.ACT)
        if m < MF:
            off1 = f[None, :] * N + n[:, None]
            at1, base1 = (g * MF + m) * D * N + off1, (h * MF + m) * D * N + off1
            w1 = rounded_w1(weights, in_force, updated, at1, base1, rule)
            e = tl.load(scratch.e + (g * MF + m) * D * C + f[:, None] * C + c[None, :])
            d = slope * tl.dot(w1, e, input_precision="ieee")
        else:
            s = m - MF
            w1s = load_w1s(weights, (g * MS + s) * N + n, (h * MS + s) * N + n, rule)
            d = slope * (w1s[:, None] * tl.load(scratch.es + (g * MS + s) * C + c)[None, :])
        to = (gm * N + n[:, None]) * C + c[None, :]
        tl.store(scratch.a + to, a.to(scratch.a.dtype.element_ty))
        tl.store(scratch.d + to, d.to(scratch.d.dtype.element_ty))
        if rule.CLIP:
            part = scratch.norms + (gm * (N // NT) + tile) * 2 * C + c
            tl.store(part, tl.sum(a * a, 0))
            tl.store(part + C, tl.sum(d * d, 0))


@triton.jit
def _keep(to_p, new, base_p, rule: tl.constexpr):
    """Weights in force after an update to ``new``, for the later tasks of the call."""
    if rule.HAS_BASE:
        new += tl.load(base_p).to(tl.float32)
    tl.store(to_p, new.to(to_p.dtype.element_ty))


@triton.jit
def update_task(
    weights, in_force, more, momentum, pending, scratch, g, m, tile, start, shape: tl.constexpr,
    rule: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, NT: tl.constexpr,
):
    """delta2, delta1, delta1s (and s2, s1, s1s) in place, NT hidden units; gain [B H, M, C]. more: the call goes
    on to read what is written here, and finds it in_force.

    rounded_keys and vectors of the scratch: ``clock_body``'s, or ``momentum_body``'s, and then gradients move
    by rounded_keys[1] and what is erased, of delta2 and s2, by rounded_keys[0].
    """
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    N: tl.constexpr = shape.N
    MF: tl.constexpr = shape.MF
    MS: tl.constexpr = shape.MS
    R: tl.constexpr = shape.R
    VECTORS: tl.constexpr = 7 if rule.MOMENTUM else 3
    KEYS: tl.constexpr = 2 if rule.MOMENTUM else 1
    h = g % H
    gm = g * (MF + MS) + m
    f = tl.arange(0, D)
    n = tile * NT + tl.arange(0, NT)
    dtype = pending.k.dtype.element_ty
    vectors_p = scratch.vectors + g * VECTORS * C
    moving_p = scratch.rounded_keys + (g * KEYS + KEYS - 1) * C * D
    d_at = scratch.d + (gm * N + n[:, None]) * C
    decay_chunk = tl.load(vectors_p + 2 * C)
    if rule.MOMENTUM:
        c_chunk, beta_chunk = tl.load(vectors_p + 2 * C + 1), tl.load(vectors_p + 2 * C + 2)

    w2_off = (g * R + m * N) * D + n[:, None] * D + f[None, :]
    w2_base = (h * R + m * N) * D + n[:, None] * D + f[None, :]
    w2_at = weights.delta2 + w2_off
    delta2 = tl.load(w2_at)
    old = delta2.to(dtype)
    moved = tl.zeros([NT, D], tl.float32)
    if erases_at_once(shape, rule, C):
        erased_keys = tl.load(scratch.erased_keys + (g * D + f[:, None]) * D + f[None, :])
        moved = tl.dot(old, erased_keys, moved, input_precision="ieee")
    if rule.MOMENTUM and rule.DGD:
        old_s = tl.load(momentum.s2 + w2_off).to(dtype)
        for c0 in range(0, C, CT):
            c = c0 + tl.arange(0, CT)
            k = _columns(pending.k, start, h, c0, H, D, CT)
            erased = tl.load(vectors_p + c)[None, :] * tl.dot(old, k, input_precision="ieee")
            erased -= tl.load(vectors_p + 3 * C + c)[None, :] * tl.dot(old_s, k, input_precision="ieee")
            keys = tl.load(scratch.rounded_keys + (g * KEYS * C + c)[:, None] * D + f[None, :])
            moved = tl.dot(erased.to(dtype), keys, moved, input_precision="ieee")
    for c0 in range(0, C, CT):
        c = c0 + tl.arange(0, CT)
        gain = tl.load(scratch.gain + gm * C + c)
        u = gain[None, :] * tl.load(d_at + c[None, :]).to(tl.float32)
        if rule.DGD and not rule.MOMENTUM and not erases_at_once(shape, rule, C):
            erase = tl.load(vectors_p + c)
            k = _columns(pending.k, start, h, c0, H, D, CT)
            u += erase[None, :] * tl.dot(old, k, input_precision="ieee")
        keys = tl.load(moving_p + c[:, None] * D + f[None, :])
        moved = tl.dot(u.to(dtype), keys, moved, input_precision="ieee")
    if rule.MOMENTUM:
        s2 = tl.load(momentum.s2 + w2_off)
        new2 = decay_chunk * delta2 - c_chunk * s2 - moved
        tl.store(w2_at, new2)
        if more:
            _keep(in_force.delta2 + w2_off, new2, weights.base2 + w2_base, rule)
        s2 = beta_chunk * s2
        for c0 in range(0, C, CT):
            c = c0 + tl.arange(0, CT)
            gain = tl.load(scratch.gain + gm * C + c)
            gain *= tl.load(vectors_p + 4 * C + c)
            u = gain[None, :] * tl.load(d_at + c[None, :]).to(tl.float32)
            k = _columns(pending.k, start, h, c0, H, D, CT)
            s2 = tl.dot(u.to(dtype), tl.trans(k), s2, input_precision="ieee")
        tl.store(momentum.s2 + w2_off, s2)
    else:
        new2 = decay_chunk * delta2 - moved
        tl.store(w2_at, new2)
        if more:
            _keep(in_force.delta2 + w2_off, new2, weights.base2 + w2_base, rule)

    if m < MF:
        w1_off = (g * MF + m) * D * N + f[:, None] * N + n[None, :]
        w1_at = weights.delta1 + w1_off
        delta1 = decay_chunk * tl.load(w1_at)
        if rule.MOMENTUM:
            s1 = tl.load(momentum.s1 + w1_off)
            delta1 -= c_chunk * s1
            s1 = beta_chunk * s1
        for c0 in range(0, C, CT):
            c = c0 + tl.arange(0, CT)
            gain_after = tl.load(scratch.gain + gm * C + c)
            if rule.MOMENTUM:
                gain_s = gain_after * tl.load(vectors_p + 4 * C + c)
            gain_after *= tl.load(vectors_p + C + c)
            e = tl.load(scratch.e + (g * MF + m) * D * C + f[:, None] * C + c[None, :]).to(tl.float32)
            a = tl.load(scratch.a + (gm * N + n[None, :]) * C + c[:, None])
            delta1 = tl.dot((-gain_after[None, :] * e).to(dtype), a, delta1, input_precision="ieee")
            if rule.MOMENTUM:
                s1 = tl.dot((gain_s[None, :] * e).to(dtype), a, s1, input_precision="ieee")
        tl.store(w1_at, delta1)
        if rule.MOMENTUM:
            tl.store(momentum.s1 + w1_off, s1)
        if more:
            w1_base = (h * MF + m) * D * N + f[:, None] * N + n[None, :]
            _keep(in_force.delta1 + w1_off, delta1, weights.base1 + w1_base, rule)
    elif MS > 0:
        s = m - MF
        w1s_at = weights.delta1s + (g * MS + s) * N + n
        delta1s = decay_chunk * tl.load(w1s_at)
        skip_off = (g * R + (MF + MS) * N + s) * D + f
        skip_at = weights.delta2 + skip_off
        skip = tl.zeros([D], tl.float32)
        if rule.SKIP:
            skip = tl.load(skip_at, mask=tile == 0, other=0.0)
        kept = decay_chunk * skip
        if rule.MOMENTUM:
            s1s = tl.load(momentum.s1s + (g * MS + s) * N + n)
            delta1s -= c_chunk * s1s
            s1s *= beta_chunk
            skip_s = tl.zeros([D], tl.float32)
            if rule.SKIP:
                skip_s = tl.load(momentum.s2 + skip_off, mask=tile == 0, other=0.0)
            kept -= c_chunk * skip_s
            kept_s = beta_chunk * skip_s
        for c0 in range(0, C, CT):
            c = c0 + tl.arange(0, CT)
            gain = tl.load(scratch.gain + gm * C + c)
            es = tl.load(scratch.es + (g * MS + s) * C + c)
            e_after = gain * tl.load(vectors_p + C + c) * es
            a = tl.load(scratch.a + (gm * N + n[:, None]) * C + c[None, :]).to(tl.float32)
            delta1s -= tl.sum(a * e_after[None, :], 1)
            if rule.MOMENTUM:
                e_s = gain * tl.load(vectors_p + 4 * C + c) * es
                s1s += tl.sum(a * e_s[None, :], 1)
            if rule.SKIP:
                skip_u = gain * es
                if rule.DGD or rule.MOMENTUM:
                    k = _columns(pending.k, start, h, c0, H, D, CT).to(tl.float32)
                if rule.DGD:
                    erased = tl.load(vectors_p + c) * tl.sum(skip.to(dtype).to(tl.float32)[:, None] * k, 0)
                    if rule.MOMENTUM:
                        erased -= tl.load(vectors_p + 3 * C + c) * tl.sum(
                            skip_s.to(dtype).to(tl.float32)[:, None] * k, 0
                        )
                        keys = tl.load(scratch.rounded_keys + (g * KEYS * C + c)[:, None] * D + f[None, :])
                        keys = keys.to(tl.float32)
                        kept -= tl.sum(erased.to(dtype).to(tl.float32)[:, None] * keys, 0)
                    else:
                        skip_u += erased
                keys = tl.load(moving_p + c[:, None] * D + f[None, :]).to(tl.float32)
                kept -= tl.sum(skip_u.to(dtype).to(tl.float32)[:, None] * keys, 0)
                if rule.MOMENTUM:
                    kept_s += tl.sum(e_s.to(dtype).to(tl.float32)[None, :] * k, 1)
        tl.store(w1s_at, delta1s)
        if rule.SKIP:
            tl.store(skip_at, kept, mask=tile == 0)
        if more:
            w1s_off = (g * MS + s) * N + n
            _keep(in_force.delta1s + w1s_off, delta1s, weights.base1s + (h * MS + s) * N + n, rule)
            if rule.SKIP:
                if tile == 0:
                    skip_base = (h * R + (MF + MS) * N + s) * D + f
                    _keep(in_force.delta2 + skip_off, kept, weights.base2 + skip_base, rule)
        if rule.MOMENTUM:
            tl.store(momentum.s1s + (g * MS + s) * N + n, s1s)
            if rule.SKIP:
                tl.store(momentum.s2 + skip_off, kept_s, mask=tile == 0)
