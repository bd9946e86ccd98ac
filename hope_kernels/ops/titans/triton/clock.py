"""What all memories of one clock share in a chunk: decays, and the transformed keys Kg of the rank-C update.

    Kg_s = gamma[C,s] k_s - sum_{t>s} gamma[t-1,s] (k_t.k_s) eta_t Kg_t      gamma[t,s] = prod_{s<j<=t} alpha_j

Back substitution by blocks of 16 tokens, from the last: products with the later blocks, then the 16 x 16 unit
triangular inverse by exact merges of blocks of 1, 2, 4, 8. fp32 throughout (the Gram entries are products of
rounded keys and exact in fp32 accumulation). Decays are products of products, suffix of one block x whole
blocks x prefix of the other: alpha = 0 and 1e-30 need no care.

``start``: the chunk's first token, counted over the pending slots of all rows.
"""

import triton
import triton.language as tl

BK = tl.constexpr(16)


@triton.jit
def _block(pending, start, h, block, H: tl.constexpr, D: tl.constexpr, HAS_ALPHA: tl.constexpr):
    """k [16, D] in its dtype; eta [16]; the products of the block's alphas before each token (exclusive),
    after it, and of all of them."""
    i = tl.arange(0, BK)
    at = (start + (i + block * BK)) * H + h
    k = tl.load(pending.k + at[:, None] * D + tl.arange(0, D)[None, :])
    eta = tl.load(pending.eta + at)
    if HAS_ALPHA:
        alpha = tl.load(pending.alpha + at)
        last = i == BK - 1
        before = tl.cumprod(tl.load(pending.alpha + at - H, mask=i > 0, other=1.0), 0)
        after = tl.cumprod(tl.load(pending.alpha + at + H, mask=i < BK - 1, other=1.0), 0, reverse=True)
        whole = tl.sum(tl.where(last, before * alpha, 0.0), 0)
    else:
        before = tl.full([BK], 1.0, tl.float32)
        after = tl.full([BK], 1.0, tl.float32)
        whole = 1.0
    return k, eta, before, after, whole


@triton.jit
def erases_at_once(shape: tl.constexpr, rule: tl.constexpr, C: tl.constexpr):
    """As in tiles.py."""
    return rule.DGD and not rule.MOMENTUM and C > shape.D and shape.D == 64


@triton.jit
def _dots(k_p, k, k_t, s_at, t_at, H: tl.constexpr, D: tl.constexpr):
    """k_s.k_t [16, 16] of blocks k, k_t, which start at rows s_at, t_at of k_p. PART features at a time, in
    the same order as at once: a thread would hold its rows of both blocks whole (192 registers in fp32 at D =
    64)."""
    PART: tl.constexpr = 16 if k.dtype == tl.float32 else 32
    if D > PART:
        i, f = tl.arange(0, BK)[:, None] * H * D, tl.arange(0, PART)[None, :]
        dots = tl.zeros([BK, BK], tl.float32)
        for f0 in range(0, D, PART):
            part, part_t = tl.load(k_p + s_at * D + (i + f + f0)), tl.load(k_p + t_at * D + (i + f + f0))
            dots = tl.dot(part, tl.trans(part_t), dots, input_precision="ieee")
    else:
        dots = tl.dot(k, tl.trans(k_t), input_precision="ieee")
    return dots


@triton.jit
def clock_body(pending, scratch, g, start, h, shape: tl.constexpr, rule: tl.constexpr, C: tl.constexpr):
    """Of (row, head) g: keys [C, D] (Kg), also rounded; vectors [3, C] (erase, decay_after, decay_chunk in its
    first place); gram2 [C, C]. With momentum two blocks of keys and seven vectors lie in scratch:
    ``momentum_body``, which rounds."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    KEYS: tl.constexpr = 2 if rule.MOMENTUM else 1
    VECTORS: tl.constexpr = 7 if rule.MOMENTUM else 3
    BLOCKS: tl.constexpr = C // BK
    i = tl.arange(0, BK)
    f = tl.arange(0, D)
    vectors_p = scratch.vectors + g * VECTORS * C
    keys_p = scratch.keys + g * KEYS * C * D
    gram2_p = scratch.gram2 + g * C * C
    rounded_p = scratch.rounded_keys + g * KEYS * C * D
    decay_chunk = 1.0
    for block in range(BLOCKS):
        _, eta, before, _, whole = _block(pending, start, h, block, H, D, rule.HAS_ALPHA)
        tl.store(vectors_p + (i + block * BK), eta * before * decay_chunk)
        decay_chunk *= whole
    tl.store(vectors_p + 2 * C, decay_chunk)

    decay_later = 1.0  # product of alpha over the later blocks
    # hoisting what does not change from block to block out of the loops would take 80 registers
    for back in tl.range(BLOCKS, disable_licm=True):
        block = BLOCKS - 1 - back
        k, eta, _, after, whole = _block(pending, start, h, block, H, D, rule.HAS_ALPHA)
        decay_after = after * decay_later
        tl.store(vectors_p + C + (i + block * BK), decay_after)
        keys = decay_after[:, None] * k.to(tl.float32)
        between = 1.0
        at = (start + block * BK) * H + h
        if rule.DGD or rule.CLIP:
            for other in tl.range(block + 1, BLOCKS, disable_licm=True):
                k_t, eta_t, before_t, _, whole_t = _block(pending, start, h, other, H, D, rule.HAS_ALPHA)
                dots = _dots(pending.k, k, k_t, at, (start + other * BK) * H + h, H, D)
                if rule.CLIP:
                    tl.store(gram2_p + (i + block * BK)[:, None] * C + (i + other * BK)[None, :], dots * dots)
                    tl.store(gram2_p + (i + block * BK)[:, None] + (i + other * BK)[None, :] * C, dots * dots)
                if rule.DGD:
                    factor = dots * after[:, None] * between * (before_t * eta_t)[None, :]
                    later = tl.load(keys_p + (i + other * BK)[:, None] * D + f[None, :])
                    keys -= tl.dot(factor, later, input_precision="ieee")
                    between *= whole_t
            dots = _dots(pending.k, k, k, at, at, H, D)
            if rule.CLIP:
                tl.store(gram2_p + (i + block * BK)[:, None] * C + (i + block * BK)[None, :], dots * dots)
            if rule.DGD:
                inverse = _inverse(dots * eta[None, :], pending.alpha + at, H, rule.HAS_ALPHA)
                keys = tl.dot(inverse, keys, input_precision="ieee")
        at_keys = (i + block * BK)[:, None] * D + f[None, :]
        tl.store(keys_p + at_keys, keys)
        if not rule.MOMENTUM:
            tl.store(rounded_p + at_keys, keys.to(rounded_p.dtype.element_ty))
        tl.debug_barrier()  # the next block reads what other threads have just written
        decay_later *= whole
    if erases_at_once(shape, rule, C):
        _erased_keys(pending, scratch, g, start, h, shape=shape, C=C)


@triton.jit
def _erased_keys(pending, scratch, g, start, h, shape: tl.constexpr, C: tl.constexpr):
    """erased_keys [D, D]: sum over t of k_t (erase_t Kg_t)^T, so that what a chunk erases of delta2 is delta2
    erased_keys. A part of the columns at a time."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    CT: tl.constexpr = 16 if pending.k.dtype.element_ty == tl.float32 else 64
    PART: tl.constexpr = 16 if pending.k.dtype.element_ty == tl.float32 else D
    f = tl.arange(0, D)
    vectors_p = scratch.vectors + g * 3 * C
    keys_p = scratch.rounded_keys + g * C * D
    for f0 in range(0, D, PART):
        part = f0 + tl.arange(0, PART)
        erased = tl.zeros([D, PART], tl.float32)
        for c0 in tl.range(0, C, CT, num_stages=1):
            c = c0 + tl.arange(0, CT)
            k = tl.load(pending.k + (start + c)[None, :] * H * D + h * D + f[:, None])
            keys = tl.load(keys_p + c[:, None] * D + part[None, :]).to(tl.float32)
            keys *= tl.load(vectors_p + c)[:, None]
            erased = tl.dot(k, keys.to(k.dtype), erased, input_precision="ieee")
        at = scratch.erased_keys + (g * D + f[:, None]) * D + part[None, :]
        tl.store(at, erased.to(scratch.erased_keys.dtype.element_ty))


@triton.jit
def _inverse(products, alpha_p, H: tl.constexpr, HAS_ALPHA: tl.constexpr):
    """(I + U)^-1 for U[s, t] = products[s, t] gamma[t-1, s], s < t, of one block."""
    s, t = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
    if HAS_ALPHA:
        # along t the factor alpha_{t-1} wherever t - 1 > s
        alpha = tl.load(alpha_p + (t - 1) * H, mask=t > 0, other=1.0)
        products *= tl.cumprod(tl.where(t - 1 > s, alpha, 1.0), 1)
    return unit_inverse(tl.where(t > s, products, 0.0), UPPER=True)


@triton.jit
def unit_inverse(strict, UPPER: tl.constexpr):
    """(I + strict)^-1 for a strictly triangular 16 x 16 block: exact merges of blocks of 1, 2, 4, 8."""
    row, col = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
    # one of two neighbouring blocks lies on the rows, the other on the columns
    ROW: tl.constexpr = 0 if UPPER else 1
    early, late = (row, col) if UPPER else (col, row)
    inverse = tl.where(early == late, 1.0, 0.0)
    for level in tl.static_range(4):
        same = (early >> (level + 1)) == (late >> (level + 1))
        off = tl.where(same & ((row >> level) % 2 == ROW) & ((col >> level) % 2 == 1 - ROW), strict, 0.0)
        inverse -= tl.dot(inverse, tl.dot(off, inverse, input_precision="ieee"), input_precision="ieee")
    return inverse
