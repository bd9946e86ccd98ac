"""What the memory's Triton kernels share: activations, weights as base + deviation, and which slots of a row
a step concerns.

Tokens are columns: activations are [features, tokens], weights stand on the left, so that a chunk of 16
tokens is the n side of a product and no tile is padded. A row's slots count from the start of its open chunk
of the longer clock; a tile's columns are fixed slots, masked by what the row reads in this call. So a
number's way through a reduction depends on its slot and on shapes of the model, never on how the sequence was
cut, on other rows, or on whether a state was given.
"""

import triton
import triton.language as tl

GELU_TANH, GELU, SILU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sigma(z, ACT: tl.constexpr):
    if ACT == GELU:
        return z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    if ACT == GELU_TANH:
        return z * sigmoid(z * (1.5957691216057308 + 0.07135481627362848 * z * z))
    return z * sigmoid(z)


@triton.jit
def sigma_and_slope(z, ACT: tl.constexpr):
    """sigma(z) and sigma'(z) from one transcendental (two for the exact gelu)."""
    if ACT == GELU:
        gate = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        return z * gate, gate + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    if ACT == GELU_TANH:
        gate = sigmoid(z * (1.5957691216057308 + 0.07135481627362848 * z * z))
        inner = 1.5957691216057308 + 0.21406444882088544 * z * z
    else:
        gate = sigmoid(z)
        inner = 1.0
    # where the gate is 1 to rounding the product must be 0, not 0 * inf
    return z * gate, gate + tl.where(gate < 1.0, z * gate * (1.0 - gate) * inner, 0.0)


@triton.jit
def log1p_exp(x):
    """softplus; log1p by Kahan's correction of log(1 + e)."""
    e = tl.exp(tl.minimum(x, 30.0))
    u = 1.0 + e
    small = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 30.0, x, small)


@triton.jit
def weight(delta_p, base_p, at, base_at, HAS_BASE: tl.constexpr):
    """w_base + delta at the given offsets, fp32."""
    w = tl.load(delta_p + at)
    if HAS_BASE:
        w += tl.load(base_p + base_at).to(tl.float32)
    return w


@triton.jit
def unit_columns(x):
    """Columns of x [D, C] divided by max(|x|, 1e-6)."""
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-6)[None, :]
