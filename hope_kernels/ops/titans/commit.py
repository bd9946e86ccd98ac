"""The write of a chunk of C tokens at once, with every switch of the rule (Nested Learning eq 86-93).

Notation, per (row, head) g: K, V [C, D]; eta, alpha, beta [C]; z = K w2^T, a = sigma(z), e the error at the
output, d the error at the hidden layer. With gamma[t,s] = prod_{s<j<=t} alpha_j, B likewise for beta, and A = gamma
(momentum off) or A = gamma B (on):

    delta2_C = gamma[C,0] delta2 - c_C s2 - (K delta2^T)^T Kt - (K s2^T)^T Ks - (gain d)^T Kg
    delta1_C = gamma[C,0] delta1 - c_C s1 - (gain A[C,.] e)^T a
    X  = (I + L')^-T diag(eta gamma[C,.]) K       L'[t,s] = gamma[t-1,s] eta_s k_t.k_s       for s < t
    Kt = diag(gamma[t-1,0]) X,  Ks = -diag(c_{t-1}) X
    Kg = diag(A[C,.]) K - W^T X               W[t,s] = A[t-1,s] k_t.k_s              for s < t

The triangular solve is applied to the C keys, not to the R = 5N columns of d: since U = T rhs enters only as
U^T K = rhs^T (T^T K), one [C, D] solve per head and clock serves every memory. Without momentum Kt = diag(eta
gamma[t-1,0]) Kg, and the update has rank C:

    delta2_C = gamma[C,0] delta2 - (gain d + delta2 K^T diag(eta gamma[t-1,0]))^T Kg
    Kg = (I + L)^-T diag(gamma[C,.]) K      L[t,s] = eta_t gamma[t-1,s] k_t.k_s

README.md derives it.

Tokens are columns (evaluate.py), so every weight update is (rows, C) times (C, columns). One chunk of one head
is small: on a CPU the number of operator calls is much of the cost, and the code spends none that a view saves.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import TitansConfig
from ..unit.forward import l2norm
from .evaluate import activate_backward, add_gemm, gemm, read
from .state import FastWeights, Layout, MaybeTensor


@lru_cache(maxsize=64)
def _triangles(C: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """For t = 1..C, s = 0..C: (t > s), (t >= s) as numbers; and the row of t = 0, (s == 0)."""
    with torch.inference_mode(False):
        t, s = torch.arange(1, C + 1, device=device).unsqueeze(1), torch.arange(C + 1, device=device)
        return t > s, (t >= s).to(dtype), (s == 0).to(dtype).view(1, 1, -1)


@lru_cache(maxsize=64)
def _strictly_lower(C: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(C, C, device=device, dtype=dtype).tril(-1)


def products(x: Tensor) -> Tensor:
    """P[t, s] = prod_{s<j<=t} x_j for 0 <= s <= t <= C, zero above the diagonal: [G, C] -> [G, C+1, C+1]."""
    after, kept, first = _triangles(x.shape[1], x.device, x.dtype)
    body = torch.where(after, x.unsqueeze(-1), 1.0).cumprod(-2) * kept
    return torch.cat([first.expand(x.shape[0], -1, -1), body], 1)


class Shared(NamedTuple):
    """What all memories of one clock share in a chunk; [G, C] or [G, C, D] unless said otherwise."""

    k: Tensor
    eta: Tensor
    gram2: MaybeTensor  # (k_t.k_s)^2 [G, C, C], for the step clip
    decay_chunk: Tensor  # gamma[C,0] [G, 1, 1]
    arrival_after: Tensor  # A[C,t]; without momentum decay_after, gamma[C,t]
    decay_before: MaybeTensor  # gamma[t-1,0], with DGD and without momentum: delta2 k joins d, at the keys Kg
    Kt: MaybeTensor  # with DGD and momentum, where what is erased has keys of its own
    Ks: MaybeTensor  # None without DGD or momentum
    Kg: Tensor
    c_chunk: MaybeTensor  # c_C [G, 1, 1]; this and the rest only with momentum
    beta_chunk: MaybeTensor  # B[C,0] [G, 1, 1]
    beta_after: MaybeTensor  # B[C,t]
    unit_gain: bool  # the step size is already in A (momentum with the step outside)


def shared_terms(
    config: TitansConfig, k: Tensor, eta: Tensor, alpha: Tensor | None, beta: Tensor | None, eta_outside=False
) -> Shared:
    """Decays and transformed keys of one chunk. k [G, C, D]; eta, alpha, beta [G, C] in the master dtype,
    alpha None means 1.

    ``eta_outside``: momentum s = beta s + g, w = ... - eta s (the nested-learning package), not s = beta s +
    eta g (Titans eq 9-10).
    """
    C = k.shape[1]
    gamma = products(torch.ones_like(eta) if alpha is None else alpha)
    arrival, c_chunk, beta_chunk, beta_after = gamma, None, None, None
    if beta is not None:
        B = products(beta)
        beta_chunk, beta_after = B[:, C:, :1], B[:, C, 1:]
        # c_t sums over i >= 1 only: the entry (0, 0) of B does not take part
        B = torch.cat([torch.zeros_like(B[:, :1]), B[:, 1:] * eta.unsqueeze(-1) if eta_outside else B[:, 1:]], 1)
        arrival = gamma @ B
        c_chunk = arrival[:, C:, :1]
    arrival_after = arrival[:, C, 1:]
    gram = k @ k.mT
    decay_before = Kt = Ks = None
    Kg = arrival_after.unsqueeze(-1) * k
    if config.dgd:
        lower = gram * _strictly_lower(C, k.device, k.dtype)
        if beta is None:
            decay_before = gamma[:, :C, 0]
            L = gamma[:, :C, 1:] * lower * eta.unsqueeze(-1)
            Kg = torch.linalg.solve_triangular(L.mT, Kg, upper=True, unitriangular=True)
        else:
            L = gamma[:, :C, 1:] * lower * eta.unsqueeze(1)
            scaled = (eta * gamma[:, C, 1:]).unsqueeze(-1) * k
            X = torch.linalg.solve_triangular(L.mT, scaled, upper=True, unitriangular=True)
            Kg = torch.baddbmm(Kg, (arrival[:, :C, 1:] * lower).mT, X, alpha=-1)
            Kt = gamma[:, :C, :1] * X
            Ks = -arrival[:, :C, :1] * X
    gram2 = gram * gram if config.step_clip else None
    return Shared(
        k, eta, gram2, gamma[:, C:, :1], arrival_after, decay_before, Kt, Ks, Kg, c_chunk, beta_chunk, beta_after,
        eta_outside and beta is not None
    )


class Errors(NamedTuple):
    """At the chunk-start weights, without the factor c: full [G, Mf, D, C], scalar [G, Ms, C]: e; hidden [G,
    M*N, C]: d; a [G, M*N, C] and rows [G, R, C]: activations and w2 k at the keys."""

    full: MaybeTensor
    scalar: MaybeTensor
    hidden: MaybeTensor
    a: MaybeTensor
    rows: Tensor


def errors(
    config: TitansConfig, layout: Layout, w: FastWeights, k: Tensor, v: Tensor, dtype: torch.dtype
) -> Errors:
    """The inner gradient's factors for all tokens: e_t at the outputs, d_t at the hidden layer. k, v [G, D, C]."""
    G, D, C = k.shape
    Mf, Ms, N = len(layout.full), len(layout.scalars), layout.N
    # without own values only the scalar memories read v
    read_v = config.own_values or Ms > 0
    both = read(torch.cat([k, v], -1) if read_v else k, w, layout, config.activation, dtype)
    l2 = config.objective == "l2"
    full = scalar = None
    if Mf:
        target = both.full[..., C:] if config.own_values else v.unsqueeze(1)
        target = l2norm(target, -2) if config.target_norm else target
        full = both.full[..., :C] - target if l2 else (-target).expand(G, Mf, D, C)
    if Ms:
        target = both.scalar[..., C:]
        target = target.clamp(-1, 1) if config.target_norm else target
        scalar = both.scalar[..., :C] - target if l2 else -target
    rows = both.rows[..., :C]
    if not layout.mlp:
        return Errors(full, scalar, None, None, rows)
    parts = []
    if full is not None:
        parts.append(gemm(w.w1.flatten(0, 1).mT, full.reshape(G * Mf, D, C), dtype).view(G, Mf * N, C))
    if scalar is not None:
        parts.append((w.w1s.unsqueeze(-1) * scalar.unsqueeze(2)).flatten(1, 2))
    back = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    a, gate = both.a[..., :C], None if both.gate is None else both.gate[..., :C]
    return Errors(
        full, scalar, activate_backward(back, rows[:, : layout.hidden_rows], config.activation, a, gate), a, rows
    )


def step_sizes(config: TitansConfig, layout: Layout, shared: Shared, err: Errors) -> tuple[Tensor, Tensor]:
    """The gain eta~ and the clip S, both [G, M, C]: the step that a chunk repeating its keys can bear."""
    M, N = len(layout.names), layout.N
    c = config.grad_scale if config.objective == "l2" else 1.0
    if layout.mlp:
        e2 = [] if err.full is None else [err.full.square().sum(2)]
        e2 += [] if err.scalar is None else [err.scalar.square()]
        # |c d|^2 / (|c e|^2 + 1e-9), with c divided out
        ratio = err.hidden.square().unflatten(1, (M, N)).sum(2) / (torch.cat(e2, 1) + 1e-9 / c**2)
        size2 = err.a.square().unflatten(1, (M, N)).sum(2) + ratio + 1e-12
    else:
        size2 = (shared.k.square().sum(-1).unsqueeze(1) + 1e-12).expand(-1, M, -1)
    # a square may overflow: 0 inf would be NaN where eta is 0
    size = size2.sqrt().clamp_max(torch.finfo(size2.dtype).max ** 0.75)
    eta = shared.eta.unsqueeze(1)
    clip = size * ((eta * size) @ shared.gram2)
    clip = clip if c == 1 else c * clip
    return eta / clip.clamp_min(1.0), clip


def write(
    config: TitansConfig, layout: Layout, w: FastWeights, delta: FastWeights, s: FastWeights | None,
    shared: Shared, v: Tensor, dtype: torch.dtype, clips: list | None = None, in_place: bool = False,
) -> tuple[FastWeights, FastWeights | None]:
    """Commits one full chunk: new deviations and momentum of the memories of ``layout``.

    w: the chunk-start weights, [G, ...]; v [G, C, D]. ``clips`` collects S [G, M, C] of the step clip.
    ``in_place`` writes the result over ``delta`` and ``s`` (never under a graph).
    """
    scale = torch.Tensor.mul_ if in_place else torch.mul
    columns = shared.k.mT
    err = errors(config, layout, w, columns, v.mT, dtype)
    c = config.grad_scale if config.objective == "l2" else 1.0
    keys, gain = shared.Kg, None  # gain [G, M, C], or None: one step for all memories, put on the keys
    common = None if shared.unit_gain else shared.eta if c == 1 else c * shared.eta
    if config.step_clip:
        gain, clip = step_sizes(config, layout, shared, err)
        gain = c * gain if c != 1 else gain
        if clips is not None:
            clips.append(clip)
    elif common is not None:
        keys = common.unsqueeze(-1) * keys
    elif c != 1:
        keys = c * keys
    gradient = _row_gradients(layout, err, gain)
    u = gradient
    if config.dgd:
        # w2 k is the pre-activation already at hand when the weights are the deviations
        erased = err.rows if config.retain_to == "zero" else gemm(delta.w2, columns, dtype)
        if s is None:
            # the keys hold the step size where no gain does
            erase = shared.decay_before * shared.eta if gain is not None else shared.decay_before / c
            u = torch.addcmul(gradient, erased, erase.unsqueeze(1))
        else:
            u = torch.cat([gradient, erased, gemm(s.w2, columns, dtype)], -1)
            keys = torch.cat([keys, shared.Kt, shared.Ks], 1)
    w2 = add_gemm(scale(delta.w2, shared.decay_chunk), u, keys, dtype, -1)
    if s is not None:
        w2 = w2.sub_(shared.c_chunk * s.w2)

    def outer(old: FastWeights, decay: Tensor, step: Tensor, sign: int) -> tuple[Tensor | None, Tensor | None]:
        return _outer_updates(layout, old, decay, _steps(step, gain, common, c), err, dtype, sign, scale)

    w1, w1s = outer(delta, shared.decay_chunk, shared.arrival_after, -1)
    if s is None:
        return FastWeights(w2, w1, w1s), None
    w1 = None if w1 is None else w1.sub_(shared.c_chunk.unsqueeze(-1) * s.w1)
    w1s = None if w1s is None else w1s.sub_(shared.c_chunk * s.w1s)
    kept = shared.beta_after.unsqueeze(-1) * shared.k
    kept = kept if gain is not None else kept * (c if common is None else common.unsqueeze(-1))
    s2 = add_gemm(scale(s.w2, shared.beta_chunk), gradient, kept, dtype)
    return FastWeights(w2, w1, w1s), FastWeights(s2, *outer(s, shared.beta_chunk, shared.beta_after, 1))


def _steps(step: Tensor, gain: Tensor | None, common: Tensor | None, c: float) -> Tensor:
    """Step of each token for the output side: [G, M, C], or [G, 1, C] when it is the same for all
    memories."""
    if gain is not None:
        return gain * step.unsqueeze(1)
    step = c * step if common is None else step * common
    return step.unsqueeze(1)


def _row_gradients(layout: Layout, err: Errors, gain: Tensor | None) -> Tensor:
    """The gradient at every row of w2, [G, R, C], times the memory's own gain if there is one."""
    Mf, M = len(layout.full), len(layout.names)
    scalar = err.scalar if gain is None or err.scalar is None else gain[:, Mf:] * err.scalar
    if layout.mlp:
        hidden = err.hidden
        if gain is not None:
            hidden = (hidden.unflatten(1, (M, layout.N)) * gain.unsqueeze(2)).flatten(1, 2)
        return torch.cat([hidden, scalar], 1) if layout.skip and scalar is not None else hidden
    full = err.full if gain is None or err.full is None else gain[:, :Mf].unsqueeze(2) * err.full
    parts = ([] if full is None else [full.flatten(1, 2)]) + ([] if scalar is None else [scalar])
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _outer_updates(
    layout: Layout, old: FastWeights, decay: Tensor, step: Tensor, err: Errors, dtype: torch.dtype, sign: int, scale
) -> tuple[Tensor | None, Tensor | None]:
    """decay * old + sign * sum_t step_t e_t a_t^T for w1 [G, Mf, D, N] and w1s [G, Ms, N]; step [G, M or 1,
    C], decay [G, 1, 1]; ``scale`` is mul, or mul_ to write over ``old``."""
    if not layout.mlp:
        return None, None
    G, _, C = err.a.shape
    Mf, Ms, N = len(layout.full), len(layout.scalars), layout.N
    each = step.shape[1] > 1
    full = scalar = None
    if Mf:
        scaled = ((step[:, :Mf] if each else step).unsqueeze(2) * err.full).flatten(0, 1)
        base = scale(old.w1, decay.unsqueeze(-1)).flatten(0, 1)
        full = add_gemm(base, scaled, err.a[:, : Mf * N].reshape(G * Mf, N, C).mT, dtype, sign).view_as(old.w1)
    if Ms:
        scaled = ((step[:, Mf:] if each else step) * err.scalar).reshape(G * Ms, 1, C)
        base = scale(old.w1s, decay).view(G * Ms, 1, N)
        scalar = base.baddbmm_(scaled, err.a[:, Mf * N :].reshape(G * Ms, N, C).mT, alpha=sign).view(G, Ms, N)
    return full, scalar
