"""A memory evaluated, and that backwards: y = x + w1 sigma(w2 x), or of a scalar memory w1s sigma(w2 x) (+
w_skip x); columns x [D, CT].

With y_bar the adjoint of y and a = sigma(z), z = w2 x:

    z_bar = sigma'(z) (w1^T y_bar)    w1_bar += y_bar a^T    w2_bar += z_bar x^T    x_bar += y_bar + w2^T z_bar

Evaluation walks over N in tiles of NT; backwards a program owns one tile (its part of x's adjoint is one of N
/ NT to be summed).
"""

import triton
import triton.language as tl

from ...shared.triton_math import sigma, sigma_and_slope
from .common import load_w1, load_w1s, load_w2


@triton.jit
def evaluate(
    x, weights, g, h, m, shape: tl.constexpr, rule: tl.constexpr, NT: tl.constexpr, EARLY: tl.constexpr = False
):
    """M(x) [D, columns], fp32, of memory m < MF. EARLY: w1 is loaded before the activation. Loaded after it
    fewer registers are taken, but for the scan's errors (on sm_80) and the backward's kernels without a base
    (on sm_90 and sm_100)."""
    return add_output(x.to(tl.float32), x, weights, g, h, m, shape=shape, rule=rule, NT=NT, EARLY=EARLY)


@triton.jit
def add_output(
    out, x, weights, g, h, m, shape: tl.constexpr, rule: tl.constexpr, NT: tl.constexpr, EARLY: tl.constexpr
):
    """out [D, columns] + w1 sigma(w2 x)."""
    D: tl.constexpr = shape.D
    N: tl.constexpr = shape.N
    w2_at, w2_base = (g * shape.R + m * N) * D, (h * shape.R + m * N) * D
    w1_at, w1_base = (g * shape.MF + m) * D * N, (h * shape.MF + m) * D * N
    f = tl.arange(0, D)
    for n0 in range(0, N, NT):
        n = n0 + tl.arange(0, NT)
        off2, off1 = n[:, None] * D + f[None, :], f[:, None] * N + n[None, :]
        w2 = load_w2(weights, w2_at + off2, w2_base + off2, rule).to(x.dtype)
        if EARLY:
            w1 = load_w1(weights, w1_at + off1, w1_base + off1, rule).to(x.dtype)
        a = sigma(tl.dot(w2, x, input_precision="ieee"), rule.ACT).to(x.dtype)
        if not EARLY:
            w1 = load_w1(weights, w1_at + off1, w1_base + off1, rule).to(x.dtype)
        out = tl.dot(w1, a, out, input_precision="ieee")
    return out


@triton.jit
def evaluate_in_force(
    x, weights, in_force, updated, g, h, m, shape: tl.constexpr, rule: tl.constexpr, no_base: tl.constexpr,
    NT: tl.constexpr, EARLY: tl.constexpr = False
):
    """``evaluate``, with weights as an update of this call has left them, or else summed here."""
    out = x.to(tl.float32)
    if updated:
        out = add_output(out, x, in_force, g, h, m, shape=shape, rule=no_base, NT=NT, EARLY=EARLY)
    else:
        out = add_output(out, x, weights, g, h, m, shape=shape, rule=rule, NT=NT, EARLY=EARLY)
    return out


@triton.jit
def evaluate_scalar(x, weights, g, h, m, shape: tl.constexpr, rule: tl.constexpr, NT: tl.constexpr):
    """M(x) [columns], fp32, of scalar memory m >= MF."""
    D: tl.constexpr = shape.D
    N: tl.constexpr = shape.N
    MS: tl.constexpr = shape.MS
    SKIPS: tl.constexpr = (shape.MF + MS) * N  # skip rows follow the hidden rows of all memories
    s = m - shape.MF
    w2_at, w2_base = (g * shape.R + m * N) * D, (h * shape.R + m * N) * D
    w1_at, w1_base = (g * MS + s) * N, (h * MS + s) * N
    f = tl.arange(0, D)
    y = tl.zeros([x.shape[1]], tl.float32)
    for n0 in range(0, N, NT):
        n = n0 + tl.arange(0, NT)
        off = n[:, None] * D + f[None, :]
        w2 = load_w2(weights, w2_at + off, w2_base + off, rule).to(x.dtype)
        a = sigma(tl.dot(w2, x, input_precision="ieee"), rule.ACT)
        w1s = load_w1s(weights, w1_at + n, w1_base + n, rule)
        y += tl.sum(w1s[:, None] * a, 0)
    if rule.SKIP:
        skip_at, skip_base = (g * shape.R + SKIPS + s) * D, (h * shape.R + SKIPS + s) * D
        skip = load_w2(weights, skip_at + f, skip_base + f, rule).to(x.dtype)
        y += tl.sum(skip[:, None].to(tl.float32) * x.to(tl.float32), 0)
    return y


@triton.jit
def evaluate_scalar_in_force(
    x, weights, in_force, updated, g, h, m, shape: tl.constexpr, rule: tl.constexpr, no_base: tl.constexpr,
    NT: tl.constexpr
):
    """``evaluate_scalar``, as ``evaluate_in_force``."""
    if updated:
        y = evaluate_scalar(x, in_force, g, h, m, shape=shape, rule=no_base, NT=NT)
    else:
        y = evaluate_scalar(x, weights, g, h, m, shape=shape, rule=rule, NT=NT)
    return y


@triton.jit
def evaluate_adjoint(x, y_bar, w2, w1, w2_bar, w1_bar, tile, ACT: tl.constexpr):
    """(x_bar [D, CT], w2_bar [NT, D], w1_bar [D, NT]); y_bar [D, CT] fp32, w2 [NT, D] and w1 [D, NT] in the
    dtype of x."""
    a, slope = sigma_and_slope(tl.dot(w2, x, input_precision="ieee"), ACT)
    rounded = y_bar.to(x.dtype)
    z_bar = (slope * tl.dot(tl.trans(w1), rounded, input_precision="ieee")).to(x.dtype)
    w1_bar = tl.dot(rounded, tl.trans(a.to(x.dtype)), w1_bar, input_precision="ieee")
    w2_bar = tl.dot(z_bar, tl.trans(x), w2_bar, input_precision="ieee")
    x_bar = tl.dot(tl.trans(w2), z_bar, input_precision="ieee") + tl.where(tile == 0, y_bar, 0.0)
    return x_bar, w2_bar, w1_bar


@triton.jit
def evaluate_scalar_adjoint(
    x, y_bar, w2, w1s, skip, w2_bar, w1s_bar, skip_bar, tile, ACT: tl.constexpr, SKIP: tl.constexpr
):
    """(x_bar [D, CT], w2_bar [NT, D], w1s_bar [NT], skip_bar [D]); y_bar [CT], w1s [NT], skip [D] fp32."""
    a, slope = sigma_and_slope(tl.dot(w2, x, input_precision="ieee"), ACT)
    z_bar = (slope * w1s[:, None] * y_bar[None, :]).to(x.dtype)
    w1s_bar += tl.sum(a * y_bar[None, :], 1)
    w2_bar = tl.dot(z_bar, tl.trans(x), w2_bar, input_precision="ieee")
    x_bar = tl.dot(tl.trans(w2), z_bar, input_precision="ieee")
    if SKIP:
        x_bar += tl.where(tile == 0, skip[:, None] * y_bar[None, :], 0.0)
        skip_bar += tl.sum(x.to(tl.float32) * y_bar[None, :], 1)
    return x_bar, w2_bar, w1s_bar, skip_bar


@triton.jit
def add(p, at, x):
    """Several threads hold a number of a vector, all of them load it, and one stores the sum: not before all have
    loaded."""
    total = tl.load(p + at) + x
    if len(x.shape) == 1:
        tl.debug_barrier()
    tl.store(p + at, total)


@triton.jit
def add_where(p, at, x, condition):
    """``add`` of a vector, if the scalar ``condition`` holds."""
    total = tl.load(p + at, mask=condition, other=0.0) + x
    tl.debug_barrier()
    tl.store(p + at, total, mask=condition)
