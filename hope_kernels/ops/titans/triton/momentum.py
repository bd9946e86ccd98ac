"""What momentum adds to a clock's chunk (clock.py): gradients move by keys of their own, and s joins what is
erased.

    Kg_s = A[C,s] k_s - sum_{t>s} A[t-1,s] (k_t.k_s) eta_t Y_t
    A[t,s] = alpha_t A[t-1,s] + B[t,s]      B[t,s] = beta_t B[t-1,s]
    delta2_C = gamma[C,0] delta2 - c_C s2 - sum_t gain_t d_t Kg_t^T
               - sum_t eta_t (gamma[t-1,0] delta2 k_t - c_{t-1} s2 k_t) Y_t^T

These are README.md's equations with X_t = eta_t Y_t, Kt = eta_t gamma[t-1,0] Y_t, Ks = -eta_t c_{t-1} Y_t: Y is
what the clock without momentum calls Kg. Decays of both kinds are products of the matrices [[alpha, beta],
[0, beta]], kept as (R, c, B) for [[R, c], [0, B]]:

    (R, c, B) after (R', c', B') = (R R', R c' + c B', B B')             A = R + c,  c_t = c[t,0]

over the suffix of a block of 16 tokens, whole blocks and the prefix of another one; inside a block A = R +
(sum over i) gamma[t,i] B[i,s]. No quotient, no difference of logarithms: alpha = 0, beta = 0 and 1e-30 need no
care. A pass of its own after the clock's, its loops not pipelined: fp32 products hold their operands in
registers, and two at once or the next one's as well are too many.
"""

import triton
import triton.language as tl

from .clock import BK, _block


@triton.jit
def _gammas(alpha_p, H: tl.constexpr, HAS_ALPHA: tl.constexpr):
    """[s, t]: gamma[t-1, s] for s < t of the block whose first token is at alpha_p, else 0."""
    s, t = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
    gamma = tl.full([BK, BK], 1.0, tl.float32)
    if HAS_ALPHA:
        alpha = tl.load(alpha_p + (t - 1) * H, mask=t > 0, other=1.0)
        gamma = tl.cumprod(tl.where(t - 1 > s, alpha, 1.0), 1)
    return tl.where(t > s, gamma, 0.0)


@triton.jit
def _betas(beta_p, H: tl.constexpr):
    """[s, t]: B[t, s] for s < t of the block whose first token is at beta_p, else 0."""
    s, t = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
    beta = tl.load(beta_p + t * H)
    return tl.where(t > s, tl.cumprod(tl.where(t > s, beta, 1.0), 1), 0.0)


@triton.jit
def momentum_body(pending, scratch, g, start, h, shape: tl.constexpr, rule: tl.constexpr, C: tl.constexpr):
    """After ``clock_body``, of (row, head) g: keys [2, C, D] (Y; Kg), also rounded, and vectors [7, C] (erase;
    arrival_after; decay_chunk, c_chunk, beta_chunk and then every block's R, c, B; eta_t c_{t-1}; beta_after; R and
    c from the start of a token's block to the token before it)."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    BLOCKS: tl.constexpr = C // BK
    i = tl.arange(0, BK)
    f = tl.arange(0, D)
    vectors_p = scratch.vectors + g * 7 * C
    keys_p = scratch.keys + g * 2 * C * D
    whole_p = vectors_p + 2 * C + 3
    c_chunk, beta_chunk = 0.0, 1.0
    for block in tl.range(BLOCKS, num_stages=1):
        _, eta, before, after, whole = _block(pending, start, h, block, H, D, rule.HAS_ALPHA)
        at = (start + block * BK) * H + h
        b_before = tl.cumprod(tl.load(pending.beta + at + (i - 1) * H, mask=i > 0, other=1.0), 0)
        b_with = b_before * tl.load(pending.beta + at + i * H)
        b_whole = tl.sum(tl.where(i == BK - 1, b_with, 0.0), 0)
        c_before = tl.sum(_gammas(pending.alpha + at, H, rule.HAS_ALPHA) * b_with[:, None], 0)
        c_whole = tl.sum(after * b_with, 0)
        to = vectors_p + (i + block * BK)
        tl.store(to + 3 * C, eta * (before * c_chunk + c_before * beta_chunk))
        tl.store(to + 5 * C, before)
        tl.store(to + 6 * C, c_before)
        tl.store(whole_p + 3 * block, whole)
        tl.store(whole_p + 3 * block + 1, c_whole)
        tl.store(whole_p + 3 * block + 2, b_whole)
        c_chunk = whole * c_chunk + c_whole * beta_chunk
        beta_chunk *= b_whole
    tl.store(vectors_p + 2 * C + 1, c_chunk)
    tl.store(vectors_p + 2 * C + 2, beta_chunk)
    tl.debug_barrier()  # read below by other threads

    decay_later, c_later, b_later = 1.0, 0.0, 1.0  # over the later blocks
    for back in tl.range(BLOCKS, num_stages=1):
        block = BLOCKS - 1 - back
        k, eta, _, after, _ = _block(pending, start, h, block, H, D, rule.HAS_ALPHA)
        at = (start + block * BK) * H + h
        b_after = tl.cumprod(
            tl.load(pending.beta + at + (i + 1) * H, mask=i < BK - 1, other=1.0), 0, reverse=True
        )
        betas = _betas(pending.beta + at, H)
        arrived_after = after + tl.sum(betas * after[None, :], 1)  # A up to the block's last token
        arrival_after = decay_later * arrived_after + c_later * b_after
        tl.store(vectors_p + C + (i + block * BK), arrival_after)
        tl.store(vectors_p + 4 * C + (i + block * BK), b_later * b_after)
        keys = arrival_after[:, None] * k.to(tl.float32)
        if rule.DGD:
            gammas = _gammas(pending.alpha + at, H, rule.HAS_ALPHA)
            within = gammas + tl.dot(betas, gammas, input_precision="ieee")
            dots = tl.dot(k, tl.trans(k), input_precision="ieee")
            later = tl.load(keys_p + (i + block * BK)[:, None] * D + f[None, :])
            keys -= tl.dot(dots * within * eta[None, :], later, input_precision="ieee")
            between, c_between, b_between = 1.0, 0.0, 1.0  # over the blocks between
            for other in tl.range(block + 1, BLOCKS, num_stages=1):
                token = i + other * BK
                at_t = (start + token) * H + h
                k_t = tl.load(pending.k + at_t[:, None] * D + f[None, :])
                arrived = between * arrived_after + c_between * b_after
                factor = tl.load(vectors_p + 5 * C + token)[None, :] * arrived[:, None]
                factor += tl.load(vectors_p + 6 * C + token)[None, :] * (b_between * b_after)[:, None]
                dots = tl.dot(k, tl.trans(k_t), input_precision="ieee")
                factor *= dots * tl.load(pending.eta + at_t)[None, :]
                later = tl.load(keys_p + token[:, None] * D + f[None, :])
                keys -= tl.dot(factor, later, input_precision="ieee")
                whole = tl.load(whole_p + 3 * other)
                b_whole = tl.load(whole_p + 3 * other + 2)
                c_between = whole * c_between + tl.load(whole_p + 3 * other + 1) * b_between
                b_between *= b_whole
                between *= whole
        tl.store(keys_p + C * D + (i + block * BK)[:, None] * D + f[None, :], keys)
        whole_here = tl.load(whole_p + 3 * block)
        c_later = decay_later * tl.load(whole_p + 3 * block + 1) + c_later * tl.load(whole_p + 3 * block + 2)
        b_later *= tl.load(whole_p + 3 * block + 2)
        decay_later *= whole_here

    tl.debug_barrier()  # read below by other threads
    rounded_p = scratch.rounded_keys + g * 2 * C * D  # not above, where registers are scarce
    for block in tl.range(2 * BLOCKS, num_stages=1):
        at_keys = (i + block * BK)[:, None] * D + f[None, :]
        tl.store(rounded_p + at_keys, tl.load(keys_p + at_keys).to(rounded_p.dtype.element_ty))
