"""A memory evaluated, and that backwards: y = x + w1 sigma(w2 x), or of a scalar memory w1s sigma(w2 x) (+
w_skip x); columns x [D, CT].

With y_bar the adjoint of y and a = sigma(z), z = w2 x:

    z_bar = sigma'(z) (w1^T y_bar)      w1 += y_bar a^T      w2 += z_bar x^T      x += y_bar + w2^T z_bar

Evaluation walks over N in tiles of NT; backwards a program owns one tile (its part of x's adjoint is one of N
/ NT to be summed).
"""

import triton
import triton.language as tl

from ...shared.triton_math import sigma, sigma_and_slope
from .common import weight


@triton.jit
def evaluate_scalar(
    x, delta2_p, base2_p, delta1s_p, base1s_p, g, h, m,
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, MF: tl.constexpr, MS: tl.constexpr, R: tl.constexpr,
    ACT: tl.constexpr, HAS_BASE: tl.constexpr, SKIP: tl.constexpr,
):
    """M(x) [CT] of scalar memory m for columns x [D, CT]."""
    d = tl.arange(0, D)
    s = m - MF
    y = tl.zeros([x.shape[1]], tl.float32)
    for n0 in range(0, N, NT):
        n = n0 + tl.arange(0, NT)
        off = (m * N + n[:, None]) * D + d[None, :]
        w2 = weight(delta2_p, base2_p, g * R * D + off, h * R * D + off, HAS_BASE).to(x.dtype)
        a = sigma(tl.dot(w2, x, input_precision="ieee"), ACT)
        y += tl.sum(
            weight(delta1s_p, base1s_p, (g * MS + s) * N + n, (h * MS + s) * N + n, HAS_BASE)[:, None] * a, 0
        )
    if SKIP:
        off = ((MF + MS) * N + s) * D + d
        skip = weight(delta2_p, base2_p, g * R * D + off, h * R * D + off, HAS_BASE).to(x.dtype)
        y += tl.sum(skip[:, None].to(tl.float32) * x.to(tl.float32), 0)
    return y


@triton.jit
def evaluate(
    x, delta2_p, base2_p, delta1_p, base1_p, g, h, m,
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, MF: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr,
    HAS_BASE: tl.constexpr,
):
    """M(x) [D, CT] of memory m < MF for columns x [D, CT]."""
    d = tl.arange(0, D)
    out = x.to(tl.float32)
    for n0 in range(0, N, NT):
        n = n0 + tl.arange(0, NT)
        off2, off1 = (m * N + n[:, None]) * D + d[None, :], m * D * N + d[:, None] * N + n[None, :]
        w2 = weight(delta2_p, base2_p, g * R * D + off2, h * R * D + off2, HAS_BASE).to(x.dtype)
        w1 = weight(delta1_p, base1_p, g * MF * D * N + off1, h * MF * D * N + off1, HAS_BASE).to(x.dtype)
        out = tl.dot(w1, sigma(tl.dot(w2, x, input_precision="ieee"), ACT).to(x.dtype), out, input_precision="ieee")
    return out


@triton.jit
def evaluate_adjoint(x, y_bar, w2, w1, acc2, acc1, tile, ACT: tl.constexpr):
    """(x_bar [D, CT], acc2 [NT, D], acc1 [D, NT]); y_bar [D, CT] fp32, w2 [NT, D] and w1 [D, NT] in the dtype
    of x."""
    a, slope = sigma_and_slope(tl.dot(w2, x, input_precision="ieee"), ACT)
    error = y_bar.to(x.dtype)
    z_bar = (slope * tl.dot(tl.trans(w1), error, input_precision="ieee")).to(x.dtype)
    acc1 = tl.dot(error, tl.trans(a.to(x.dtype)), acc1, input_precision="ieee")
    acc2 = tl.dot(z_bar, tl.trans(x), acc2, input_precision="ieee")
    return tl.dot(tl.trans(w2), z_bar, input_precision="ieee") + tl.where(tile == 0, y_bar, 0.0), acc2, acc1


@triton.jit
def evaluate_scalar_adjoint(
    x, y_bar, w2, w1s, skip, acc2, acc1s, skip_acc, tile, ACT: tl.constexpr, SKIP: tl.constexpr
):
    """(x_bar [D, CT], acc2 [NT, D], acc1s [NT], skip_acc [D]); y_bar [CT], w1s [NT], skip [D] fp32."""
    a, slope = sigma_and_slope(tl.dot(w2, x, input_precision="ieee"), ACT)
    z_bar = (slope * w1s[:, None] * y_bar[None, :]).to(x.dtype)
    acc1s += tl.sum(a * y_bar[None, :], 1)
    acc2 = tl.dot(z_bar, tl.trans(x), acc2, input_precision="ieee")
    x_bar = tl.dot(tl.trans(w2), z_bar, input_precision="ieee")
    if SKIP:
        x_bar += tl.where(tile == 0, skip[:, None] * y_bar[None, :], 0.0)
        skip_acc += tl.sum(x.to(tl.float32) * y_bar[None, :], 1)
    return x_bar, acc2, acc1s, skip_acc


@triton.jit
def add(p, at, x):
    tl.store(p + at, tl.load(p + at) + x)


@triton.jit
def add_where(p, at, x, condition):
    """``add`` if the scalar ``condition`` holds."""
    tl.store(p + at, tl.load(p + at, mask=condition, other=0.0) + x, mask=condition)
