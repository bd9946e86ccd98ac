"""Memories that commit together, and their two writes: the package's default, whose targets are constants,
and the one whose gradient passes through the targets as well."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import TitansConfig
from ...ops.titans.commit import products, shared_terms, write
from ...ops.titans.state import FastWeights, Layout
from .evaluate import evaluate


class Group:
    """Memories that share a clock, stacked, and the tokens of their open chunk. w, and the momentum s, are
    written over."""

    def __init__(
        self, config: TitansConfig, layout: Layout, w: FastWeights, s: FastWeights | None, chunk: int
    ):
        self.config, self.layout, self.w, self.s, self.chunk = config, layout, w, s, chunk
        self.dtype = w.w2.dtype
        self.waiting: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def commit(self, constant_targets: bool) -> None:
        def joined(parts: list[Tensor]) -> Tensor:
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

        waiting, self.waiting, momentum = self.waiting, [], self.config.momentum
        k, v, eta = joined([p[0] for p in waiting]), joined([p[1] for p in waiting]), joined([p[2] for p in waiting])
        alphas = [p[3] for p in waiting if p[3] is not None]
        alpha = joined(alphas) if alphas else None
        beta = torch.full_like(eta, momentum) if isinstance(momentum, float) else None
        if not constant_targets:
            return self._commit_both_sides(k, v, eta, alpha, beta)
        shared = shared_terms(self.config, k, eta, alpha, beta, eta_outside=True)
        self.w, self.s = write(
            self.config, self.layout, self.w, self.w, self.s, shared, v, self.dtype, in_place=True
        )

    def _commit_both_sides(
        self, k: Tensor, v: Tensor, eta: Tensor, alpha: Tensor | None, beta: Tensor | None
    ) -> None:
        """The write whose gradient passes through the target M(v) too. k, v [B, C, dim]; eta, alpha, beta [B, C].

        A token's gradient is e a(k)^T + f a(v)^T at w1 and d k^T + h v^T at w2 and w_skip: 2C outer products
        under C decays. arrival[t,s]: the share of token s's gradient, times its step, that is in the weights
        after token t. The keys k and v of those products meet the later tokens' erasure as

            Yg = diag(arrival[C,.]) Y - W^T X      W[t,s] = arrival[t-1,s] k_t.y_s   for s < t,  y = k or v
        """
        C, l2 = k.shape[1], self.config.objective == "l2"
        gamma = products(torch.ones_like(eta) if alpha is None else alpha)
        arrival, decay_chunk, y = gamma[:, :, 1:] * eta.unsqueeze(1), gamma[:, C:, :1], torch.cat([k, v], 1)
        if beta is not None:
            B = products(beta)
            beta_chunk, beta_after = B[:, C:, :1], B[:, C, 1:].repeat(1, 2).unsqueeze(1)
            arrival = gamma[:, :, 1:] @ (B[:, 1:] * eta.unsqueeze(-1))
            arrival, c = arrival[:, :, 1:], arrival[:, :, :1]
        step = arrival[:, C:].repeat(1, 1, 2)
        y_g = step.mT * y
        if self.config.dgd:
            earlier = torch.ones(C, C, dtype=k.dtype, device=k.device).tril(-1).unsqueeze(1)
            gram = (k @ y.mT).unflatten(-1, (2, C)) * earlier
            L = gamma[:, :C, 1:] * gram[:, :, 0] * eta.unsqueeze(1)
            steps = (eta * gamma[:, C, 1:]).unsqueeze(-1) * k
            X = torch.linalg.solve_triangular(L.mT, steps, upper=True, unitriangular=True)
            y_g = y_g - (gram * arrival[:, :C].unsqueeze(2)).flatten(2).mT @ X
        for name in self.layout.names:
            w = self.layout.views(self.w, name)
            s = {} if self.s is None else self.layout.views(self.s, name)
            z = w["w2"] @ y.mT
            a = F.gelu(z)
            at_k, at_v = evaluate(y, w["w1"], w["w2"], w.get("w_skip")).mT.chunk(2, -1)
            e = 2 * torch.cat([at_k - at_v, at_v - at_k], -1) if l2 else -torch.cat([at_v, at_k], -1)
            h = torch.ops.aten.gelu_backward(w["w1"].mT @ e, z)
            for part, grad, inputs in (("w2", h, y), ("w_skip", e, y), ("w1", e, a.mT)):
                if part not in w:
                    continue
                erased = self.config.dgd and part != "w1"
                new = decay_chunk * w[part] - grad @ (step.mT * inputs if part == "w1" else y_g)
                if erased:
                    new -= w[part] @ k.mT @ (gamma[:, :C, :1] * X)
                if s:
                    new -= c[:, C:] * s[part]
                    if erased:
                        new += s[part] @ k.mT @ (c[:, :C] * X)
                    s[part].copy_(beta_chunk * s[part] + (grad * beta_after) @ inputs)
                w[part].copy_(new)
