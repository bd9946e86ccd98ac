"""What the kernels of the backward share: slots of a span.

A span's tokens lie in slots [B, S, H, ...] counted from the start of each row's open chunk of the slower
clock; row b reads slots lo[b] .. hi[b] in the span, and the slots before lo[b] hold what was pending. S is a
run-time number: it depends on the call, and no reduction does. BACKWARD.md has the equations.
"""

import triton
import triton.language as tl


@triton.jit
def commits_here(place, b, end):
    """Whether row b reads slot ``end - 1`` of the span."""
    return (tl.load(place.lo + b) < end) & (end <= tl.load(place.hi + b))


@triton.jit
def columns(p, b, h, slot, S, H: tl.constexpr, D: tl.constexpr):
    """[D, CT]: the tokens in slots ``slot`` [CT], as columns."""
    return tl.load(p + ((b * S + slot) * H + h)[None, :] * D + tl.arange(0, D)[:, None])
