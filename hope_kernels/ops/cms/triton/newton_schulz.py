"""The orthogonalised gradient of Muon, each matrix on its own: five steps of a quintic in fp32, symmetric
products by half.

    X = G / max(|G|_F, 1e-7), transposed if r > c        five times:  S = X X^T,  P = b S + c S^2,  X <- a X + P X

With R = min(r, c), L = max(r, c): S costs R^2 L FLOPs instead of 2 R^2 L, P costs R^3 instead of 2 R^3,
because only the tiles on and below the diagonal are computed; each is written twice, as it is and mirrored,
so S and P are exactly symmetric. The last product is whole, 2 R^2 L: a step is 3 R^2 L + R^3 FLOPs against 4
R^2 L + 2 R^3. Compute-bound: at R = 2048, L = 8192 a step is 112 GFLOP for 0.3 GB.

|G|_F^2 is summed in two stages in one order that depends on r and c alone, X is divided as it is copied, and
the last product writes X in the orientation of G. Every number is fp32 and every product takes the FMA units
("ieee"): the result is compared with a master, and what TF32 or bf16 would do to learning has not been tried.
Never timed.
"""

import triton
import triton.language as tl

from .common import tile_of

PARTS, LANES, NUM_WARPS = 4096, 256, 4  # elements a program of the first stage, lanes of the second, warps of both


@triton.jit
def squares_kernel(x_p, parts_p, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """x [matrices, SIZE] -> parts [matrices, SIZE / BLOCK]. Grid (SIZE / BLOCK, matrices)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_p + tl.program_id(1).to(tl.int64) * SIZE + at, mask=at < SIZE, other=0.0)
    tl.store(parts_p + tl.program_id(1) * tl.cdiv(SIZE, BLOCK) + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit
def start_kernel(
    g_p, parts_p, x_p, EPS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, G_R: tl.constexpr,
    G_L: tl.constexpr, COUNT: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """x [matrices, R, L] = g / max(|g|, EPS), element (i, j) of g at i G_R + j G_L. Grid (tiles, matrices)."""
    b, p = tl.program_id(1).to(tl.int64), tl.arange(0, BP)
    lanes = tl.zeros([BP], tl.float32)
    for first in range(0, COUNT, BP):
        lanes += tl.load(parts_p + b * COUNT + first + p, mask=first + p < COUNT, other=0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(lanes, 0)), EPS, propagate_nan=tl.PropagateNan.ALL)
    i = (tl.program_id(0) // tl.cdiv(L, BN)) * BM + tl.arange(0, BM)
    j = (tl.program_id(0) % tl.cdiv(L, BN)) * BN + tl.arange(0, BN)
    inside = (i < R)[:, None] & (j < L)[None, :]
    x = tl.load(g_p + b * R * L + i[:, None] * G_R + j[None, :] * G_L, mask=inside, other=0.0)
    tl.store(x_p + b * R * L + i[:, None] * L + j[None, :], x / norm, mask=inside)


@triton.jit
def symmetric_kernel(
    x_p, s_p, out_p, alpha, beta, R: tl.constexpr, L: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr
):
    """out = alpha x x^T [+ beta s]: x [matrices, R, L]; s, out [matrices, R, R], symmetric. Grid (tiles on
    and below the diagonal, matrices): tile i of them is (m, n <= m) with m (m + 1) / 2 + n = i."""
    i, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = ((tl.sqrt(8.0 * i + 1.0) - 1.0) * 0.5).to(tl.int32)
    m = tl.where(m * (m + 1) // 2 > i, m - 1, m)  # the root may be one rounding off
    m = tl.where((m + 1) * (m + 2) // 2 <= i, m + 1, m)
    r, c = m * BM + tl.arange(0, BM), (i - m * (m + 1) // 2) * BM + tl.arange(0, BM)
    x_p += b * R * L
    k = tl.arange(0, BK)
    acc = tl.zeros([BM, BM], tl.float32)
    for k0 in range(0, L, BK):
        left = tl.load(
            x_p + r[:, None] * L + (k0 + k)[None, :], mask=(r < R)[:, None] & (k0 + k < L)[None, :], other=0.0
        )
        right = tl.load(
            x_p + c[None, :] * L + (k0 + k)[:, None], mask=(c < R)[None, :] & (k0 + k < L)[:, None], other=0.0
        )
        acc = tl.dot(left, right, acc, input_precision="ieee")
    at, inside = b * R * R + r[:, None] * R + c[None, :], (r < R)[:, None] & (c < R)[None, :]
    acc *= alpha
    if ADD:
        acc += beta * tl.load(s_p + at, mask=inside, other=0.0)
    tl.store(out_p + at, acc, mask=inside)
    tl.store(
        out_p + b * R * R + r[:, None] + c[None, :] * R, acc, mask=inside & (r[:, None] // BM > c[None, :] // BM)
    )


@triton.jit
def step_kernel(
    p_p, x_p, out_p, alpha, R: tl.constexpr, L: tl.constexpr, O_R: tl.constexpr, O_L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):
    """out = alpha x + p x: p [matrices, R, R], x [matrices, R, L], element (i, j) of out at i O_R + j O_L.
    Grid (tiles, matrices)."""
    m, n = tile_of(tl.program_id(0), tl.cdiv(R, BM), tl.cdiv(L, BN), GROUP)
    b = tl.program_id(1).to(tl.int64)
    i, j, k = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN), tl.arange(0, BK)
    p_p += b * R * R
    x_p += b * R * L
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, R, BK):
        p = tl.load(
            p_p + i[:, None] * R + (k0 + k)[None, :], mask=(i < R)[:, None] & (k0 + k < R)[None, :], other=0.0
        )
        x = tl.load(
            x_p + (k0 + k)[:, None] * L + j[None, :], mask=(k0 + k < R)[:, None] & (j < L)[None, :], other=0.0
        )
        acc = tl.dot(p, x, acc, input_precision="ieee")
    inside = (i < R)[:, None] & (j < L)[None, :]
    acc += alpha * tl.load(x_p + i[:, None] * L + j[None, :], mask=inside, other=0.0)
    tl.store(out_p + b * R * L + i[:, None] * O_R + j[None, :] * O_L, acc, mask=inside)
