"""One chunk of the self-modifying memory in closed form, on one page: one (row, head), the default rule.

``commit.py`` and ``scan.py`` compute the same with every switch, for all rows and heads at once; README.md
derives it and names the quantities. Source: Nested Learning eq 83-93.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Memory(NamedTuple):
    """w2 [N, D], w1 [O, N]: M(x) = x + w1 sigma(w2 x) with O = D outputs, w1 sigma(w2 x) with one."""

    w2: Tensor
    w1: Tensor


def evaluate(w: Memory, x: Tensor) -> Tensor:
    """M(x) for tokens x [C, D]: [C, O]."""
    y = F.gelu(x @ w.w2.T, approximate="tanh") @ w.w1.T
    return y if len(w.w1) == 1 else x + y


def decays(alpha: Tensor) -> Tensor:
    """gamma[t, s] = prod_{s<j<=t} alpha_j for t, s = 0 .. C; zero where s > t."""
    C = len(alpha)
    t, s = torch.arange(C + 1).unsqueeze(1), torch.arange(C + 1)
    factors = torch.where(t > s, torch.cat([alpha.new_ones(1), alpha]).unsqueeze(1), 1.0)
    return factors.cumprod(0) * (t >= s)


def chunk(
    base: dict[str, Memory], delta: dict[str, Memory], x: Tensor, q: Tensor, eta_bias: float, alpha_bias: float,
    eta_scale: float = 0.5,
) -> tuple[Tensor, dict[str, Memory]]:
    """Reads C tokens x, q [C, D] and writes them: (o [C, D], the new deviations).

    base, delta: initial weights and deviations of "memory", "k", "v", "eta" and "alpha".
    """
    w = {m: Memory(base[m].w2 + delta[m].w2, base[m].w1 + delta[m].w1) for m in base}
    C = len(x)

    # read, every memory as it was at the start of the chunk
    k, v = F.normalize(evaluate(w["k"], x), dim=-1, eps=1e-6), evaluate(w["v"], x)
    eta = eta_scale * torch.sigmoid(evaluate(w["eta"], x)[:, 0] + eta_bias)
    alpha = torch.sigmoid(evaluate(w["alpha"], x)[:, 0] + alpha_bias)
    o = evaluate(w["memory"], q)

    # what all memories share: decays, and the keys Kg by back substitution, (I + L)^T Kg = diag(decay_after) K
    gamma, gram = decays(alpha), k @ k.T
    decay_before, decay_after, decay_chunk = gamma[:C, 0], gamma[C, 1:], gamma[C, 0]
    L = eta[:, None] * gamma[:C, 1:] * gram.tril(-1)
    Kg = torch.linalg.solve_triangular(L.T, decay_after[:, None] * k, upper=True, unitriangular=True)
    erase = eta * decay_before

    # write, each memory towards the target that it sets itself
    new = {}
    for m, (w2, w1) in w.items():
        z = k @ w2.T
        a = F.gelu(z, approximate="tanh")
        slope = torch.ops.aten.gelu_backward(torch.ones_like(z), z, approximate="tanh")
        target = evaluate(w[m], v)
        target = target.clamp(-1, 1) if len(w1) == 1 else F.normalize(target, dim=-1, eps=1e-6)
        e = evaluate(w[m], k) - target
        d = slope * (e @ w1)
        a2, d2, e2 = (t.square().sum(-1) for t in (a, d, e))
        size = (a2 + d2 / (e2 + 1e-9) + 1e-12).sqrt()
        clip = size * (gram.square() @ (eta * size))
        gain = eta / clip.clamp_min(1)
        u = gain[:, None] * d + erase[:, None] * (k @ delta[m].w2.T)
        delta2 = decay_chunk * delta[m].w2 - u.T @ Kg
        delta1 = decay_chunk * delta[m].w1 - ((gain * decay_after)[:, None] * e).T @ a
        new[m] = Memory(delta2, delta1)
    return o, new
