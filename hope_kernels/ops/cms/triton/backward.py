"""A level's products on the way back: the error product with the activation's slope, and the product that
brings it to the normed input.

    h = dy w_down        d_up = gelu'(z) h                   or, swiglu, d_up = silu(g) h and d_gate = silu'(g) z h
    dn = d_up w_up [+ d_gate w_gate]                         its way through the norm to dx: ``norm.py``

Tiles, groups of tokens and pending parts as on the way up; the matrices are read in the other orientation,
columns contiguous, and of a pending part right takes left's place. h never exists in memory: it is the
accumulator of the tile whose z (and g) the epilogue loads. Per token: 4 N d FLOPs (swiglu: 6 N d); the first
product moves d + 2 N elements (swiglu: d + 4 N), the second N + d (2 N + d). Never timed.
"""

import triton
import triton.language as tl

from ...shared.triton_math import GELU_TANH, SILU, sigma_and_slope
from .common import add_pending, add_product, matrix_of, tile_of, tokens_of


@triton.jit(do_not_specialize=["S", "T", "groups", "R", "slots"])
def error_kernel(
    dy_p, down, z_p, g_p, d_up_p, d_gate_p, S: tl.int64, T: tl.int64, groups: tl.int64, R: tl.int64,
    slots: tl.int64, scale, D: tl.constexpr, N: tl.constexpr, PENDING: tl.constexpr, GATED: tl.constexpr,
    OWN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dy [groups S, D]; down: operand [D, N], u = dy left^T, its factor right; z, g, d_up, d_gate
    [groups S, N]. Grid (tiles)."""
    i_m, i_n = tile_of(tl.program_id(0), groups * tl.cdiv(S, BM), tl.cdiv(N, BN), GROUP)
    b, q, inside = tokens_of(i_m, S, BM)
    c = i_n * BN + tl.arange(0, BN)
    down_p = matrix_of(down, b, D * N, OWN)
    h = add_product(tl.zeros([BM, BN], tl.float32), dy_p, q, inside, down_p, c, N, D, N, 1, BK)
    if PENDING:
        h = add_pending(h, down, q, inside, T, R, slots, c, scale, N, BM, BN, BR)
    at, there = q[:, None] * N + c[None, :], inside[:, None] & (c < N)[None, :]
    z = tl.load(z_p + at, mask=there, other=0.0).to(tl.float32)
    if GATED:
        a, slope = sigma_and_slope(tl.load(g_p + at, mask=there, other=0.0).to(tl.float32), SILU)
        tl.store(d_gate_p + at, (slope * z * h).to(d_gate_p.dtype.element_ty), mask=there)
        d_up = a * h
    else:
        a, slope = sigma_and_slope(z, GELU_TANH)
        d_up = slope * h
    tl.store(d_up_p + at, d_up.to(d_up_p.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["S", "T", "groups", "R", "slots"])
def back_kernel(
    d_up_p, up, d_gate_p, gate, dn_p, S: tl.int64, T: tl.int64, groups: tl.int64, R: tl.int64,
    slots: tl.int64, scale_up, scale_gate, D: tl.constexpr, N: tl.constexpr, PENDING: tl.constexpr,
    GATED: tl.constexpr, OWN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, GROUP: tl.constexpr,
):
    """d_up, d_gate [groups S, N]; up, gate: operands [N, D], u = d left^T, their factor right; dn
    [groups S, D]. Grid (tiles)."""
    i_m, i_n = tile_of(tl.program_id(0), groups * tl.cdiv(S, BM), tl.cdiv(D, BN), GROUP)
    b, q, inside = tokens_of(i_m, S, BM)
    c = i_n * BN + tl.arange(0, BN)
    up_p = matrix_of(up, b, N * D, OWN)
    dn = add_product(tl.zeros([BM, BN], tl.float32), d_up_p, q, inside, up_p, c, D, N, D, 1, BK)
    if GATED:
        gate_p = matrix_of(gate, b, N * D, OWN)
        dn = add_product(dn, d_gate_p, q, inside, gate_p, c, D, N, D, 1, BK)
    if PENDING:
        dn = add_pending(dn, up, q, inside, T, R, slots, c, scale_up, D, BM, BN, BR)
        if GATED:
            dn = add_pending(dn, gate, q, inside, T, R, slots, c, scale_gate, D, BM, BN, BR)
    tl.store(
        dn_p + q[:, None] * D + c[None, :], dn.to(dn_p.dtype.element_ty), mask=inside[:, None] & (c < D)[None, :]
    )
