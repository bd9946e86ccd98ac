"""A memory evaluated, M(x) = x + w1 sigma(w2 x), for all memories of a layer at once, in plain PyTorch.

Tokens are columns: activations are [features, C], so that every product has the weights on its left (on a CPU
1.2 to 1.5 times the rate of the transposed product at C = 16..64) and every memory is a block of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import FastWeights, Layout, MaybeTensor

_GELU_1, _GELU_3 = 2 * (2 / torch.pi) ** 0.5, 2 * (2 / torch.pi) ** 0.5 * 0.044715


def activate(z: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """sigma(z), and what ``activate_backward`` can reuse.

    Without a graph gelu_tanh goes through one sigmoid that value and derivative share: 2.5x less time on a
    CPU than two tanh.
    """
    if name == "silu":
        return F.silu(z), None
    if name == "gelu" or torch.is_grad_enabled():
        return F.gelu(z, approximate="none" if name == "gelu" else "tanh"), None
    gate = (z * z).mul_(_GELU_3).add_(_GELU_1).mul_(z).sigmoid_()
    return z * gate, gate


def activate_backward(grad: Tensor, z: Tensor, name: str, a: Tensor, gate: Tensor | None) -> Tensor:
    """grad * sigma'(z), differentiable in grad and z."""
    if name == "silu":
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(grad, z)
        gate = torch.sigmoid(z)  # silu_backward itself cannot be differentiated
        return grad * gate * (1 + z * (1 - gate))
    if gate is None:
        return torch.ops.aten.gelu_backward(grad, z, approximate="none" if name == "gelu" else "tanh")
    # gate + a (1 - gate) d/dz(_GELU_1 z + _GELU_3 z^3)
    inner = (z * z).mul_(3 * _GELU_3).add_(_GELU_1)
    return torch.addcmul(a, a, gate, value=-1).mul_(inner).add_(gate).mul_(grad)


def gemm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b for 3-D a and b, operands rounded to ``dtype``, fp32 (fp64) accumulation and result."""
    if dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a.to(dtype), b.to(dtype)).float()
    return torch.bmm(a.to(dtype).float(), b.to(dtype).float())


def add_gemm(c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, sign: int = 1) -> Tensor:
    """c + sign * a @ b, as ``gemm``, written over c: an intermediate that nothing else reads."""
    if dtype in (torch.float32, torch.float64):
        return c.baddbmm_(a, b, alpha=sign)
    return c.add_(gemm(a, b, dtype), alpha=sign)


class Read(NamedTuple):
    """full [G, Mf, D, C], scalar [G, Ms, C]: outputs; rows [G, R, C]: w2 x; a, gate [G, M*N, C]: see
    ``activate``."""

    full: MaybeTensor
    scalar: MaybeTensor
    rows: Tensor
    a: MaybeTensor
    gate: MaybeTensor


def read(x: Tensor, w: FastWeights, layout: Layout, activation: str, dtype: torch.dtype) -> Read:
    """M(x) for every memory of ``layout``: x [G, D, C], one token per column; w with leading dimension G."""
    G, D, C = x.shape
    Mf, Ms, N = len(layout.full), len(layout.scalars), layout.N
    rows = gemm(w.w2, x, dtype)
    full = scalar = None
    if not layout.mlp:
        full = rows[:, : Mf * D].view(G, Mf, D, C) if Mf else None
        return Read(full, rows[:, Mf * D :] if Ms else None, rows, None, None)
    skip = layout.skip and Ms
    a, gate = activate(rows[:, : layout.hidden_rows] if skip else rows, activation)
    if Mf:
        out = gemm(w.w1.flatten(0, 1), (a[:, : Mf * N] if Ms else a).reshape(G * Mf, N, C), dtype)
        full = out.view(G, Mf, D, C) + x.unsqueeze(1)
    if Ms:
        scalar = torch.bmm(w.w1s.reshape(G * Ms, 1, N), a[:, Mf * N :].reshape(G * Ms, N, C)).view(G, Ms, C)
        if skip:
            scalar = scalar + rows[:, layout.hidden_rows :]
    return Read(full, scalar, rows, a, gate)
