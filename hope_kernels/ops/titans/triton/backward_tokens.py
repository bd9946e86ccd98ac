"""The commit backwards, what is done per token: errors again, the gain, and what reaches the outputs at the
keys and the values.

    errors_kernel    grid (B H, memories, commits C / CT)   e, the unit target and |M(v)|, N in tiles of NT
    gain_kernel      grid (B H, memories)           the step clip forwards and backwards
    targets_kernel   grid (B H, memories, C / CT)   adjoint of e -> adjoints of M(k) and of M(v)

With the sums a2 = |a|^2, d2 = |d|^2, gain' (adjoint of the gain through d) and gain_after_bar (of
gain_after = gain decay_after) of a token, S = f m q and q_t = sum_s eta_s m_s (k_s.k_t)^2:

    gain_bar = gain' + decay_after gain_after_bar        decay_after_bar = gain gain_after_bar
    eta_bar = gain_bar / max(1, S)                       S_bar = -gain_bar gain / S where S > 1
    m_bar = f S_bar q    q_bar = f m S_bar    r_s = sum_t (k_s.k_t)^2 q_bar_t
    m_bar += eta r       eta_bar += m r
    m^2 = a2 + d2 / (e2 + 1e-9) + 1e-12, so with ratio = m_bar / m
    a_bar += ratio a    d_bar += ratio / (e2 + 1e-9) d    e_bar -= ratio d2 / (e2 + 1e-9)^2 e
"""

import triton
import triton.language as tl

from .backward_common import columns, commits_here
from .evaluate import evaluate, evaluate_scalar


@triton.jit(do_not_specialize=["end", "S", "first"])
def errors_kernel(
    in_force, slots, place, errors, end: tl.int64, S: tl.int64, first: tl.int64, grad_scale: tl.float32,
    shape: tl.constexpr, rule: tl.constexpr, clock: tl.constexpr, SMALL: tl.constexpr, CT: tl.constexpr,
    NT: tl.constexpr,
):
    """Of commits C slots apart, the first at ``end``, [commits, B H, ...]: e, target [M, D, C] (a scalar
    memory in its first row); sizes [M, 2, C]: |e|^2, and |M(v)| (1 where a scalar target is not clamped, else 0).
    in_force: weights at the start of every chunk of SMALL slots from number ``first`` on, [chunks, B H,
    ...]."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    MF: tl.constexpr = shape.MF
    MS: tl.constexpr = shape.MS
    M0: tl.constexpr = clock.M0
    C: tl.constexpr = clock.C
    g = tl.program_id(0).to(tl.int64)
    m = M0 + tl.program_id(1)
    b, h = g // H, g % H
    commit = tl.program_id(2) // (C // CT)
    end += commit * C
    if commits_here(place, b, end):
        c = tl.program_id(2) % (C // CT) * CT + tl.arange(0, CT)
        f = tl.arange(0, D)
        gm = (g + commit * tl.num_programs(0)) * (MF + MS) + m
        g += (end // SMALL - 1 - first) * tl.num_programs(0)
        k = columns(slots.k, b, h, end - C + c, S, H, D)
        v = columns(slots.v, b, h, end - C + c, S, H, D)
        if m < MF:
            target = v.to(tl.float32)
            if rule.OWN_VALUES:
                target = evaluate(v, in_force, g, h, m, shape=shape, rule=rule, NT=NT, EARLY=D < 128)
            if rule.TARGET_NORM:
                size = tl.sqrt(tl.sum(target * target, 0))
                target /= tl.maximum(size, 1e-6)[None, :]
                tl.store(errors.sizes + (gm * 2 + 1) * C + c, size)
                tl.store(errors.target + (gm * D + f[:, None]) * C + c[None, :], target)
            e = -target
            # on its own: with v's as columns of one product (errors_task) a tile of 2 CT columns would need
            # 100 KB of shared memory at D = 128, more than sm_86 has
            if not rule.DOT:
                at_k = evaluate(k, in_force, g, h, m, shape=shape, rule=rule, NT=NT, EARLY=D < 128)
                e = grad_scale * (at_k - target)
            tl.store(errors.e + (gm * D + f[:, None]) * C + c[None, :], e)
            tl.store(errors.sizes + gm * 2 * C + c, tl.sum(e * e, 0))
        elif MS > 0:
            target_s = evaluate_scalar(v, in_force, g, h, m, shape=shape, rule=rule, NT=NT)
            if rule.TARGET_NORM:
                tl.store(errors.sizes + (gm * 2 + 1) * C + c, tl.where(tl.abs(target_s) <= 1.0, 1.0, 0.0))
                target_s = tl.minimum(tl.maximum(target_s, -1.0), 1.0)
            es = -target_s
            if not rule.DOT:
                at_key = evaluate_scalar(k, in_force, g, h, m, shape=shape, rule=rule, NT=NT)
                es = grad_scale * (at_key - target_s)
            tl.store(errors.e + gm * D * C + c, es)
            tl.store(errors.sizes + gm * 2 * C + c, es * es)


@triton.jit
def _total(sums_p, which: tl.constexpr, c, TILES: tl.constexpr, C: tl.constexpr):
    total = tl.zeros(c.shape, tl.float32)
    for tile in range(TILES):
        total += tl.load(sums_p + (tile * 6 + which) * C + c)
    return total


@triton.jit
def _gradient_size(sums_p, sizes_p, c, TILES: tl.constexpr, C: tl.constexpr):
    """m_t, as gain.py has it; its one loop over the tiles for both sums would take 8 registers more."""
    a2, d2 = _total(sums_p, 0, c, TILES, C), _total(sums_p, 1, c, TILES, C)
    return tl.sqrt(a2 + d2 / (tl.load(sizes_p + c) + 1e-9) + 1e-12)


@triton.jit(do_not_specialize=["end", "S"])
def gain_kernel(
    eta_p, place, sums_p, sizes_p, gram_p, vectors_p, factors_p, end: tl.int64, S: tl.int64,
    factor: tl.float32, shape: tl.constexpr, clock: tl.constexpr, TILES: tl.constexpr, CLIP: tl.constexpr,
):
    """factors [B H, M, 9, C]: the gain; factors of a, d and e in their adjoints; adjoints of eta, erase and
    decay_after; eta m_t, and the adjoint of q. The last two only with CLIP."""
    H: tl.constexpr = shape.H
    M: tl.constexpr = shape.MF + shape.MS
    M0: tl.constexpr = clock.M0
    C: tl.constexpr = clock.C
    g = tl.program_id(0).to(tl.int64)
    gm = g * M + M0 + tl.program_id(1)
    b, h = g // H, g % H
    if commits_here(place, b, end):
        c = tl.arange(0, C)
        eta_at = (b * S + end - C) * H + h
        sums_p += gm * TILES * 6 * C
        sizes_p += gm * 2 * C
        factors_p += gm * 9 * C
        gram_p += g * C * C
        eta = tl.load(eta_p + eta_at + c * H)
        through_d, through_e = _total(sums_p, 2, c, TILES, C), _total(sums_p, 4, c, TILES, C)
        gain_bar = through_d + tl.load(vectors_p + (g * 3 + 1) * C + c) * through_e
        gain = eta
        eta_bar = gain_bar
        if CLIP:
            size = _gradient_size(sums_p, sizes_p, c, TILES, C)
            q = tl.zeros([C], tl.float32)
            for s0 in range(0, C, 16):
                s = s0 + tl.arange(0, 16)
                eta_size = tl.load(eta_p + eta_at + s * H) * _gradient_size(sums_p, sizes_p, s, TILES, C)
                dots = tl.load(gram_p + s[:, None] * C + c[None, :])
                q += tl.sum(eta_size[:, None] * dots * dots, 0)
            clip = factor * size * q
            gain = eta / tl.maximum(1.0, clip)
            eta_bar = gain_bar / tl.maximum(1.0, clip)
            clip_bar = tl.where(clip > 1.0, -eta_bar * gain, 0.0)
            q_bar = factor * size * clip_bar
            tl.store(factors_p + 7 * C + c, eta * size)
            tl.store(factors_p + 8 * C + c, q_bar)
            tl.debug_barrier()  # the loop reads what other threads have just written
            r = tl.zeros([C], tl.float32)
            for t0 in range(0, C, 16):
                t = t0 + tl.arange(0, 16)
                dots = tl.load(gram_p + t[:, None] * C + c[None, :])
                r += tl.sum(tl.load(factors_p + 8 * C + t)[:, None] * dots * dots, 0)
            eta_bar += size * r
            ratio = (factor * clip_bar * q + eta * r) / size
            inverse = 1.0 / (tl.load(sizes_p + c) + 1e-9)
            tl.store(factors_p + C + c, ratio)
            tl.store(factors_p + 2 * C + c, ratio * inverse)
            tl.store(factors_p + 3 * C + c, -ratio * _total(sums_p, 1, c, TILES, C) * inverse * inverse)
        else:
            for row in tl.static_range(1, 4):
                tl.store(factors_p + row * C + c, tl.zeros([C], tl.float32))
        tl.store(factors_p + c, gain)
        tl.store(factors_p + 4 * C + c, eta_bar)
        tl.store(factors_p + 5 * C + c, _total(sums_p, 3, c, TILES, C))
        tl.store(factors_p + 6 * C + c, gain * through_e)


@triton.jit(do_not_specialize=["end"])
def targets_kernel(
    place, errors, factors_p, parts_p, outputs_bar_p, end: tl.int64, grad_scale: tl.float32,
    shape: tl.constexpr, rule: tl.constexpr, clock: tl.constexpr, CT: tl.constexpr, TILES: tl.constexpr,
):
    """parts [B H, M, TILES, 2, D, C], first half: the adjoint of e, by tiles. outputs_bar [B H, M, 2, D, C]:
    of M(k), and of M(v) (of v without own values). A scalar memory uses the first row."""
    H: tl.constexpr = shape.H
    D: tl.constexpr = shape.D
    MF: tl.constexpr = shape.MF
    MS: tl.constexpr = shape.MS
    M0: tl.constexpr = clock.M0
    C: tl.constexpr = clock.C
    g = tl.program_id(0).to(tl.int64)
    m = M0 + tl.program_id(1)
    if commits_here(place, g // H, end):
        c = tl.program_id(2) * CT + tl.arange(0, CT)
        gm = g * (MF + MS) + m
        along = tl.load(factors_p + (gm * 9 + 3) * C + c)
        size = tl.full([CT], 1.0, tl.float32)
        if rule.TARGET_NORM:
            size = tl.load(errors.sizes + (gm * 2 + 1) * C + c)
        scale = 1.0 if rule.DOT else grad_scale
        if m < MF:
            f = tl.arange(0, D)
            at = f[:, None] * C + c[None, :]
            e_bar = along[None, :] * tl.load(errors.e + gm * D * C + at)
            for tile in range(TILES):
                e_bar += tl.load(parts_p + (gm * TILES + tile) * 2 * D * C + at)
            e_bar *= scale
            target_bar = -e_bar
            if rule.TARGET_NORM:
                target = tl.load(errors.target + gm * D * C + at)
                radial = tl.where(size > 1e-6, tl.sum(target * target_bar, 0), 0.0)
                target_bar = (target_bar - radial[None, :] * target) / tl.maximum(size, 1e-6)[None, :]
            if rule.DOT:
                e_bar = tl.zeros([D, CT], tl.float32)
            tl.store(outputs_bar_p + gm * 2 * D * C + at, e_bar)
            tl.store(outputs_bar_p + (gm * 2 + 1) * D * C + at, target_bar)
        elif MS > 0:
            es_bar = along * tl.load(errors.e + gm * D * C + c)
            for tile in range(TILES):
                es_bar += tl.load(parts_p + (gm * TILES + tile) * 2 * D * C + c)
            es_bar *= scale
            tl.store(outputs_bar_p + (gm * 2 + 1) * D * C + c, -es_bar * size)
            tl.store(outputs_bar_p + gm * 2 * D * C + c, tl.zeros([CT], tl.float32) if rule.DOT else es_bar)
