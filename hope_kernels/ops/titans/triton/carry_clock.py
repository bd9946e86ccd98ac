"""The clock (clock.py) of a chunk that is one block of 16 tokens, for carry.py: the same terms, with keys
loaded once and products by tensor cores.

A number of fp32 is the sum of a number of 8 or 11 bits and of a rest as short, up to 2^-16 of itself.
Products of such sums, of which that of both rests is left out, are exact to about 1e-5, and what comes of
them, Kg, is then rounded to 2^-9 or 2^-12.
"""

import triton
import triton.language as tl

from .clock import BK


@triton.jit
def _parts(x, dtype: tl.constexpr):
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def _product(x, y, dtype: tl.constexpr):
    """x y of fp32."""
    x_high, x_low = _parts(x, dtype)
    y_high, y_low = _parts(y, dtype)
    low = tl.dot(x_low, y_high, tl.dot(x_high, y_low, input_precision="ieee"), input_precision="ieee")
    return tl.dot(x_high, y_high, low, input_precision="ieee")


@triton.jit
def _inverse(strict, dtype: tl.constexpr):
    """(I + strict)^-1 of a strictly upper triangular block: exact merges of blocks of 1, 2, 4, 8."""
    row, col = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
    # of blocks of 1, whose inverse is 1
    off = ((row >> 1) == (col >> 1)) & (row % 2 == 0) & (col % 2 == 1)
    inverse = tl.where(row == col, 1.0, tl.where(off, -strict, 0.0))
    for level in tl.static_range(1, 4):
        off = (row >> (level + 1)) == (col >> (level + 1))
        off = off & ((row >> level) % 2 == 0) & ((col >> level) % 2 == 1)
        inverse -= _product(inverse, _product(tl.where(off, strict, 0.0), inverse, dtype), dtype)
    return inverse


@triton.jit
def clock_block(exchange, scratch, g, start, shape: tl.constexpr, rule: tl.constexpr):
    """Of (row, head) g, whose tokens begin at row ``start`` of the exchange: keys [16, D] (Kg, rounded as
    products take them), vectors [3, 16] (erase, decay_after, decay_chunk in its last place), and gram2 [16,
    16]."""
    D: tl.constexpr = shape.D
    i, f = tl.arange(0, BK), tl.arange(0, D)
    k = tl.load(exchange.k + (start + i)[:, None] * D + f[None, :])
    eta, alpha_p = tl.load(exchange.eta + start + i), exchange.alpha + start
    before = tl.cumprod(tl.load(alpha_p + i - 1, mask=i > 0, other=1.0), 0)
    after = tl.cumprod(tl.load(alpha_p + i + 1, mask=i < BK - 1, other=1.0), 0, reverse=True)
    vectors_p = scratch.vectors + g * 3 * BK
    tl.store(vectors_p + i, eta * before)
    tl.store(vectors_p + BK + i, after)
    tl.store(vectors_p + 2 * BK + i, before * tl.load(alpha_p + i), mask=i == BK - 1)
    s, t = i[:, None], i[None, :]
    inverse = tl.where(s == t, 1.0, 0.0)
    if rule.DGD or rule.CLIP:
        dots = tl.dot(k, tl.trans(k), input_precision="ieee")
        if rule.CLIP:
            tl.store(scratch.gram2 + (g * BK + s) * BK + t, dots * dots)
        if rule.DGD:
            # gamma[t-1, s]: along t the factor alpha_{t-1} wherever t - 1 > s
            alpha = tl.load(alpha_p + t - 1, mask=t > 0, other=1.0)
            decay = tl.cumprod(tl.where(t - 1 > s, alpha, 1.0), 1)
            inverse = _inverse(tl.where(t > s, dots * eta[None, :] * decay, 0.0), k.dtype)
    high, low = _parts(inverse * after[None, :], k.dtype)
    keys = tl.dot(high, k, tl.dot(low, k, input_precision="ieee"), input_precision="ieee")
    tl.store(scratch.keys + (g * BK + i)[:, None] * D + f[None, :], keys.to(k.dtype))
