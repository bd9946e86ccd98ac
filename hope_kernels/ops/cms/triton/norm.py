"""The norm before a level's products, and its way back with the residual.

    RMS norm     n = r x gain                  r = 1 / sqrt(mean(x^2) + eps)
    layer norm   n = r c gain [+ bias]         c = x - mean(x),  r = 1 / sqrt(mean(c^2) + eps)

    with u = r x (layer norm: r c) and du = dn gain:    dx = [dy +] r (du - u mean(du u) [- mean(du)])

A program owns BR tokens and the whole width, zeros after it up to a power of two: every number is read once
and written once (2 d and 3 or 4 d elements a token), bandwidth-bound, and the order of a reduction depends on
d alone. fp32 inside, one rounding. Never timed.
"""

import triton
import triton.language as tl

TILE = 2048  # elements a program
MAX_WIDTH = 8192


@triton.jit
def unit(x, inside, EPS: tl.constexpr, D: tl.constexpr, LAYERNORM: tl.constexpr):
    """(u, r) of rows x, fp32, whose columns past D are zero."""
    if LAYERNORM:
        x = tl.where(inside, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
    return x * scale, scale


@triton.jit(do_not_specialize=["tokens"])
def norm_kernel(
    x_p, gain_p, bias_p, n_p, tokens: tl.int64, EPS: tl.constexpr, D: tl.constexpr, LAYERNORM: tl.constexpr,
    BIAS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):
    """x, n [tokens, D]; gain, bias [D]. Grid (tokens / BR)."""
    r, c = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BD)
    at, inside = r[:, None] * D + c[None, :], (r < tokens)[:, None] & (c < D)[None, :]
    n, _ = unit(tl.load(x_p + at, mask=inside, other=0.0).to(tl.float32), inside, EPS, D, LAYERNORM)
    n *= tl.load(gain_p + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        n += tl.load(bias_p + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    tl.store(n_p + at, n.to(n_p.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def norm_backward_kernel(
    dn_p, x_p, gain_p, dy_p, dx_p, tokens: tl.int64, EPS: tl.constexpr, D: tl.constexpr,
    LAYERNORM: tl.constexpr, RESIDUAL: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):
    """dn, x, dy, dx [tokens, D]; gain [D]. Grid (tokens / BR)."""
    r, c = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BD)
    at, inside = r[:, None] * D + c[None, :], (r < tokens)[:, None] & (c < D)[None, :]
    u, scale = unit(tl.load(x_p + at, mask=inside, other=0.0).to(tl.float32), inside, EPS, D, LAYERNORM)
    du = tl.load(
        dn_p + at, mask=inside, other=0.0
    ).to(tl.float32) * tl.load(gain_p + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    dx = du - u * (tl.sum(du * u, 1) / D)[:, None]
    if LAYERNORM:
        dx -= (tl.sum(du, 1) / D)[:, None]
    dx *= scale
    if RESIDUAL:
        dx += tl.load(dy_p + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_p + at, dx.to(dx_p.dtype.element_ty), mask=inside)


def norm_tile(D: int) -> dict[str, int]:
    width = triton.next_power_of_2(D)
    return {"BR": max(1, TILE // width), "BD": width}


def norm_options(D: int) -> dict[str, int]:
    """Half the warps and the way back through a layer norm spills; so it does if the assembler aims at fewer
    registers than it may have."""
    return {"num_warps": max(4, triton.next_power_of_2(D) // 512), "num_stages": 1, "maxnreg": 128}
