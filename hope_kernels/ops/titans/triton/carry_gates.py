"""The two scalar memories, M_eta and M_alpha, carried through a call: a program of carry.py.

Their hidden units stand above one another, [2 N, ...], in products; sums are of both at once.
"""

import triton
import triton.language as tl

from ...shared.triton_math import log1p_exp, sigma, sigma_and_slope, sigmoid
from .carry_common import CLOCK, MEMBERS, READS, above, later, sums2, upper_lower
from .schedule import _done, _wait


@triton.jit
def _w2(delta2, weights, g, dtype: tl.constexpr, shape: tl.constexpr, rule: tl.constexpr):
    """w2 in force, rounded again for every use."""
    if rule.HAS_BASE:
        n, f = tl.arange(0, 2 * shape.N)[:, None], tl.arange(0, shape.D)[None, :]
        base_p = weights.base2 + (g % shape.H * shape.R + shape.MF * shape.N) * shape.D
        delta2 += tl.load(base_p + n * shape.D + f).to(tl.float32)
    return delta2.to(dtype)


@triton.jit
def _w1(delta1, weights, g, s: tl.constexpr, shape: tl.constexpr, rule: tl.constexpr):
    """w1s in force of scalar memory s, [N, 1]."""
    if rule.HAS_BASE:
        n = tl.arange(0, shape.N)
        delta1 += tl.load(weights.base1s + (g % shape.H * 2 + s) * shape.N + n).to(tl.float32)
    return delta1[:, None]


@triton.jit
def _gate(y, SOFTPLUS: tl.constexpr):
    return log1p_exp(y) if SOFTPLUS else sigmoid(y)


@triton.jit
def read_gates(
    reads, weights, biases, delta2, eta1, alpha1, g, first, phase, stop, T, eta_scale, to_eta, to_alpha,
    stride, C: tl.constexpr, shape: tl.constexpr, rule: tl.constexpr,
):
    """eta and alpha of the slots from ``first`` on; stride: heads a row of where they go."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    c, f, h = tl.arange(0, C), tl.arange(0, D), g % H
    slot = first + c
    live = (slot >= phase) & (slot < stop)
    at = (((g // H * T + slot - phase) * H + h) * D)[None, :] + f[:, None]
    x = tl.load(reads.x + at, mask=live[None, :], other=0.0)
    w2 = _w2(delta2, weights, g, x.dtype, shape, rule)
    z_eta, z_alpha = upper_lower(tl.dot(w2, x, input_precision="ieee"))
    y_eta = _w1(eta1, weights, g, 0, shape, rule) * sigma(z_eta, rule.ACT)
    y_alpha = _w1(alpha1, weights, g, 1, shape, rule) * sigma(z_alpha, rule.ACT)
    y_eta, y_alpha = sums2(y_eta, y_alpha, 0)
    eta = eta_scale * _gate(y_eta + tl.load(biases.eta + h).to(tl.float32), rule.SOFTPLUS)
    alpha = sigmoid(y_alpha + tl.load(biases.alpha + h).to(tl.float32))
    tl.store(to_eta + c * stride, eta, mask=live)
    tl.store(to_alpha + c * stride, alpha, mask=live)


@triton.jit
def _target(v, TARGET_NORM: tl.constexpr):
    return tl.minimum(tl.maximum(v, -1.0), 1.0) if TARGET_NORM else v


@triton.jit
def commit_gates(
    delta2, eta1, alpha1, weights, exchange, scratch, counters, g, start, chunk, grad_scale, C: tl.constexpr,
    shape: tl.constexpr, rule: tl.constexpr,
):
    """The deviations after the chunk whose tokens are in the exchange from row ``start`` on; m_t and the
    gain: gain.py."""
    D: tl.constexpr = shape.D
    c, f = tl.arange(0, C), tl.arange(0, D)
    v = tl.load(exchange.k + (start + C + c)[None, :] * D + f[:, None])
    w2 = _w2(delta2, weights, g, v.dtype, shape, rule)
    w_eta, w_alpha = _w1(eta1, weights, g, 0, shape, rule), _w1(alpha1, weights, g, 1, shape, rule)
    v_eta, v_alpha = upper_lower(tl.dot(w2, v, input_precision="ieee"))
    v_eta, v_alpha = sums2(w_eta * sigma(v_eta, rule.ACT), w_alpha * sigma(v_alpha, rule.ACT), 0)
    v_eta, v_alpha = _target(v_eta, rule.TARGET_NORM), _target(v_alpha, rule.TARGET_NORM)
    k = tl.load(exchange.k + (start + c)[None, :] * D + f[:, None])
    z_eta, z_alpha = upper_lower(tl.dot(w2, k, input_precision="ieee"))
    a_eta, d_eta = sigma_and_slope(z_eta, rule.ACT)
    a_alpha, d_alpha = sigma_and_slope(z_alpha, rule.ACT)
    d_eta, d_alpha = w_eta * d_eta, w_alpha * d_alpha
    e_eta, e_alpha = sums2(w_eta * a_eta, w_alpha * a_alpha, 0)
    if rule.DOT:
        e_eta, e_alpha = -v_eta, -v_alpha
    else:
        e_eta, e_alpha = grad_scale * (e_eta - v_eta), grad_scale * (e_alpha - v_alpha)
    d_eta, d_alpha = d_eta * e_eta[None, :], d_alpha * e_alpha[None, :]
    if rule.CLIP:
        # |d|^2 over |e|^2 before its sum
        q_eta, q_alpha = 1.0 / (e_eta * e_eta + 1e-9), 1.0 / (e_alpha * e_alpha + 1e-9)
        m_eta = a_eta * a_eta + d_eta * d_eta * q_eta[None, :]
        m_alpha = a_alpha * a_alpha + d_alpha * d_alpha * q_alpha[None, :]
        m_eta, m_alpha = sums2(m_eta, m_alpha, 0)
        m_eta, m_alpha = tl.sqrt(m_eta + 1e-12), tl.sqrt(m_alpha + 1e-12)
    if rule.DGD:
        old_eta, old_alpha = upper_lower(tl.dot(delta2.to(k.dtype), k, input_precision="ieee"))
    eta = tl.load(exchange.eta + start + c)
    _wait(counters + CLOCK, chunk + 1)
    vectors_p = scratch.vectors + g * 3 * C
    keys = tl.load(scratch.keys + (g * C + c)[:, None] * D + f[None, :])
    erase, after, decay = tl.load(vectors_p + c), tl.load(vectors_p + C + c), tl.load(vectors_p + 3 * C - 1)
    gain_eta, gain_alpha = eta, eta
    if rule.CLIP:
        gram2 = tl.load(scratch.gram2 + (g * C + c)[:, None] * C + c[None, :])
        s_eta, s_alpha = sums2((eta * m_eta)[:, None] * gram2, (eta * m_alpha)[:, None] * gram2, 0)
        gain_eta = eta / tl.maximum(1.0, grad_scale * m_eta * s_eta)
        gain_alpha = eta / tl.maximum(1.0, grad_scale * m_alpha * s_alpha)
    d_eta, d_alpha = gain_eta[None, :] * d_eta, gain_alpha[None, :] * d_alpha
    if rule.DGD:
        d_eta, d_alpha = d_eta + erase[None, :] * old_eta, d_alpha + erase[None, :] * old_alpha
    u = above(-d_eta, -d_alpha).to(keys.dtype)
    delta2 = tl.dot(u, keys, decay * delta2, input_precision="ieee")
    e_eta, e_alpha = gain_eta * after * e_eta, gain_alpha * after * e_alpha
    s_eta, s_alpha = sums2(a_eta * e_eta[None, :], a_alpha * e_alpha[None, :], 1)
    return delta2, decay * eta1 - s_eta, decay * alpha1 - s_alpha


@triton.jit
def gates_member(
    reads, weights, pending, exchange, biases, scratch, counters, group, phase, stop, T, eta_scale,
    grad_scale, C: tl.constexpr, shape: tl.constexpr, rule: tl.constexpr,
):
    """Of (row, head) ``group``, slots phase .. stop."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    N: tl.constexpr = shape.N
    c, f, n, r = tl.arange(0, C), tl.arange(0, D), tl.arange(0, N), tl.arange(0, 2 * N)
    w2_p, w1_p = weights.delta2 + (group * shape.R + shape.MF * N) * D, weights.delta1s + group * 2 * N
    if (phase > 0) & (stop >= C):
        kept, first = group // H * C * H + group % H + c * H, group * 4 * C + c
        tl.store(exchange.eta + first, tl.load(pending.eta + kept, mask=c < phase), mask=c < phase)
        tl.store(exchange.alpha + first, tl.load(pending.alpha + kept, mask=c < phase), mask=c < phase)
    delta2 = tl.load(w2_p + r[:, None] * D + f[None, :])
    eta1, alpha1 = tl.load(w1_p + n), tl.load(w1_p + N + n)
    chunk = 0
    while tl.condition(chunk * C < stop, disable_licm=True):
        g = later(group, chunk)
        start = (g * 4 + chunk % 2 * 2) * C  # row of the exchange, which is twice as long as is needed here
        committing = (chunk + 1) * C <= stop
        kept = g // H * C * H + g % H
        eta_p, alpha_p, stride = pending.eta + kept, pending.alpha + kept, H
        if committing:
            eta_p, alpha_p, stride = exchange.eta + start, exchange.alpha + start, 1
        read_gates(
            reads, weights, biases, delta2, eta1, alpha1, g, chunk * C, phase, stop, T, eta_scale, eta_p,
            alpha_p, stride, C, shape, rule,
        )
        if committing:
            _done(counters + READS)
            _wait(counters + READS, (chunk + 1) * (MEMBERS - 1))
            delta2, eta1, alpha1 = commit_gates(
                delta2, eta1, alpha1, weights, exchange, scratch, counters, g, start, chunk, grad_scale, C,
                shape, rule,
            )
        chunk += 1
    if stop >= C:
        g = later(group, chunk)
        w2_p, w1_p = weights.delta2 + (g * shape.R + shape.MF * N) * D, weights.delta1s + g * 2 * N
        tl.store(w2_p + r[:, None] * D + f[None, :], delta2)
        tl.store(w1_p + n, eta1)
        tl.store(w1_p + N + n, alpha1)
        kept = g // H * C * H + g % H + c * H
        zeros, free = tl.zeros([C], tl.float32), c >= stop % C
        tl.store(pending.eta + kept, zeros, mask=free)
        tl.store(pending.alpha + kept, zeros, mask=free)
