"""What the kernels of the backward share: slots of a span, and sigma with two derivatives.

A span's tokens lie in slots [B, S, H, ...] counted from the start of each row's open chunk of the slower
clock; row b reads slots lo[b] .. hi[b] in the span, and the slots before lo[b] hold what was pending. S is a
run-time number: it depends on the call, and no reduction does. BACKWARD.md has the equations.
"""

import triton
import triton.language as tl

from .common import GELU, GELU_TANH, sigmoid


@triton.jit
def commits_here(lo_p, hi_p, b, end):
    """Whether row b reads slot ``end - 1`` of the span."""
    return (tl.load(lo_p + b) < end) & (end <= tl.load(hi_p + b))


@triton.jit
def columns(p, b, h, slot, S, H: tl.constexpr, D: tl.constexpr):
    """[D, CT]: the tokens in slots ``slot`` [CT], as columns."""
    return tl.load(p + ((b * S + slot) * H + h)[None, :] * D + tl.arange(0, D)[:, None])


@triton.jit
def sigma_two(z, ACT: tl.constexpr):
    """sigma(z), sigma'(z), sigma''(z)."""
    if ACT == GELU:
        gate = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        bell = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return z * gate, gate + z * bell, bell * (2.0 - z * z)
    if ACT == GELU_TANH:
        gate = sigmoid(z * (1.5957691216057308 + 0.07135481627362848 * z * z))
        inner = 1.5957691216057308 + 0.21406444882088544 * z * z
        bend = 0.4281288976417709 * z
    else:
        gate = sigmoid(z)
        inner = 1.0
        bend = 0.0
    between = gate * (1.0 - gate)
    # where the gate is 0 or 1 to rounding the products must be 0, not 0 * inf
    open_ = (gate > 0.0) & (gate < 1.0)
    slope = gate + tl.where(open_, z * between * inner, 0.0)
    curve = tl.where(open_, between * (2.0 * inner + z * ((1.0 - 2.0 * gate) * inner * inner + bend)), 0.0)
    return z * gate, slope, curve
