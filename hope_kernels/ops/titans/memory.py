"""One chunk of test-time memory in closed form: reads, and the write of C tokens at once (Nested Learning eq 86-93).

Notation, per (row, head) g: K, V [C, D]; eta, alpha, beta [C]; z = K w2^T, a = sigma(z), e the error at the output, d the error at
the hidden layer. With R[t,s] = prod_{s<j<=t} alpha_j, B likewise for beta, and D = R (momentum off) or D = R B (on):

    delta2_C = R[C,0] delta2 - c_C s2 - (diag(R[t-1,0]) K delta2^T - diag(c_{t-1}) K s2^T)^T Kt - (gain d)^T Kg
    delta1_C = R[C,0] delta1 - c_C s1 - (gain D[C,.] e)^T a
    Kt = (I + L)^-T diag(eta R[C,.]) K        L[t,s] = R[t-1,s] eta_s k_t.k_s        for s < t
    Kg = diag(D[C,.]) K - W^T Kt              W[t,s] = D[t-1,s] k_t.k_s              for s < t

The triangular solve is applied to the C keys, not to the R = 5N columns of d: since U = T rhs enters only as U^T K = rhs^T (T^T K),
one [C, D] solve per head and clock serves every memory. ops/titans/README.md derives it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import TitansConfig
from .fast_weights import FastWeights, Layout

EPS_NORM = 1e-6


def l2norm(x: Tensor) -> Tensor:
    """x / max(|x|_2, 1e-6) over the last dimension."""
    return F.normalize(x, dim=-1, eps=EPS_NORM)


def activate(z: Tensor, name: str) -> Tensor:
    if name == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")


def activate_backward(grad: Tensor, z: Tensor, name: str) -> Tensor:
    """grad * sigma'(z), differentiable in both."""
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, z)
    return torch.ops.aten.gelu_backward(grad, z, approximate="tanh" if name == "gelu_tanh" else "none")


def gemm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with operands rounded to ``dtype`` and fp32 (fp64) accumulation; a and b are fp32 (fp64)."""
    if dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return (a.to(dtype) @ b.to(dtype)).float()
    return a.to(dtype).float() @ b.to(dtype).float()


class Read(NamedTuple):
    """full [G, Mf, C, D] and scalar [G, C, Ms]: outputs; z [G, C, hidden_rows], a [G, C, M, N]: kept for the write."""

    full: Tensor | None
    scalar: Tensor | None
    z: Tensor | None
    a: Tensor | None


def read(x: Tensor, w: FastWeights, layout: Layout, activation: str, dtype: torch.dtype) -> Read:
    """M(x) for every memory of ``layout``: x [G, C, D], w with leading dimension G."""
    G, C, D = x.shape
    Mf, Ms = len(layout.full), len(layout.scalars)
    rows = gemm(x, w.w2.mT, dtype)
    if not layout.mlp:
        full = rows[..., : Mf * D].unflatten(-1, (Mf, D)).transpose(1, 2) if Mf else None
        return Read(full, rows[..., Mf * D :] if Ms else None, None, None)
    z = rows[..., : layout.hidden_rows]
    a = activate(z, activation).unflatten(-1, (Mf + Ms, layout.N))
    full = scalar = None
    if Mf:
        full = gemm(a[:, :, :Mf].transpose(1, 2), w.w1.mT, dtype) + x.unsqueeze(1)
    if Ms:
        scalar = (a[:, :, Mf:] * w.w1s.unsqueeze(1)).sum(-1)
        if layout.skip:
            scalar = scalar + rows[..., layout.hidden_rows :]
    return Read(full, scalar, z, a)


def products(x: Tensor) -> Tensor:
    """P[t, s] = prod_{s<j<=t} x_j for 0 <= s <= t <= C, zero above the diagonal: [G, C] -> [G, C+1, C+1]."""
    C = x.shape[-1]
    t = torch.arange(1, C + 1, device=x.device).unsqueeze(1)
    s = torch.arange(C + 1, device=x.device)
    body = torch.where(t > s, x.unsqueeze(-1), 1.0).cumprod(-2) * (t >= s)
    first = torch.zeros_like(body[:, :1])
    first[..., 0] = 1
    return torch.cat([first, body], 1)


class Clock(NamedTuple):
    """What one clock's chunk has in common for all its memories; [G, C] or [G, C, D] unless said otherwise."""

    keys: Tensor
    gram2: Tensor | None  # (k_t.k_s)^2 [G, C, C], for the step clip
    eta: Tensor
    gamma_end: Tensor  # gamma_C [G]
    gamma_prev: Tensor  # gamma_{t-1}
    step_end: Tensor  # D[C, t]
    Kt: Tensor | None  # None without DGD
    Kg: Tensor
    c_end: Tensor | None  # c_C [G]; this and the rest only with momentum
    c_prev: Tensor | None  # c_{t-1}
    beta_end: Tensor | None  # B_C [G]
    beta_tail: Tensor | None  # B_C / B_t
    gain_one: bool  # the step size is already in D (momentum with the step outside)


def clock_terms(config: TitansConfig, k: Tensor, eta: Tensor, alpha: Tensor | None, beta: Tensor | None, eta_outside=False) -> Clock:
    """Decays and transformed keys of one chunk. k [G, C, D]; eta, alpha, beta [G, C] in the master dtype, alpha None means 1.

    ``eta_outside``: momentum s = beta s + g, w = ... - eta s (the nested-learning package), not s = beta s + eta g (Titans eq 9-10).
    """
    R = products(torch.ones_like(eta) if alpha is None else alpha)
    tail = R[:, -1, 1:]
    D, c_end, c_prev, beta_end, beta_tail = R, None, None, None, None
    if beta is not None:
        B = products(beta)
        beta_end, beta_tail = B[:, -1, 0], B[:, -1, 1:]
        on = torch.ones_like(R[:, :, :1]) if not eta_outside else torch.cat([torch.ones_like(eta[:, :1]), eta], 1).unsqueeze(-1)
        start = torch.zeros_like(B)
        start[:, 0, 0] = 1
        D = R @ (on * (B - start))
        c_end, c_prev = D[:, -1, 0], D[:, :-1, 0]
    step_end = D[:, -1, 1:]
    gram = k @ k.mT
    Kt, Kg = None, step_end.unsqueeze(-1) * k
    if config.dgd:
        lower = gram.tril(-1)
        L = R[:, :-1, 1:] * eta.unsqueeze(1) * lower
        Kt = torch.linalg.solve_triangular(L.mT, (eta * tail).unsqueeze(-1) * k, upper=True, unitriangular=True)
        Kg = Kg - (D[:, :-1, 1:] * lower).mT @ Kt
    gram2 = gram * gram if config.step_clip else None
    return Clock(k, gram2, eta, R[:, -1, 0], R[:, :-1, 0], step_end, Kt, Kg, c_end, c_prev, beta_end, beta_tail, eta_outside)


class Errors(NamedTuple):
    """full [G, Mf, C, D], scalar [G, C, Ms]: e; hidden [G, C, M, N]: d; squared norms of e, a, d [G, C, M]."""

    full: Tensor | None
    scalar: Tensor | None
    hidden: Tensor | None
    a: Tensor | None


def errors(config: TitansConfig, layout: Layout, w: FastWeights, k: Tensor, v: Tensor, dtype: torch.dtype) -> Errors:
    """The inner gradient's factors at the chunk-start weights w, for all tokens: e_t at the outputs, d_t at the hidden layer."""
    C = k.shape[1]
    # without own values only the scalar memories read v
    read_v = config.own_values or bool(layout.scalars)
    both = read(torch.cat([k, v], 1) if read_v else k, w, layout, config.activation, dtype)
    full = scalar = None
    if layout.full:
        target = both.full[:, :, C:] if config.own_values else v.unsqueeze(1)
        target = l2norm(target) if config.target_norm else target
        full = both.full[:, :, :C] - target if config.objective == "l2" else -target.expand_as(both.full[:, :, :C])
    if layout.scalars:
        target = both.scalar[:, C:]
        target = target.clamp(-1, 1) if config.target_norm else target
        scalar = both.scalar[:, :C] - target if config.objective == "l2" else -target
    if config.objective == "l2" and config.grad_scale != 1:
        full = None if full is None else config.grad_scale * full
        scalar = None if scalar is None else config.grad_scale * scalar
    if not layout.mlp:
        return Errors(full, scalar, None, None)
    parts = []
    if layout.full:
        parts.append(gemm(full, w.w1, dtype).transpose(1, 2))
    if layout.scalars:
        parts.append(scalar.unsqueeze(-1) * w.w1s.unsqueeze(1))
    back = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
    z = both.z[:, :C].unflatten(-1, (len(layout.names), layout.N))
    return Errors(full, scalar, activate_backward(back, z, config.activation), both.a[:, :C])


def step_sizes(config: TitansConfig, layout: Layout, clock: Clock, err: Errors) -> tuple[Tensor, Tensor | None]:
    """eta~ [G, C, M] and S [G, C, M] (None without step_clip): the step that a chunk repeating its keys can bear."""
    M = len(layout.names)
    if not config.step_clip:
        return clock.eta.unsqueeze(-1).expand(-1, -1, M), None
    if layout.mlp:
        e2 = [] if err.full is None else [err.full.square().sum(-1).transpose(1, 2)]
        e2 += [] if err.scalar is None else [err.scalar.square()]
        m2 = err.a.square().sum(-1) + err.hidden.square().sum(-1) / (torch.cat(e2, -1) + 1e-9) + 1e-12
    else:
        m2 = (clock.keys.square().sum(-1, keepdim=True) + 1e-12).expand(-1, -1, M)
    m = m2.sqrt()
    c = config.grad_scale if config.objective == "l2" else 1.0
    S = c * m * (clock.gram2 @ (clock.eta.unsqueeze(-1) * m))
    return clock.eta.unsqueeze(-1) / S.clamp_min(1.0), S


def write(
    config: TitansConfig, layout: Layout, w: FastWeights, delta: FastWeights, s: FastWeights | None,
    clock: Clock, v: Tensor, dtype: torch.dtype, clip: list | None = None,
) -> tuple[FastWeights, FastWeights | None]:
    """Commits one full chunk: new deviations and momentum of the memories of ``layout``. w: the chunk-start weights, [G, ...].

    ``clip`` collects S [G, C, M] of the step clip.
    """
    k, Mf = clock.keys, len(layout.full)
    err = errors(config, layout, w, k, v, dtype)
    gain, S = step_sizes(config, layout, clock, err)
    if clock.gain_one:
        gain = torch.ones_like(gain)
    if clip is not None and S is not None:
        clip.append(S)
    if layout.mlp:
        pieces = [(gain.unsqueeze(-1) * err.hidden).flatten(2)]
        if layout.skip and layout.scalars:
            pieces.append(gain[..., Mf:] * err.scalar)
    else:
        pieces = []
        if layout.full:
            pieces.append((gain[..., :Mf].transpose(1, 2).unsqueeze(-1) * err.full).transpose(1, 2).flatten(2))
        if layout.scalars:
            pieces.append(gain[..., Mf:] * err.scalar)
    grad2 = torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]

    left, right = [grad2], [clock.Kg]
    if config.dgd:
        memory = clock.gamma_prev.unsqueeze(-1) * gemm(k, delta.w2.mT, dtype)
        if s is not None:
            memory = memory - clock.c_prev.unsqueeze(-1) * gemm(k, s.w2.mT, dtype)
        left.append(memory)
        right.append(clock.Kt)
    change2 = gemm(torch.cat(left, 1).mT, torch.cat(right, 1), dtype)
    step1 = gain * clock.step_end.unsqueeze(-1)
    change1, change1s = _outer_changes(layout, step1, err, dtype)
    changes = FastWeights(change2, change1, change1s)

    def decayed(old: Tensor, change: Tensor, *momentum: Tensor) -> Tensor:
        new = _row(clock.gamma_end, old) * old - change
        return new - _row(clock.c_end, old) * momentum[0] if momentum else new

    if s is None:
        return delta.map(decayed, changes), None
    tail = clock.beta_tail.unsqueeze(-1)
    push1, push1s = _outer_changes(layout, gain * tail, err, dtype)
    pushes = FastWeights(gemm((tail * grad2).mT, k, dtype), push1, push1s)
    return delta.map(decayed, changes, s), s.map(lambda old, push: _row(clock.beta_end, old) * old + push, pushes)


def _row(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.dim() - 1))


def _outer_changes(layout: Layout, step: Tensor, err: Errors, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """sum_t step_t e_t a_t^T for w1 [G, Mf, D, N] and w1s [G, Ms, N]; step [G, C, M]."""
    if not layout.mlp:
        return None, None
    Mf = len(layout.full)
    full = scalar = None
    if layout.full:
        scaled = step[..., :Mf].transpose(1, 2).unsqueeze(-1) * err.full
        full = gemm(scaled.mT, err.a[:, :, :Mf].transpose(1, 2), dtype)
    if layout.scalars:
        scalar = torch.einsum("gcm,gcmn->gmn", step[..., Mf:] * err.scalar, err.a[:, :, Mf:])
    return full, scalar
