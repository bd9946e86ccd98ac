"""The update of a matrix by a segment's factors, in the epilogue of the product that would have been its
gradient.

    g_b = left_b^T right_b [+ total_b, which becomes 0]        f = g_b, or  m_b = mu m_b + g_b, f = m_b
    weight_b <- beta weight_b - lr f        copy_b = weight_b, rounded          for the rows b asked for

    adam: m_b = mu m_b + first g_b, v_b = beta2 v_b + second g_b^2, f = m_b / (root sqrt(v_b) + eps)
          first and second make the mean of the sum g_b, lr and root hold the corrections of the averages

A program owns a tile of BM outputs by BN inputs of one row's matrix and walks the C tokens in order, BK at a
time: the gradient is the accumulator in registers and never exists in memory, every master is read once and
written once by the program that owns it. left and right are read as they lie, [C, r] and [C, c]: the tile of
left stands transposed in shared memory (16-bit tensor cores take it so).

    gd              4 (read) + 4 (write) bytes a weight, + 2 for the 16-bit copy              8 or 10
    with momentum   + 8         with a total   + 8         adam   + 16

FLOPs: 2 C a weight: with 10 bytes a weight and the H100's 300 FLOPs a byte, memory is the limit below C =
1500 tokens. left and right come from L2, C (BM + BN) / (BM BN) numbers a weight (16-bit tile: 3 C / 64 bytes,
more than the 10 from C = 213 on), so L2's rate is the limit before the tensor cores' is: long segments are
left to ``library.py``. The order of a sum is that of the tokens: the same for any rows, and for masked tokens
past C.

Of a short segment the product is a few loads' latency, and so is the master: gd, which has registers for it,
has both under way at once (a warp's way by count, C = 64: -15% on sm_90, -10% on sm_80). Never timed.
"""

import triton
import triton.language as tl

from .common import tile_of


@triton.jit(do_not_specialize=["C"])
def refresh_kernel(
    weight_p, copy_p, moment_p, square_p, total_p, left_p, right_p, rows_p, late_p, C: tl.int64, lr, mu, beta,
    beta2, first, second, root,
    ROWS: tl.constexpr, COLS: tl.constexpr,
    PRODUCT: tl.constexpr, MOMENT: tl.constexpr, ADAM: tl.constexpr, TOTAL: tl.constexpr, COPY: tl.constexpr,
    CLEAR: tl.constexpr, READ: tl.constexpr, LATE: tl.constexpr, EPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):
    """weight, moment, square, total [B, ROWS, COLS] fp32, copy in another type; left [B, C, ROWS], right
    [B, C, COLS]; rows int32: the row of the batch that program (., i) works for. CLEAR: total becomes 0, else
    it stays as it is. READ: beta is not 0. LATE: of adam lr and root are what late [2] fp32 holds by then. Grid
    (tiles, rows)."""
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(ROWS, BM), tl.cdiv(COLS, BN), GROUP)
    b = tl.load(rows_p + tl.program_id(1)).to(tl.int64)
    i, j = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    at, inside = b * ROWS * COLS + i[:, None] * COLS + j[None, :], (i < ROWS)[:, None] & (j < COLS)[None, :]
    # with nothing else to hold, the master is under way while the product is made
    EARLY: tl.constexpr = PRODUCT and READ and not (MOMENT or TOTAL)
    if EARLY:
        old = tl.load(weight_p + at, mask=inside, other=0.0)
    f = tl.zeros([BM, BN], tl.float32)
    if PRODUCT:
        k = tl.arange(0, BK)
        left_p += b * C * ROWS + k[None, :] * ROWS + i[:, None]
        right_p += b * C * COLS + k[:, None] * COLS + j[None, :]
        for t in range(0, C, BK):
            left = tl.load(left_p + t * ROWS, mask=(i < ROWS)[:, None] & (t + k < C)[None, :], other=0.0)
            right = tl.load(right_p + t * COLS, mask=(t + k < C)[:, None] & (j < COLS)[None, :], other=0.0)
            f = tl.dot(left, right, f, input_precision="ieee")
    if TOTAL:
        f += tl.load(total_p + at, mask=inside, other=0.0)
    if ADAM:
        v = beta2 * tl.load(square_p + at, mask=inside, other=0.0) + second * (f * f)
        tl.store(square_p + at, v, mask=inside)
        f = mu * tl.load(moment_p + at, mask=inside, other=0.0) + first * f
        tl.store(moment_p + at, f, mask=inside)
        if LATE:
            lr = tl.load(late_p)
            root = tl.load(late_p + 1)
        f /= root * tl.sqrt(v) + EPS
    elif MOMENT:
        f += mu * tl.load(moment_p + at, mask=inside, other=0.0)
        tl.store(moment_p + at, f, mask=inside)
    w = -lr * f
    if READ:
        if EARLY:
            w += beta * old
        else:
            w += beta * tl.load(weight_p + at, mask=inside, other=0.0)
    tl.store(weight_p + at, w, mask=inside)
    if COPY:
        tl.store(copy_p + at, w.to(copy_p.dtype.element_ty), mask=inside)
    if CLEAR:
        # Loads and stores are laid out differently: another thread may still have to read what this one would
        # make zero. A new moment or weight waits for the old one it is computed from; a zero waits for
        # nothing.
        tl.debug_barrier()
        tl.store(total_p + at, tl.zeros([BM, BN], tl.float32), mask=inside)
