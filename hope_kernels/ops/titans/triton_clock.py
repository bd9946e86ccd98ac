"""What all memories of one clock share in a chunk: decays, and the transformed keys of the rank-C update.

    Y_s = R[C,s] k_s - sum_{t>s} R[t-1,s] (k_t.k_s) eta_t Y_t            R[t,s] = prod_{s<j<=t} alpha_j
    delta2_C = R[C,0] delta2 - sum_t (gain_t d_t + eta_t R[t-1,0] delta2 k_t) Y_t^T

and with momentum, where gradients move by keys of their own:

    Kg_s = D[C,s] k_s - sum_{t>s} D[t-1,s] (k_t.k_s) eta_t Y_t           D[t,s] = alpha_t D[t-1,s] + B[t,s],  B[t,s] = beta_t B[t-1,s]
    delta2_C = R[C,0] delta2 - c_C s2 - sum_t gain_t d_t Kg_t^T - sum_t eta_t (R[t-1,0] delta2 k_t - c_{t-1} s2 k_t) Y_t^T

(README.md with X_t = eta_t Y_t, Kt = eta_t R[t-1,0] Y_t and Ks = -eta_t c_{t-1} Y_t.)

Back substitution by blocks of 16 tokens, from the last: products with the blocks behind, then the 16 x 16 unit triangular inverse by exact
merges of blocks of 1, 2, 4, 8. fp32 throughout (the Gram entries are products of rounded keys and exact in fp32 accumulation). Decays are
products of products, suffix of one block x whole blocks x prefix of the other: alpha = 0 and 1e-30 need no care. With momentum they
are products of matrices [[alpha, beta], [0, beta]], kept as (R, c, B) for [[R, c], [0, B]]:

    (R, c, B) after (R', c', B') = (R R', R c' + c B', B B')             D = R + c,  c_t = c[t,0]
"""

import triton
import triton.language as tl

BK = tl.constexpr(16)


@triton.jit
def _block(k_p, eta_p, alpha_p, b, h, first, block, H: tl.constexpr, D: tl.constexpr, HAS_ALPHA: tl.constexpr):
    """k [16, D] in its dtype; eta [16]; the products of alpha before each token (exclusive), after it, and over the block."""
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
def _retained(alpha_p, H: tl.constexpr, HAS_ALPHA: tl.constexpr):
    """[s, t]: R[t-1, s] of one block for s < t, else 0. alpha_p: the block's first token."""
    s, t = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
    kept = tl.full([BK, BK], 1.0, tl.float32)
    if HAS_ALPHA:
        alpha = tl.load(alpha_p + (t - 1) * H, mask=t > 0, other=1.0)
        kept = tl.cumprod(tl.where(t - 1 > s, alpha, 1.0), 1)
    return tl.where(t > s, kept, 0.0)


@triton.jit
def _carried(beta_p, H: tl.constexpr):
    """[s, t]: B[t, s] of one block for s < t, else 0. beta_p: the block's first token."""
    s, t = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
    beta = tl.load(beta_p + t * H)
    return tl.where(t > s, tl.cumprod(tl.where(t > s, beta, 1.0), 1), 0.0)


@triton.jit
def _momentum(alpha_p, beta_p, after, H: tl.constexpr, HAS_ALPHA: tl.constexpr):
    """(c, B) over a block's tokens before each token [16], [16], after it [16], [16], and over the block. alpha_p, beta_p: its first token;
    after [16]: the products of alpha after each token. B joins at every token: c sums over tokens i, B up to i times R from i on."""
    i = tl.arange(0, BK)
    b_before = tl.cumprod(tl.load(beta_p + (i - 1) * H, mask=i > 0, other=1.0), 0)
    b_after = tl.cumprod(tl.load(beta_p + (i + 1) * H, mask=i < BK - 1, other=1.0), 0, reverse=True)
    b_with = b_before * tl.load(beta_p + i * H)
    c_before = tl.sum(_retained(alpha_p, H, HAS_ALPHA) * b_with[:, None], 0)
    c_after = tl.sum(_carried(beta_p, H) * after[None, :], 1)
    return c_before, b_before, c_after, b_after, tl.sum(b_with * after, 0), tl.sum(tl.where(i == BK - 1, b_with, 0.0), 0)


@triton.jit
def clock_body(
    k_p, eta_p, alpha_p, beta_p, keys_p, vectors_p, gram_p, g, b_slot, h, first,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, HAS_ALPHA: tl.constexpr, DGD: tl.constexpr, CLIP: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    """Of (row, head) g: keys [1, C, D] (Y), vectors [3, C] (eta_t R[t-1,0]; R[C,t]; R[C,0] in its first place), gram [C, C] ((k_t.k_s)^2).

    With momentum keys [2, C, D] (Y; Kg) and vectors [5, C] (eta_t R[t-1,0]; D[C,t]; R[C,0], c_C, B_C; eta_t c_{t-1}; B[C,t]).
    b_slot: b * BIG; first: the chunk's first pending slot.
    """
    i = tl.arange(0, BK)
    d = tl.arange(0, D)
    BLOCKS: tl.constexpr = C // BK
    VECTORS: tl.constexpr = 5 if MOMENTUM else 3
    KEYS: tl.constexpr = 2 if MOMENTUM else 1
    vectors_p += g * VECTORS * C
    keys_p += g * KEYS * C * D
    gram_p += g * C * C
    so_far = 1.0
    c_far, b_far = 0.0, 1.0
    for block in range(BLOCKS):
        _, eta, before, after, whole = _block(k_p, eta_p, alpha_p, b_slot, h, first, block, H, D, HAS_ALPHA)
        tl.store(vectors_p + (i + block * BK), eta * before * so_far)
        if MOMENTUM:
            at = (b_slot + first + block * BK) * H + h
            c_before, b_before, _, _, c_whole, b_whole = _momentum(alpha_p + at, beta_p + at, after, H, HAS_ALPHA)
            tl.store(vectors_p + 3 * C + (i + block * BK), eta * (before * c_far + c_before * b_far))
            c_far = whole * c_far + c_whole * b_far
            b_far *= b_whole
        so_far *= whole
    tl.store(vectors_p + 2 * C, so_far)
    if MOMENTUM:
        tl.store(vectors_p + 2 * C + 1, c_far)
        tl.store(vectors_p + 2 * C + 2, b_far)

    behind = 1.0  # product of alpha over the blocks behind this one
    c_behind, b_behind = 0.0, 1.0
    for back in range(BLOCKS):
        block = BLOCKS - 1 - back
        k, eta, _, after, whole = _block(k_p, eta_p, alpha_p, b_slot, h, first, block, H, D, HAS_ALPHA)
        end = after * behind
        x = end[:, None] * k.to(tl.float32)
        if MOMENTUM:
            at = (b_slot + first + block * BK) * H + h
            _, _, c_after, b_after, c_whole, b_whole = _momentum(alpha_p + at, beta_p + at, after, H, HAS_ALPHA)
            end = behind * (after + c_after) + c_behind * b_after
            tl.store(vectors_p + 4 * C + (i + block * BK), b_behind * b_after)
            moved = end[:, None] * k.to(tl.float32)
        tl.store(vectors_p + C + (i + block * BK), end)
        between = 1.0
        c_between, b_between = 0.0, 1.0
        if DGD or CLIP:
            for other in range(block + 1, BLOCKS):
                k_t, eta_t, before_t, after_t, whole_t = _block(k_p, eta_p, alpha_p, b_slot, h, first, other, H, D, HAS_ALPHA)
                dots = tl.dot(k, tl.trans(k_t), input_precision="ieee")
                if CLIP:
                    tl.store(gram_p + (i + block * BK)[:, None] * C + (i + other * BK)[None, :], dots * dots)
                    tl.store(gram_p + (i + block * BK)[:, None] + (i + other * BK)[None, :] * C, dots * dots)
                if DGD:
                    factor = dots * after[:, None] * between * (before_t * eta_t)[None, :]
                    later = tl.load(keys_p + (i + other * BK)[:, None] * D + d[None, :])
                    x -= tl.dot(factor, later, input_precision="ieee")
                    if MOMENTUM:
                        at_t = (b_slot + first + other * BK) * H + h
                        c_t, _, _, _, c_whole_t, b_whole_t = _momentum(alpha_p + at_t, beta_p + at_t, after_t, H, HAS_ALPHA)
                        # D[t-1,s]: s as it arrives at the other block, then on to t
                        arrived = between * (after + c_after) + c_between * b_after
                        delay = before_t[None, :] * arrived[:, None] + c_t[None, :] * (b_between * b_after)[:, None]
                        moved -= tl.dot(dots * delay * eta_t[None, :], later, input_precision="ieee")
                        c_between = whole_t * c_between + c_whole_t * b_between
                        b_between *= b_whole_t
                    between *= whole_t
            dots = tl.dot(k, tl.trans(k), input_precision="ieee")
            if CLIP:
                tl.store(gram_p + (i + block * BK)[:, None] * C + (i + block * BK)[None, :], dots * dots)
            if DGD:
                alpha_at = alpha_p + (b_slot + first + block * BK) * H + h
                x = tl.dot(_inverse(dots * eta[None, :], alpha_at, H, HAS_ALPHA), x, input_precision="ieee")
                if MOMENTUM:
                    kept = _retained(alpha_at, H, HAS_ALPHA)
                    delay = kept + tl.dot(_carried(beta_p + (b_slot + first + block * BK) * H + h, H), kept, input_precision="ieee")
                    moved -= tl.dot(dots * delay * eta[None, :], x, input_precision="ieee")
        tl.store(keys_p + (i + block * BK)[:, None] * D + d[None, :], x)
        if MOMENTUM:
            tl.store(keys_p + C * D + (i + block * BK)[:, None] * D + d[None, :], moved)
            c_behind = behind * c_whole + c_behind * b_whole
            b_behind *= b_whole
        tl.debug_barrier()  # the next block reads what other threads have just written
        behind *= whole


@triton.jit
def _inverse(products, alpha_p, H: tl.constexpr, HAS_ALPHA: tl.constexpr):
    """(I + U)^-1 for U[s, t] = products[s, t] R[t-1, s], s < t, of one block: exact merges of blocks of 1, 2, 4, 8."""
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
