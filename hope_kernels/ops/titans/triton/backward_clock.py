"""What the memories of one clock share in a chunk, and its adjoint. One program a (row, head), tokens in
blocks of 16, fp32.

    P[t,s] = prod_{s<j<t} alpha_j = gamma[t-1,s] (s < t)      L[t,s] = eta_t P[t,s] k_t.k_s (s < t)
    decay_before_t = prod_{j<t} alpha_j    decay_after_t = prod_{j>t} alpha_j    decay_chunk = prod_j alpha_j
    (I + L)^T Kg = diag(decay_after) K

Adjoint, of Kg: Y = (I + L)^-1 Kg_bar by forward substitution, L_bar[t,s] = -Kg_t.Y_s, and decay_after_t
receives Y_t.k_t. From L_bar:

    eta_bar_t += sum_s L_bar[t,s] P[t,s] k_t.k_s            P_bar[t,s] = L_bar[t,s] eta_t k_t.k_s
    (k_t.k_s)_bar = L_bar[t,s] eta_t P[t,s]

An entry of P is a product of the alphas between its ends, so the adjoint of alpha_t sums, over every product
that contains it, the product without it: P[l,s] without alpha_t is P[t,s] P[l,t]. All of it is two products
of triangular matrices, and nothing is divided by alpha:

    alpha_bar_t = sum_{s<t} P[t,s] (sum_{l>t} P[l,t] P_bar[l,s] + decay_after_t decay_after_bar_s)
                  + decay_before_t (sum_{l>t} P[l,t] decay_before_bar_l + decay_after_t decay_chunk_bar)

The forward's clock.py has the same terms as products of blocks. Here the decays are one running product and
all of P is kept, since the adjoint reads it three times; the two share the inverse of a block.
"""

import triton
import triton.language as tl

from .backward_common import commits_here
from .clock import BK, unit_inverse
from .evaluate import add


@triton.jit
def _tile(p, row, col, C: tl.constexpr):
    """The 16 x 16 block (row, col) of a [C, C] matrix: addresses."""
    i = tl.arange(0, BK)
    return p + (i + row * BK)[:, None] * C + (i + col * BK)[None, :]


@triton.jit
def _token_rows(p, b, h, first, block, S, H: tl.constexpr, D: tl.constexpr):
    """Tokens of one block as rows [16, D]."""
    at = (b * S + first + (tl.arange(0, BK) + block * BK)) * H + h
    return tl.load(p + at[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def _coupling(products_p, gram_p, eta, row, col, C: tl.constexpr):
    """The block (row, col) of L; P is stored with zeros on and above its diagonal."""
    return eta[:, None] * tl.load(_tile(products_p, row, col, C)) * tl.load(_tile(gram_p, row, col, C))


@triton.jit(do_not_specialize=["end", "S"])
def clock_kernel(
    slots, place, terms, end: tl.int64, S: tl.int64, shape: tl.constexpr, rule: tl.constexpr, C: tl.constexpr,
):
    """terms of commits C slots apart, the first at ``end``, [commits, B H, ...]: products (P), gram (k_t.k_s)
    [C, C]; keys (Kg) [C, D]; vectors [3, C]: decay_before, decay_after, decay_chunk in its first place. Grid
    (B H, commits)."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    g = tl.program_id(0).to(tl.int64)
    b, h = g // H, g % H
    end += tl.program_id(1) * C
    if commits_here(place, b, end):
        g += tl.program_id(1) * tl.num_programs(0)
        first = end - C
        i = tl.arange(0, BK)
        f = tl.arange(0, D)
        BLOCKS: tl.constexpr = C // BK
        products_p = terms.products + g * C * C
        gram_p = terms.gram + g * C * C
        keys_p = terms.keys + g * C * D
        vectors_p = terms.vectors + g * 3 * C
        alpha_at = slots.alpha + (b * S + first) * H + h
        s = tl.arange(0, C)
        running = tl.full([C], 1.0, tl.float32)  # down the rows: P[t, s] where s < t
        ahead = 1.0
        for t in range(C):
            tl.store(products_p + t * C + s, tl.where(s < t, running, 0.0))
            tl.store(vectors_p + t, ahead)
            if rule.HAS_ALPHA:
                alpha = tl.load(alpha_at + t * H)
                running = tl.where(s < t, running * alpha, running)
                ahead *= alpha
        tl.store(vectors_p + C + s, running)
        tl.store(vectors_p + 2 * C, ahead)
        for col in range(BLOCKS):
            k_s = _token_rows(slots.k, b, h, first, col, S, H, D)
            for row in range(BLOCKS):
                k_t = _token_rows(slots.k, b, h, first, row, S, H, D)
                dots = tl.dot(k_t, tl.trans(k_s), input_precision="ieee")
                tl.store(_tile(gram_p, row, col, C), dots)
        tl.debug_barrier()  # what follows reads what other threads have written, here and below
        for back in range(BLOCKS):
            block = BLOCKS - 1 - back
            x = _token_rows(
                slots.k, b, h, first, block, S, H, D
            ).to(tl.float32) * tl.load(vectors_p + C + i + block * BK)[:, None]
            if rule.DGD:
                for later in range(block + 1, BLOCKS):
                    eta = tl.load(slots.eta + (b * S + first + i + later * BK) * H + h)
                    L = _coupling(products_p, gram_p, eta, later, block, C)
                    x -= tl.dot(
                        tl.trans(L), tl.load(keys_p + (i + later * BK)[:, None] * D + f[None, :]),
                        input_precision="ieee"
                    )
                eta = tl.load(slots.eta + (b * S + first + i + block * BK) * H + h)
                T = unit_inverse(_coupling(products_p, gram_p, eta, block, block, C), UPPER=False)
                x = tl.dot(tl.trans(T), x, input_precision="ieee")
            tl.store(keys_p + (i + block * BK)[:, None] * D + f[None, :], x)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["end", "S"])
def clock_adjoint_kernel(
    slots, place, terms, factors_p, sums_p, keys_bar_p, solved_p, products_bar_p, gram_bar_p, vectors_bar_p,
    slots_bar, end: tl.int64, S: tl.int64, shape: tl.constexpr, rule: tl.constexpr, clock: tl.constexpr,
    TILES: tl.constexpr,
):
    """Adds to slots_bar. keys_bar [B H, M, TILES, C, D], factors [B H, M, 9, C]
    and sums [B H, M, TILES, 6, C] are what the memories found; solved (Y) [B H, C, D], products_bar, gram_bar
    [B H, C, C], vectors_bar [B H, 2, C] are scratch."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    M: tl.constexpr = shape.MF + shape.MS
    M0: tl.constexpr = clock.M0
    M1: tl.constexpr = clock.M1
    C: tl.constexpr = clock.C
    g = tl.program_id(0).to(tl.int64)
    b, h = g // H, g % H
    if commits_here(place, b, end):
        first = end - C
        i = tl.arange(0, BK)
        f = tl.arange(0, D)
        BLOCKS: tl.constexpr = C // BK
        products_p = terms.products + g * C * C
        gram_p = terms.gram + g * C * C
        products_bar_p += g * C * C
        gram_bar_p += g * C * C
        keys_p = terms.keys + g * C * D
        solved_p += g * C * D
        vectors_p = terms.vectors + g * 3 * C
        vectors_bar_p += g * 2 * C
        factors_p += g * M * 9 * C
        decay_chunk_bar = 0.0
        for m in range(M0, M1):
            for tile in range(TILES):
                decay_chunk_bar += tl.load(sums_p + ((g * M + m) * TILES + tile) * 6 * C + 5 * C)

        for block in range(BLOCKS):
            t = i + block * BK
            at = (b * S + first + t) * H + h
            eta = tl.load(slots.eta + at)
            y = tl.zeros([BK, D], tl.float32)
            eta_bar = tl.zeros([BK], tl.float32)
            erase_bar = tl.zeros([BK], tl.float32)
            decay_after_bar = tl.zeros([BK], tl.float32)
            for m in range(M0, M1):
                for tile in range(TILES):
                    y += tl.load(keys_bar_p + (((g * M + m) * TILES + tile) * C + t[:, None]) * D + f[None, :])
                eta_bar += tl.load(factors_p + (m * 9 + 4) * C + t)
                erase_bar += tl.load(factors_p + (m * 9 + 5) * C + t)
                decay_after_bar += tl.load(factors_p + (m * 9 + 6) * C + t)
            if rule.DGD:
                for other in range(block):
                    L = _coupling(products_p, gram_p, eta, block, other, C)
                    solved = tl.load(solved_p + (i + other * BK)[:, None] * D + f[None, :])
                    y -= tl.dot(L, solved, input_precision="ieee")
                y = tl.dot(
                    unit_inverse(_coupling(products_p, gram_p, eta, block, block, C), UPPER=False), y,
                    input_precision="ieee"
                )
                eta_bar += erase_bar * tl.load(vectors_p + t)
            tl.store(solved_p + t[:, None] * D + f[None, :], y)
            tl.debug_barrier()  # what follows reads what other threads have written, here and below
            if rule.DGD:
                keys = tl.load(keys_p + t[:, None] * D + f[None, :])
                for other in range(block + 1):
                    solved = tl.load(solved_p + (i + other * BK)[:, None] * D + f[None, :])
                    s = i + other * BK
                    L_bar = tl.where(
                        t[:, None] > s[None, :], -tl.dot(keys, tl.trans(solved), input_precision="ieee"), 0.0
                    )
                    P = tl.load(_tile(products_p, block, other, C))
                    dots = tl.load(_tile(gram_p, block, other, C))
                    eta_bar += tl.sum(L_bar * P * dots, 1)
                    tl.store(_tile(products_bar_p, block, other, C), L_bar * dots * eta[:, None])
                    tl.store(_tile(gram_bar_p, block, other, C), L_bar * P * eta[:, None])
            add(slots_bar.eta, at, eta_bar)
            decay_after_bar += tl.sum(y * _token_rows(slots.k, b, h, first, block, S, H, D).to(tl.float32), 1)
            tl.store(vectors_bar_p + t, erase_bar * eta if rule.DGD else tl.zeros([BK], tl.float32))
            tl.store(vectors_bar_p + C + t, decay_after_bar)
        tl.debug_barrier()

        for block in range(BLOCKS):
            t = i + block * BK
            at = (b * S + first + t) * H + h
            k_bar = tl.load(vectors_p + C + t)[:, None] * tl.load(solved_p + t[:, None] * D + f[None, :])
            if rule.DGD or rule.CLIP:
                for other in range(BLOCKS):
                    s = i + other * BK
                    total = tl.zeros([BK, BK], tl.float32)
                    if rule.DGD:
                        if other <= block:
                            total += tl.load(_tile(gram_bar_p, block, other, C))
                        if other >= block:
                            total += tl.trans(tl.load(_tile(gram_bar_p, other, block, C)))
                    if rule.CLIP:
                        for m in range(M0, M1):
                            here, there = factors_p + m * 9 * C + t, factors_p + m * 9 * C + s
                            both = tl.load(here + 7 * C)[:, None] * tl.load(there + 8 * C)[None, :]
                            both += tl.load(here + 8 * C)[:, None] * tl.load(there + 7 * C)[None, :]
                            total += 2.0 * tl.load(_tile(gram_p, block, other, C)) * both
                    k_s = _token_rows(slots.k, b, h, first, other, S, H, D).to(tl.float32)
                    k_bar += tl.dot(total, k_s, input_precision="ieee")
            add(slots_bar.k, at[:, None] * D + f[None, :], k_bar)
            if rule.HAS_ALPHA:
                decay_after = tl.load(vectors_p + C + t)
                later_bar = decay_after * decay_chunk_bar
                for later in range(block, BLOCKS):
                    P = tl.load(_tile(products_p, later, block, C))
                    later_bar += tl.sum(P * tl.load(vectors_bar_p + i + later * BK)[:, None], 0)
                alpha_bar = tl.load(vectors_p + t) * later_bar
                for other in range(block + 1):
                    inside = decay_after[:, None] * tl.load(vectors_bar_p + C + i + other * BK)[None, :]
                    if rule.DGD:
                        for later in range(block, BLOCKS):
                            P_t = tl.trans(tl.load(_tile(products_p, later, block, C)))
                            P_bar = tl.load(_tile(products_bar_p, later, other, C))
                            inside += tl.dot(P_t, P_bar, input_precision="ieee")
                    alpha_bar += tl.sum(tl.load(_tile(products_p, block, other, C)) * inside, 1)
                add(slots_bar.alpha, at, alpha_bar)
