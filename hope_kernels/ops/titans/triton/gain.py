"""The gain of one memory in a chunk: the step size after the step clip, eta~_t = eta_t / max(1, S_t).

    m_t^2 = |a_t|^2 + |d_t|^2 / (|e_t|^2 + 1e-9) + 1e-12        S_t = factor m_t sum_s eta_s m_s (k_t.k_s)^2

Norms come as partial sums of the tiles of hidden units and are added in the tiles' order. C^2 + 2 C N / NT
numbers are read, once a memory: by whoever finishes the last tile of hidden units, so that no tile of the
update has to.
"""

import triton
import triton.language as tl


@triton.jit
def _gradient_size(norms_p, e2_p, gm, c, TILES: tl.constexpr, C: tl.constexpr):
    """m_t of one memory for tokens c."""
    a2 = tl.zeros(c.shape, tl.float32)
    d2 = tl.zeros(c.shape, tl.float32)
    for tile in range(TILES):
        a2 += tl.load(norms_p + (gm * TILES + tile) * 2 * C + c)
        d2 += tl.load(norms_p + (gm * TILES + tile) * 2 * C + C + c)
    return tl.sqrt(a2 + d2 / (tl.load(e2_p + gm * C + c) + 1e-9) + 1e-12)


@triton.jit
def gain_task(
    eta_p, scratch, g, m, start, factor, shape: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    CLIP: tl.constexpr,
):
    """gain [B H, M, C] (eta without CLIP) of memory m of (row, head) g, and on the way m_t, sizes [B H, M, C];
    norms [B H, M, TILES, 2, C], e2 [B H, M, C], gram2 [B H, C, C]; start: the chunk's first token, counted over
    the pending slots of all rows. Tokens by CT, whatever the other tasks take."""
    H: tl.constexpr = shape.H
    CT: tl.constexpr = 16 if C < 32 else 32 if C < 64 else 64
    gm = g * (shape.MF + shape.MS) + m
    eta_p += start * H + g % H
    if CLIP:
        for c0 in range(0, C, CT):
            c = c0 + tl.arange(0, CT)
            tl.store(scratch.sizes + gm * C + c, _gradient_size(scratch.norms, scratch.e2, gm, c, TILES, C))
        tl.debug_barrier()  # read below by other threads
    for c0 in range(0, C, CT):
        c = c0 + tl.arange(0, CT)
        gain = tl.load(eta_p + c * H)
        if CLIP:
            total = tl.zeros([CT], tl.float32)
            for s0 in range(0, C, CT):
                s = s0 + tl.arange(0, CT)
                size = tl.load(eta_p + s * H) * tl.load(scratch.sizes + gm * C + s)
                gram2 = tl.load(scratch.gram2 + (g * C + s)[:, None] * C + c[None, :])
                total += tl.sum(size[:, None] * gram2, 0)
            gain /= tl.maximum(1.0, factor * tl.load(scratch.sizes + gm * C + c) * total)
        tl.store(scratch.gain + gm * C + c, gain)
