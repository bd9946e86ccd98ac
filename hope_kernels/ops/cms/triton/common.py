"""What the CMS's Triton kernels share: a tile's place in a launch, the product along K, one row's matrix, and
its pending part.

    out[q, n] = sum_k x[q, k] w[k, n]        w_b = base_b + scale left_b^T right_b

Tokens lie on the rows of a tile, BM at a time. A launch walks ``groups`` of S tokens: one group of all B T
tokens where the rows share their base (a tile may hold tokens of several rows, and the base is read once for
all), else one group of T tokens per row of the batch.

A token's bits. The tile comes from the widths and the dtype, K is walked in one order from 0, no program adds
to another's sum. So an output depends on its own token and on the matrices of its row, never on T, B, the
other tokens of its tile or whether the row owns its base. The pending part is summed on its own and chosen
row by row: a NaN in one row's left or right reaches no other row, and unused slots (zeros) add zeros.
"""

from collections import namedtuple

import triton
import triton.language as tl

# Pointers of one matrix [r, c] in a launch: its shared base, the rows' own [B, r, c], which rows have one (owns [B]
# int32), the bias of its output, and of the pending part the inner product u and the outer factor, as
# ``add_pending`` takes them. What a launch does not have is a stand-in of the same type.
Operand = namedtuple("Operand", "base own owns bias u factor")


@triton.jit
def tile_of(i, tiles_m, TILES_N: tl.constexpr, GROUP: tl.constexpr):
    """Program i -> (tile of rows, tile of columns), GROUP tiles of rows beside each other first: programs
    that run at one time then share both operands through L2. In int64 where tiles_m is: as int32 the up
    product takes 144 registers on sm_90, not 106."""
    first = (i // (GROUP * TILES_N)) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (i % (GROUP * TILES_N)) % size, (i % (GROUP * TILES_N)) // size


@triton.jit
def tokens_of(m, S, BM: tl.constexpr):
    """(group, tokens of row tile m counted over all groups, which of them exist); the last tile of a group is
    not full."""
    tiles = tl.cdiv(S, BM)
    g, t = m // tiles, (m % tiles) * BM + tl.arange(0, BM)
    return g, g * S + t, t < S


@triton.jit
def matrix_of(operand, g, SIZE: tl.constexpr, OWN: tl.constexpr):
    """The base of group g: its own [SIZE] where owns [B] says so."""
    if OWN:
        return tl.where(tl.load(operand.owns + g) != 0, operand.own + g.to(tl.int64) * SIZE, operand.base)
    return operand.base


@triton.jit
def add_product(
    acc, x_p, q, inside, w_p, n, N, K: tl.constexpr, W_K: tl.constexpr, W_N: tl.constexpr, BK: tl.constexpr
):
    """acc + x w: x [tokens, K] at its rows q where ``inside``; w [K, N] at its columns n, element (k, n) at k
    W_K + n W_N."""
    k = tl.arange(0, BK)
    x_p += q[:, None] * K + k[None, :]
    w_p += k[:, None] * W_K + n[None, :] * W_N
    for k0 in range(0, K, BK):
        x = tl.load(x_p + k0, mask=inside[:, None] & (k0 + k < K)[None, :], other=0.0)
        w = tl.load(w_p + k0 * W_K, mask=(k0 + k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def add_pending(
    acc, operand, q, inside, T, R, slots, n, scale, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr
):
    """acc + scale u_b factor_b, row by row of the batch: u [B T, R up to a multiple of BR] at its rows q
    (ascending), zero past R; the first R of factor [B, slots, N] at its columns n."""
    row, s = q // T, tl.arange(0, BR)
    blocks = tl.cdiv(R, BR)  # not known to the compiler: it would unroll the loop, and spill
    for b in range(tl.min(row, 0), tl.max(tl.where(inside, row, 0), 0) + 1):
        mine = (inside & (row == b))[:, None]
        part = tl.zeros([BM, BN], tl.float32)
        for i in tl.range(0, blocks, num_stages=1):
            r = i * BR + s
            u = tl.load(operand.u + q[:, None] * (blocks * BR) + r[None, :], mask=mine, other=0.0)
            at, there = (b * slots + r)[:, None] * N + n[None, :], (r < R)[:, None] & (n < N)[None, :]
            part = tl.dot(u, tl.load(operand.factor + at, mask=there, other=0.0), part, input_precision="ieee")
        acc = tl.where(mine, acc + scale * part, acc)
    return acc
