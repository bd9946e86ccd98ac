"""One level of the Continuum Memory System in PyTorch: forward, backward, and the update that a segment's
factors make.

    branch(x) = w_down sigma(w_up norm(x))                      mlp="gelu"    (sigma: tanh form of gelu), "gelu_erf"
                w_down (silu(w_gate norm(x)) * (w_up norm(x)))  mlp="swiglu"; "geglu": gelu in place of silu

and with ``post_norm`` an RMSNorm of that. A level is a dict: ``norm_gain`` [d], ``norm_bias`` [d] (layernorm),
``post_gain`` [d] (post_norm), the matrices ``up`` [N, d], ``gate`` [N, d] (gated) and ``down`` [d, N], each a
``Matrix``, and with biases ``up_bias`` [N], ``gate_bias`` [N], ``down_bias`` [d]. The gradient of a segment is
never formed as such: the backward hands over its two factors per matrix, tokens by outputs and tokens by
inputs, and ``refresh_`` or ``outer_add_`` multiply them into what they change. B rows, T tokens, C tokens of a
segment, d width, N hidden units.

A backend of the CMS is a module with these functions: ``cpp.py`` and ``triton/operator.py`` are the others.
One whose updates have other bits for another number of tokens also has ``whole_segments`` (``absorb.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import CMSConfig
from ...state import master_dtype
from ..shared.across import Across
from .matrix import times, times_transposed

# The quintic of torch.optim.Muon (Jordan et al. 2024): slope 3.4445 at zero, singular values end in about
# [0.7, 1.2].
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
NS_EPS = 1e-7
BF16_FROM = 128  # rows and columns of a matrix for which bf16 products pay
ADAM_EPS = 1e-8
_HUGE = 1e38

Level = dict[str, Any]  # a tensor, or for a matrix a ``Matrix`` or a tensor
Factors = dict[str, tuple[Tensor, Tensor]]  # by matrix [r, c]: errors at its outputs [B, T, r], inputs [B, T, c]


class Adam(NamedTuple):
    """What Adam's step needs beside the first moment m, for rows that are at the same step.

    square: v [B, r, c], master dtype.  betas: of m and v.  step: t, this step's number, 1 at first.  tokens:
    how many the gradient is a sum over; it enters as their mean.  late: ``numbers`` on the device, master dtype,
    in a step that is recorded to be taken again, with other numbers every time; ``step`` is then not looked at."""

    square: Tensor
    betas: tuple[float, float]
    step: int
    tokens: int
    late: Tensor | None = None

    @property
    def shares(self) -> tuple[float, float]:
        """What the sum g and its square are multiplied by where they join m and v."""
        (beta1, beta2), n = self.betas, max(self.tokens, 1)
        return (1 - beta1) / n, (1 - beta2) / n**2

    def rates(self, lr: float) -> tuple[float, float]:
        """(a, b) of theta <- theta - a m / (b sqrt(v) + eps), which is the step with corrected averages."""
        first, second = (1 - beta**self.step for beta in self.betas)
        return lr / first, second**-0.5

    def numbers(self, lr: float) -> tuple[float, float, float, float]:
        """(a, b, b / a, eps / a): those of ``rates``, and of the same step as
        theta <- theta - m / (b / a sqrt(v) + eps / a)."""
        a, b = self.rates(lr)
        if a * _HUGE <= b:
            return a, b, _HUGE, _HUGE
        return a, b, b / a, min(ADAM_EPS / a, _HUGE)


class Saved(NamedTuple):
    """What the backward of one level needs. x: its input [B, T, d].  n: norm(x) [B, T, d].  z, g: w_up n and
    w_gate n [B, T, N] (g None for gelu).  a: hidden units [B, T, N].  out: w_down a [B, T, d] (None without
    post_norm)."""

    x: Tensor
    n: Tensor
    z: Tensor
    g: Tensor | None
    a: Tensor
    out: Tensor | None = None


def level_forward(
    x: Tensor, level: Level, config: CMSConfig, eps: float, *, residual: bool, keep: bool,
    across: Across | None = None,
) -> tuple[Tensor, Saved | None]:
    """x [B, T, d] -> branch(x), or x + branch(x) with ``residual``; and, with ``keep``, what
    ``level_backward`` needs. Differentiable. across: the processes that share the level, each with some of
    its hidden units."""
    width = (x.shape[-1],)
    if config.norm == "rmsnorm":
        n = F.rms_norm(x, width, level["norm_gain"], eps)
    else:
        n = F.layer_norm(x, width, level["norm_gain"], level.get("norm_bias"), eps)
    n = n if across is None else across.enter(n)
    z, g = times_transposed(n, level["up"], level.get("up_bias")), None
    if config.gated:
        g = times_transposed(n, level["gate"], level.get("gate_bias"))
        a = (F.silu(g) if config.mlp == "swiglu" else F.gelu(g, approximate="tanh")) * z
    else:
        a = F.gelu(z, approximate=_form(config))
    if across is None:
        y, out = times_transposed(a, level["down"], level.get("down_bias")), None
    else:
        y, out, bias = across.total(times_transposed(a, level["down"])), None, level.get("down_bias")
        y = y if bias is None else y + bias
    if config.post_norm:
        y, out = F.rms_norm(y, width, level["post_gain"], eps), y
    return x + y if residual else y, Saved(x, n, z, g, a, out) if keep else None


def level_backward(
    dy: Tensor, saved: Saved, level: Level, config: CMSConfig, eps: float, *, residual: bool, need_dx: bool,
    across: Across | None = None,
) -> tuple[Tensor | None, Factors]:
    """dy = dL/d(result of ``level_forward``) [B, T, d] -> (dL/dx or None, the factors of dL/dW per matrix:
    dW_b = left_b^T right_b).

    h = d_out w_down, d_out = dy, or behind a post_norm what it makes of dy;  gelu: d_up = sigma'(z) h;
    swiglu: d_up = silu(g) h, d_gate = silu'(g) z h;  dx = norm'(x)^T (d_up w_up + d_gate w_gate).
    """
    d_out = dy if saved.out is None else norm_backward(dy, saved.out, level["post_gain"], "rmsnorm", eps)
    h = times(d_out, level["down"])
    if saved.g is None:
        lefts = {"up": torch.ops.aten.gelu_backward(h, saved.z, approximate=_form(config))}
    elif config.mlp == "swiglu":
        lefts = {"up": F.silu(saved.g) * h, "gate": torch.ops.aten.silu_backward(saved.z * h, saved.g)}
    else:
        d_gate = torch.ops.aten.gelu_backward(saved.z * h, saved.g, approximate="tanh")
        lefts = {"up": F.gelu(saved.g, approximate="tanh") * h, "gate": d_gate}
    factors = {name: (left, saved.n) for name, left in lefts.items()} | {"down": (d_out, saved.a)}
    if not need_dx:
        return None, factors
    dn = sum(times(left, level[name]) for name, left in lefts.items())
    assert isinstance(dn, Tensor)
    dn = dn if across is None else across.sum(dn)
    dx = norm_backward(dn, saved.x, level["norm_gain"], config.norm, eps)
    return dx + dy if residual else dx, factors


def _form(config: CMSConfig) -> str:
    """Of gelu, where it is not a gate, as PyTorch calls it."""
    return "none" if config.mlp == "gelu_erf" else "tanh"


def norm_backward(dn: Tensor, x: Tensor, gain: Tensor, norm: str, eps: float) -> Tensor:
    """dL/dx for dn = dL/dnorm(x), of rms_norm or layer_norm; 16-bit tensors by way of fp32."""
    dtype, wide = x.dtype, master_dtype(x.dtype)
    x, g = x.to(wide), dn.to(wide) * gain.to(wide)
    if norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
        g = g - g.mean(-1, keepdim=True)
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    x = x * scale
    return ((g - x * (g * x).mean(-1, keepdim=True)) * scale).to(dtype)


def outer_add_(
    target: Tensor, left: Tensor, right: Tensor, rows: list[int], alpha: float = 1.0, beta: float = 1.0
) -> None:
    """target_b <- beta target_b + alpha left_b^T right_b for b in ``rows`` (ascending), in place; other rows
    stay as they are.

    target: [B, r, c], master dtype.  left: [B, C, r], right: [B, C, c].  beta = 0 ignores what target holds,
    also NaN.
    """
    left, right = left.to(target.dtype), right.to(target.dtype)
    if len(rows) == target.shape[0] > 1:
        target.baddbmm_(left.mT, right, beta=beta, alpha=alpha)
        return
    for b in rows:
        target[b].addmm_(left[b].mT, right[b], beta=beta, alpha=alpha)


def refresh_(
    weight: Tensor, copy: Tensor | None, left: Tensor | None, right: Tensor | None, rows: list[int], lr: float, *,
    moment: Tensor | None = None, mu: float = 0.0, total: Tensor | None = None, adam: Adam | None = None,
) -> None:
    """One optimizer step in ``rows`` (ascending), in place: theta <- theta - lr f(g), g = left^T right +
    total; ``total`` becomes zero.

    f(g) = g, or with ``moment``: m <- mu m + g, f = m.  With ``adam`` as well, in place of mu: g is the mean
    over its tokens, m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2,
    f = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
    weight, moment, total: [B, r, c], master dtype.  copy: weight in the dtype of the inputs, rewritten.
    left: [B, C, r] and right: [B, C, c], or None: g is ``total`` alone.  Source: Nested Learning eq 71.
    """
    if adam is not None:
        assert moment is not None
        _adam_(weight, moment, adam, _gradients(weight, left, right, total, rows), rows, lr)
        for b in rows:
            if total is not None:
                total[b].zero_()
            if copy is not None:
                copy[b].copy_(weight[b])
        return
    if total is not None:
        if left is not None and right is not None:
            outer_add_(total, left, right, rows)
        for b in rows:
            if moment is not None:
                moment[b].mul_(mu).add_(total[b])
            else:
                weight[b].add_(total[b], alpha=-lr)
            total[b].zero_()
    elif left is not None and right is not None:
        if moment is None:
            outer_add_(weight, left, right, rows, alpha=-lr)
        else:
            outer_add_(moment, left, right, rows, beta=mu)
    elif moment is not None:
        for b in rows:
            moment[b].mul_(mu)
    for b in rows:
        if moment is not None:
            weight[b].add_(moment[b], alpha=-lr)
        if copy is not None:
            copy[b].copy_(weight[b])


def _gradients(
    like: Tensor, left: Tensor | None, right: Tensor | None, total: Tensor | None, rows: list[int]
) -> Tensor:
    """g of ``refresh_``, [B, r, c] as ``like``, in ``rows``; in ``total`` where there is one."""
    if left is None or right is None:
        return torch.zeros_like(like) if total is None else total
    if total is not None:
        outer_add_(total, left, right, rows)
        return total
    grad = torch.empty_like(like)
    outer_add_(grad, left, right, rows, beta=0.0)
    return grad


def _adam_(weight: Tensor, moment: Tensor, adam: Adam, grad: Tensor, rows: list[int], lr: float) -> None:
    (beta1, beta2), (first, second) = adam.betas, adam.shares
    # as numbers and as tensors they make the same bits
    *_, scale, eps = adam.numbers(lr) if adam.late is None else adam.late.unbind()
    for row in rows:
        g, m, v = grad[row], moment[row], adam.square[row]
        m.mul_(beta1).add_(g, alpha=first)
        v.mul_(beta2).addcmul_(g, g, value=second)
        if lr > 0:
            weight[row].addcdiv_(m, v.sqrt().mul_(scale).add_(eps), value=-1)


def newton_schulz(grad: Tensor, narrow: bool = False) -> Tensor:
    """grad [..., r, c] -> about U V^T of its singular value decomposition, each matrix on its own, in the
    dtype of ``grad``.

    Five steps X <- a X + (b X X^T + c (X X^T)^2) X from X = grad / max(|grad|_F, 1e-7), on the transpose if
    r > c. narrow: for a 16-bit model; on a GPU the steps on large matrices are then in bf16
    (``orthogonal``), as torch.optim.Muon's are.
    """
    return orthogonal(grad, narrow and grad.is_cuda)


def orthogonal(grad: Tensor, in_bf16: bool) -> Tensor:
    """``newton_schulz``, with steps in bf16 if asked to and both sides are at least ``BF16_FROM`` long.

    On a CPU with AVX512-BF16 (one thread; fp32, then bf16): 128 x 512 2.1 and 1.8 ms, 256 x 1024 17 and 12 ms,
    576 x 1536 134 and 72 ms; at 64 x 128 it did not pay. Five steps of slope 3.4 amplify rounding: the result
    is 1-2% off, 6% for a gradient of fewer tokens than rows, its singular values are where fp32 has them.
    """
    tall = grad.shape[-2] > grad.shape[-1]
    x = grad.mT if tall else grad
    # linalg.vector_norm is off by 1e-5 at a million fp32 numbers on the CPU, a sum in PyTorch's usual order by 4e-8
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=NS_EPS)
    x = x.flatten(0, -3) if x.dim() > 2 else x[None]
    if in_bf16 and x.shape[-2] >= BF16_FROM:
        x = x.to(torch.bfloat16)
    a, b, c = NS_COEFFICIENTS
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(grad.dtype).reshape(grad.mT.shape if tall else grad.shape)
    return x.mT if tall else x
