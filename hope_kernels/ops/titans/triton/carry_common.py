"""What the members of carry.py share: their counters, and two tiles of tokens side by side."""

import triton
import triton.language as tl

READS, CLOCK = tl.constexpr(0), tl.constexpr(1)  # counters of a (row, head)
MEMBERS = tl.constexpr(4)


@triton.jit
def later(g, chunk):
    """g, but no compiler can know: addresses made of it are made anew in every round of a loop, and do not
    fill the registers that they would take from before the loop on."""
    return g + (chunk >> 30)


@triton.jit
def halves(x, C: tl.constexpr):
    """Columns 0 .. C and C .. 2 C of x."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, C]), 0, 2, 1))


@triton.jit
def beside(x, y, C: tl.constexpr):
    """The reverse of ``halves``."""
    return tl.reshape(tl.permute(tl.join(x, y), 0, 2, 1), [x.shape[0], 2 * C])


@triton.jit
def above(x, y):
    """x [N, C] on top of y: [2 N, C]."""
    return tl.reshape(tl.permute(tl.join(x, y), 2, 0, 1), [2 * x.shape[0], x.shape[1]])


@triton.jit
def upper_lower(x):
    """The reverse of ``above``."""
    return tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), 1, 2, 0))


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


# Sums of several tensors at once take the barriers of one.
@triton.jit
def sums2(a, b, axis: tl.constexpr):
    return tl.reduce((a, b), axis, _add2)


@triton.jit
def sums3(a, b, c, axis: tl.constexpr):
    return tl.reduce((a, b, c), axis, _add3)
