"""A level's products on the way up: the pending part's inner factor, the up product with its activation, the
down product.

    u_b = x right_b^T                                        [T, R], pending factors at the tokens, unscaled
    z = n w_up^T + bias      a = gelu(z)                     or, swiglu, g = n w_gate^T + bias, a = silu(g) z
    y = [x +] a w_down^T + bias

n is the normed input, written once by ``norm.py``: r_t of the RMS norm commutes with the product, but the
gain would have to be applied again in every tile of columns, and the gradient wants n anyway; writing and
reading it is 2 d of the 3 N + 5 d elements (swiglu: 4 N + 5 d) that a kept token moves. A program owns BM
tokens and BN columns: accumulators in registers (swiglu: two of half the width, so that n is loaded once for
both), operands through a pipeline of shared memory. The epilogue adds the biases in fp32 and rounds each
output once; z and g are written only if the gradient will want them.

Bytes: each operand tile is read once per program, from L2 if the programs that share it run together
(``tile_of``). FLOPs: 2 K per output. With 128 x 128 tiles a program does 64 FLOPs per byte from L2 (16-bit
types): tensor-bound from about 300 tokens a weight, below that the weights' bytes are the limit, 2 N d e for
a call that reads them once. Never timed.

Against the library's products. L2 holds 128 x 128 tiles to 45% of the GEMM rate on an H200 (5.5 TB/s, 790
TFLOP/s) and lets an A100 reach it (4.5 TB/s, 250 TFLOP/s); the 128 x 64 tiles of outputs up to 2048 wide to
30% and 77%. PyTorch's GEMM would be faster, and is not taken: cuBLAS chooses its kernel by the number of
tokens too, and a token's bits would follow from how many others are in the call. (An update's product has as
many tokens as its segment, always: ``library.py`` takes it.) Larger tiles: ``tiles.py``.
"""

import triton
import triton.language as tl

from ...shared.triton_math import GELU_TANH, sigma, sigmoid
from .common import add_pending, add_product, matrix_of, tile_of, tokens_of


@triton.jit(do_not_specialize=["T", "R", "slots"])
def inner_kernel(
    x_p, factor_p, u_p, T: tl.int64, R: tl.int64, slots: tl.int64, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):
    """x [B, T, K]; the first R of factor [B, slots, K]; u [B, T, R up to a multiple of BR]. Grid (rows *
    tiles of tokens, tiles of R)."""
    b, q, inside = tokens_of(tl.program_id(0), T, BM)
    r = tl.program_id(1) * BN + tl.arange(0, BN)
    u = add_product(tl.zeros([BM, BN], tl.float32), x_p, q, inside, factor_p + b * slots * K, r, R, K, 1, K, BK)
    width = tl.cdiv(R, BR) * BR  # zeros past R
    tl.store(
        u_p + q[:, None] * width + r[None, :], u.to(u_p.dtype.element_ty),
        mask=inside[:, None] & (r < width)[None, :]
    )


@triton.jit(do_not_specialize=["S", "T", "groups", "R", "slots"])
def up_kernel(
    n_p, up, gate, z_p, g_p, a_p, S: tl.int64, T: tl.int64, groups: tl.int64, R: tl.int64, slots: tl.int64,
    scale_up, scale_gate, D: tl.constexpr, N: tl.constexpr, PENDING: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, OWN: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):
    """n [groups S, D]; up, gate: operands [N, D], their factor left; z, g, a [groups S, N]. Grid (tiles)."""
    i_m, i_n = tile_of(tl.program_id(0), groups * tl.cdiv(S, BM), tl.cdiv(N, BN), GROUP)
    b, q, inside = tokens_of(i_m, S, BM)
    c = i_n * BN + tl.arange(0, BN)
    up_p = matrix_of(up, b, N * D, OWN)
    z = tl.zeros([BM, BN], tl.float32)
    if GATED:
        gate_p = matrix_of(gate, b, N * D, OWN)
        g = tl.zeros([BM, BN], tl.float32)
        k = tl.arange(0, BK)
        for k0 in range(0, D, BK):
            n = tl.load(
                n_p + q[:, None] * D + (k0 + k)[None, :], mask=inside[:, None] & (k0 + k < D)[None, :], other=0.0
            )
            at, there = (k0 + k)[:, None] + c[None, :] * D, (k0 + k < D)[:, None] & (c < N)[None, :]
            z = tl.dot(n, tl.load(up_p + at, mask=there, other=0.0), z, input_precision="ieee")
            g = tl.dot(n, tl.load(gate_p + at, mask=there, other=0.0), g, input_precision="ieee")
    else:
        z = add_product(z, n_p, q, inside, up_p, c, N, D, 1, D, BK)
    if PENDING:
        z = add_pending(z, up, q, inside, T, R, slots, c, scale_up, N, BM, BN, BR)
    if BIAS:
        z += tl.load(up.bias + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    at, there = q[:, None] * N + c[None, :], inside[:, None] & (c < N)[None, :]
    if GATED:
        if PENDING:
            g = add_pending(g, gate, q, inside, T, R, slots, c, scale_gate, N, BM, BN, BR)
        if BIAS:
            g += tl.load(gate.bias + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            tl.store(g_p + at, g.to(g_p.dtype.element_ty), mask=there)
        a = g * sigmoid(g) * z
    else:
        a = sigma(z, GELU_TANH)
    if KEEP:
        tl.store(z_p + at, z.to(z_p.dtype.element_ty), mask=there)
    tl.store(a_p + at, a.to(a_p.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["S", "T", "groups", "R", "slots"])
def down_kernel(
    a_p, down, x_p, y_p, S: tl.int64, T: tl.int64, groups: tl.int64, R: tl.int64, slots: tl.int64, scale,
    D: tl.constexpr, N: tl.constexpr, PENDING: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr,
    RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """a [groups S, N]; down: operand [D, N], its factor left; x, y [groups S, D]. Grid (tiles)."""
    i_m, i_n = tile_of(tl.program_id(0), groups * tl.cdiv(S, BM), tl.cdiv(D, BN), GROUP)
    b, q, inside = tokens_of(i_m, S, BM)
    c = i_n * BN + tl.arange(0, BN)
    down_p = matrix_of(down, b, D * N, OWN)
    y = add_product(tl.zeros([BM, BN], tl.float32), a_p, q, inside, down_p, c, D, N, 1, N, BK)
    if PENDING:
        y = add_pending(y, down, q, inside, T, R, slots, c, scale, D, BM, BN, BR)
    if BIAS:
        y += tl.load(down.bias + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    at, there = q[:, None] * D + c[None, :], inside[:, None] & (c < D)[None, :]
    if RESIDUAL:
        y += tl.load(x_p + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y_p + at, y.to(y_p.dtype.element_ty), mask=there)
