"""What all memories of one clock share in a chunk: decays, and the transformed keys Kg of the rank-C update.

    Kg_s = gamma[C,s] k_s - sum_{t>s} gamma[t-1,s] (k_t.k_s) eta_t Kg_t          gamma[t,s] = prod_{s<j<=t} alpha_j

Back substitution by blocks of 16 tokens, from the last: products with the blocks behind, then the 16 x 16
unit triangular inverse by exact merges of blocks of 1, 2, 4, 8. fp32 throughout (the Gram entries are
products of rounded keys and exact in fp32 accumulation). Decays are products of products, suffix of one block
x whole blocks x prefix of the other: alpha = 0 and 1e-30 need no care.
"""

import triton
import triton.language as tl

BK = tl.constexpr(16)


@triton.jit
def _block(k_p, eta_p, alpha_p, b, h, first, block, H: tl.constexpr, D: tl.constexpr, HAS_ALPHA: tl.constexpr):
    """k [16, D] in its dtype; eta [16]; the products of alpha before each token (exclusive), after it, and
    over the block."""
    i = tl.arange(0, BK)
    at = (b + first + (i + block * BK)) * H + h
    k = tl.load(k_p + at[:, None] * D + tl.arange(0, D)[None, :])
    eta = tl.load(eta_p + at)
    if HAS_ALPHA:
        alpha = tl.load(alpha_p + at)
        last = i == BK - 1
        before = tl.cumprod(tl.load(alpha_p + at - H, mask=i > 0, other=1.0), 0)
        after = tl.cumprod(tl.load(alpha_p + at + H, mask=i < BK - 1, other=1.0), 0, reverse=True)
        whole = tl.sum(tl.where(last, before * alpha, 0.0), 0)
    else:
        before = tl.full([BK], 1.0, tl.float32)
        after = tl.full([BK], 1.0, tl.float32)
        whole = 1.0
    return k, eta, before, after, whole


@triton.jit
def _dots(k_p, k, k_t, s_at, t_at, H: tl.constexpr, D: tl.constexpr):
    """k_s.k_t [16, 16] of blocks k, k_t, which start at rows s_at, t_at of k_p. PART features at a time, in
    the same order as at once: a thread would hold its rows of both blocks whole (192 registers in fp32 at D =
    64)."""
    PART: tl.constexpr = 16 if k.dtype == tl.float32 else 32
    if D > PART:
        i, d = tl.arange(0, BK)[:, None] * H * D, tl.arange(0, PART)[None, :]
        dots = tl.zeros([BK, BK], tl.float32)
        for d0 in range(0, D, PART):
            part, part_t = tl.load(k_p + s_at * D + (i + d + d0)), tl.load(k_p + t_at * D + (i + d + d0))
            dots = tl.dot(part, tl.trans(part_t), dots, input_precision="ieee")
    else:
        dots = tl.dot(k, tl.trans(k_t), input_precision="ieee")
    return dots


@triton.jit
def clock_body(
    k_p, eta_p, alpha_p, keys_p, vectors_p, gram_p, g, b_slot, h, first,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, HAS_ALPHA: tl.constexpr, DGD: tl.constexpr,
    CLIP: tl.constexpr, KEYS: tl.constexpr, VECTORS: tl.constexpr,
):
    """Of (row, head) g: keys [C, D] (Kg), vectors [3, C] (eta_t gamma[t-1,0]; gamma[C,t]; gamma[C,0] in its first place),
    gram [C, C] ((k_t.k_s)^2).

    b_slot: b * BIG; first: the chunk's first pending slot. KEYS, VECTORS: how many lie in scratch (momentum
    adds some).
    """
    i = tl.arange(0, BK)
    d = tl.arange(0, D)
    BLOCKS: tl.constexpr = C // BK
    vectors_p += g * VECTORS * C
    keys_p += g * KEYS * C * D
    gram_p += g * C * C
    so_far = 1.0
    for block in range(BLOCKS):
        _, eta, before, _, whole = _block(k_p, eta_p, alpha_p, b_slot, h, first, block, H, D, HAS_ALPHA)
        tl.store(vectors_p + (i + block * BK), eta * before * so_far)
        so_far *= whole
    tl.store(vectors_p + 2 * C, so_far)

    behind = 1.0  # product of alpha over the blocks behind this one
    # hoisting what does not change from block to block out of the loops would take 80 registers
    for back in tl.range(BLOCKS, disable_licm=True):
        block = BLOCKS - 1 - back
        k, eta, _, after, whole = _block(k_p, eta_p, alpha_p, b_slot, h, first, block, H, D, HAS_ALPHA)
        end = after * behind
        tl.store(vectors_p + C + (i + block * BK), end)
        x = end[:, None] * k.to(tl.float32)
        between = 1.0
        at = (b_slot + first + block * BK) * H + h
        if DGD or CLIP:
            for other in tl.range(block + 1, BLOCKS, disable_licm=True):
                k_t, eta_t, before_t, _, whole_t = _block(
                    k_p, eta_p, alpha_p, b_slot, h, first, other, H, D, HAS_ALPHA
                )
                dots = _dots(k_p, k, k_t, at, (b_slot + first + other * BK) * H + h, H, D)
                if CLIP:
                    tl.store(gram_p + (i + block * BK)[:, None] * C + (i + other * BK)[None, :], dots * dots)
                    tl.store(gram_p + (i + block * BK)[:, None] + (i + other * BK)[None, :] * C, dots * dots)
                if DGD:
                    factor = dots * after[:, None] * between * (before_t * eta_t)[None, :]
                    later = tl.load(keys_p + (i + other * BK)[:, None] * D + d[None, :])
                    x -= tl.dot(factor, later, input_precision="ieee")
                    between *= whole_t
            dots = _dots(k_p, k, k, at, at, H, D)
            if CLIP:
                tl.store(gram_p + (i + block * BK)[:, None] * C + (i + block * BK)[None, :], dots * dots)
            if DGD:
                x = tl.dot(_inverse(dots * eta[None, :], alpha_p + at, H, HAS_ALPHA), x, input_precision="ieee")
        tl.store(keys_p + (i + block * BK)[:, None] * D + d[None, :], x)
        tl.debug_barrier()  # the next block reads what other threads have just written
        behind *= whole


@triton.jit
def _inverse(products, alpha_p, H: tl.constexpr, HAS_ALPHA: tl.constexpr):
    """(I + U)^-1 for U[s, t] = products[s, t] gamma[t-1, s], s < t, of one block: exact merges of blocks of 1, 2,
    4, 8."""
    s, t = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
    if HAS_ALPHA:
        # along t the factor alpha_{t-1} wherever t - 1 > s
        alpha = tl.load(alpha_p + (t - 1) * H, mask=t > 0, other=1.0)
        products *= tl.cumprod(tl.where(t - 1 > s, alpha, 1.0), 1)
    upper = tl.where(t > s, products, 0.0)
    inverse = tl.where(s == t, 1.0, 0.0)
    for level in tl.static_range(4):
        same = (s >> (level + 1)) == (t >> (level + 1))
        off = tl.where(same & ((s >> level) % 2 == 0) & ((t >> level) % 2 == 1), upper, 0.0)
        inverse -= tl.dot(inverse, tl.dot(off, inverse, input_precision="ieee"), input_precision="ieee")
    return inverse
