"""Mathematics that the Triton kernels of more than one op use: activations with their derivatives, gates, and
columns of unit length. fp32 throughout."""

import triton
import triton.language as tl

from .activations import ACTIVATION_CODES

GELU_TANH, GELU, SILU = (tl.constexpr(ACTIVATION_CODES[name]) for name in ("gelu_tanh", "gelu", "silu"))


# the interpreter knows no PTX
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)). Compiled, one instruction each for the power and the reciprocal. They take subnormal
    numbers for 0, which changes nothing in the sum 1 + power, and makes 0 of a result below 2^-126. Triton's own
    forms take seven instructions more."""
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    power = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
    )
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
    )


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
def sigma_two(z, ACT: tl.constexpr):
    """sigma(z), sigma'(z), sigma''(z); the sigmoid in Triton's own forms, with which its kernels keep their
    registers."""
    if ACT == GELU:
        gate = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        bell = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return z * gate, gate + z * bell, bell * (2.0 - z * z)
    if ACT == GELU_TANH:
        gate = 1.0 / (1.0 + tl.exp(-z * (1.5957691216057308 + 0.07135481627362848 * z * z)))
        inner = 1.5957691216057308 + 0.21406444882088544 * z * z
        bend = 0.4281288976417709 * z
    else:
        gate = 1.0 / (1.0 + tl.exp(-z))
        inner = 1.0
        bend = 0.0
    between = gate * (1.0 - gate)
    # where the gate is 0 or 1 to rounding the products must be 0, not 0 * inf
    open_ = (gate > 0.0) & (gate < 1.0)
    slope = gate + tl.where(open_, z * between * inner, 0.0)
    curve = tl.where(open_, between * (2.0 * inner + z * ((1.0 - 2.0 * gate) * inner * inner + bend)), 0.0)
    return z * gate, slope, curve


@triton.jit
def log1p_exp(x):
    """softplus; log1p by Kahan's correction of log(1 + e)."""
    e = tl.exp(tl.minimum(x, 30.0))
    u = 1.0 + e
    small = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 30.0, x, small)


@triton.jit
def unit_columns(x):
    """Columns of x [D, C] divided by max(|x|, 1e-6)."""
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-6)[None, :]
