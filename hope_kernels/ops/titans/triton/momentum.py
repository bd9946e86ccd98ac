"""What momentum adds to a clock's chunk (triton_clock.py): gradients move by keys of their own, and s joins
what is erased.

    Kg_s = A[C,s] k_s - sum_{t>s} A[t-1,s] (k_t.k_s) eta_t Y_t           A[t,s] = alpha_t A[t-1,s] + B[t,s],  B[t,s] = beta_t B[t-1,s]
    delta2_C = gamma[C,0] delta2 - c_C s2 - sum_t gain_t d_t Kg_t^T - sum_t eta_t (gamma[t-1,0] delta2 k_t - c_{t-1} s2 k_t) Y_t^T

These are README.md's equations with X_t = eta_t Y_t, Kt = eta_t gamma[t-1,0] Y_t, Ks = -eta_t c_{t-1} Y_t: Y is
what the clock without momentum calls Kg. Decays of both kinds are products of the matrices [[alpha, beta],
[0, beta]], kept as (R, c, B) for [[R, c], [0, B]]:

    (R, c, B) after (R', c', B') = (R R', R c' + c B', B B')             D = R + c,  c_t = c[t,0]

over the suffix of a block of 16 tokens, whole blocks and the prefix of another one; inside a block D = R +
(sum over i) gamma[t,i] B[i,s]. No quotient, no difference of logarithms: alpha = 0, beta = 0 and 1e-30 need no
care. A pass of its own behind the clock's, its loops not pipelined: fp32 products hold their operands in
registers, and two at once or the next one's as well are too many.
"""

import triton
import triton.language as tl

from .clock import BK, _block


@triton.jit
def _retained(alpha_p, H: tl.constexpr, HAS_ALPHA: tl.constexpr):
    """[s, t]: gamma[t-1, s] for s < t of the block whose first token is at alpha_p, else 0."""
    s, t = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
    kept = tl.full([BK, BK], 1.0, tl.float32)
    if HAS_ALPHA:
        alpha = tl.load(alpha_p + (t - 1) * H, mask=t > 0, other=1.0)
        kept = tl.cumprod(tl.where(t - 1 > s, alpha, 1.0), 1)
    return tl.where(t > s, kept, 0.0)


@triton.jit
def _carried(beta_p, H: tl.constexpr):
    """[s, t]: B[t, s] for s < t of the block whose first token is at beta_p, else 0."""
    s, t = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
    beta = tl.load(beta_p + t * H)
    return tl.where(t > s, tl.cumprod(tl.where(t > s, beta, 1.0), 1), 0.0)


@triton.jit
def momentum_body(
    k_p, eta_p, alpha_p, beta_p, keys_p, vectors_p, g, b_slot, h, first,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, HAS_ALPHA: tl.constexpr, DGD: tl.constexpr,
):
    """Behind ``clock_body``, of (row, head) g: keys [2, C, D] (Y; Kg) and vectors [7, C] (eta_t gamma[t-1,0];
    A[C,t]; gamma[C,0], c_C, B_C and then every block's R, c, B; eta_t c_{t-1}; B[C,t]; R and c from the start of
    a token's block to the token before it)."""
    i = tl.arange(0, BK)
    d = tl.arange(0, D)
    BLOCKS: tl.constexpr = C // BK
    vectors_p += g * 7 * C
    keys_p += g * 2 * C * D
    whole_p = vectors_p + 2 * C + 3
    c_far, b_far = 0.0, 1.0
    for block in tl.range(BLOCKS, num_stages=1):
        _, eta, before, after, whole = _block(k_p, eta_p, alpha_p, b_slot, h, first, block, H, D, HAS_ALPHA)
        at = (b_slot + first + block * BK) * H + h
        b_before = tl.cumprod(tl.load(beta_p + at + (i - 1) * H, mask=i > 0, other=1.0), 0)
        b_with = b_before * tl.load(beta_p + at + i * H)
        b_whole = tl.sum(tl.where(i == BK - 1, b_with, 0.0), 0)
        c_before = tl.sum(_retained(alpha_p + at, H, HAS_ALPHA) * b_with[:, None], 0)
        c_whole = tl.sum(after * b_with, 0)
        to = vectors_p + (i + block * BK)
        tl.store(to + 3 * C, eta * (before * c_far + c_before * b_far))
        tl.store(to + 5 * C, before)
        tl.store(to + 6 * C, c_before)
        tl.store(whole_p + 3 * block, whole)
        tl.store(whole_p + 3 * block + 1, c_whole)
        tl.store(whole_p + 3 * block + 2, b_whole)
        c_far = whole * c_far + c_whole * b_far
        b_far *= b_whole
    tl.store(vectors_p + 2 * C + 1, c_far)
    tl.store(vectors_p + 2 * C + 2, b_far)
    tl.debug_barrier()  # read below by other threads

    behind, c_behind, b_behind = 1.0, 0.0, 1.0  # over the blocks behind this one
    for back in tl.range(BLOCKS, num_stages=1):
        block = BLOCKS - 1 - back
        k, eta, _, after, _ = _block(k_p, eta_p, alpha_p, b_slot, h, first, block, H, D, HAS_ALPHA)
        at = (b_slot + first + block * BK) * H + h
        b_after = tl.cumprod(tl.load(beta_p + at + (i + 1) * H, mask=i < BK - 1, other=1.0), 0, reverse=True)
        carried = _carried(beta_p + at, H)
        delay = after + tl.sum(carried * after[None, :], 1)  # D up to the block's last token
        end = behind * delay + c_behind * b_after
        tl.store(vectors_p + C + (i + block * BK), end)
        tl.store(vectors_p + 4 * C + (i + block * BK), b_behind * b_after)
        keys = end[:, None] * k.to(tl.float32)
        if DGD:
            retained = _retained(alpha_p + at, H, HAS_ALPHA)
            within = retained + tl.dot(carried, retained, input_precision="ieee")
            dots = tl.dot(k, tl.trans(k), input_precision="ieee")
            later = tl.load(keys_p + (i + block * BK)[:, None] * D + d[None, :])
            keys -= tl.dot(dots * within * eta[None, :], later, input_precision="ieee")
            between, c_between, b_between = 1.0, 0.0, 1.0  # over the blocks between
            for other in tl.range(block + 1, BLOCKS, num_stages=1):
                token = i + other * BK
                at_t = (b_slot + first + token) * H + h
                k_t = tl.load(k_p + at_t[:, None] * D + d[None, :])
                arrived = between * delay + c_between * b_after
                factor = tl.load(vectors_p + 5 * C + token)[None, :] * arrived[:, None]
                factor += tl.load(vectors_p + 6 * C + token)[None, :] * (b_between * b_after)[:, None]
                factor *= tl.dot(k, tl.trans(k_t), input_precision="ieee") * tl.load(eta_p + at_t)[None, :]
                later = tl.load(keys_p + token[:, None] * D + d[None, :])
                keys -= tl.dot(factor, later, input_precision="ieee")
                whole = tl.load(whole_p + 3 * other)
                b_whole = tl.load(whole_p + 3 * other + 2)
                c_between = whole * c_between + tl.load(whole_p + 3 * other + 1) * b_between
                b_between *= b_whole
                between *= whole
        tl.store(keys_p + C * D + (i + block * BK)[:, None] * D + d[None, :], keys)
        whole_here = tl.load(whole_p + 3 * block)
        c_behind = behind * tl.load(whole_p + 3 * block + 1) + c_behind * tl.load(whole_p + 3 * block + 2)
        b_behind *= tl.load(whole_p + 3 * block + 2)
        behind *= whole_here
