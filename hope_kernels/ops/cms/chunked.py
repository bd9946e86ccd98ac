"""The Continuum Memory System in PyTorch: forward, gradients, optimizer step and commit, on explicit weights.

    branch_l(x) = w_down sigma(w_up norm(x))                     mlp="gelu"    (sigma: tanh form of gelu)
                  w_down (silu(w_gate norm(x)) * (w_up norm(x)))  mlp="swiglu"
    MLP_l(x)    = x + branch_l(x)                                (Nested Learning eq 70-74)

A level is a dict: ``norm_gain`` [d], ``norm_bias`` [d] (layernorm), the matrices ``up`` [N, d], ``gate`` [N, d] (swiglu) and ``down``
[d, N], and with biases ``up_bias`` [N], ``gate_bias`` [N], ``down_bias`` [d]. A matrix may carry a leading row axis, [B, N, d]: then
every sequence of the batch has its own. Only matrices are refreshed. B rows, T tokens, d width, N hidden units, K levels, and C1, the
period of level 1, is the length of a segment.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import CMSConfig

NORM_EPS = 1e-6
# The quintic of torch.optim.Muon (Jordan et al. 2024): slope 3.4445 at zero, singular values end in about [0.7, 1.2].
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
NS_EPS = 1e-7


def matrices(config: CMSConfig) -> tuple[str, ...]:
    """Names of the matrices of one level: what a refresh may change."""
    return ("up", "gate", "down") if config.mlp == "swiglu" else ("up", "down")


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights per sequence, accumulators and momentum for an input of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def learning_levels(config: CMSConfig) -> list[int]:
    """Indices (level 1 is 0) of the levels with lr > 0; the others are never copied nor changed."""
    return [l for l, lr in enumerate(config.learning_rates) if lr > 0]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, T, i], weight [o, i] or [B, o, i] -> [B, T, o]."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    y = torch.bmm(x, weight.transpose(1, 2))
    return y if bias is None else y + bias


def _branch(x: Tensor, level: dict[str, Tensor], config: CMSConfig, eps: float) -> Tensor:
    width = (x.shape[-1],)
    if config.norm == "rmsnorm":
        n = F.rms_norm(x, width, level["norm_gain"], eps)
    else:
        n = F.layer_norm(x, width, level["norm_gain"], level.get("norm_bias"), eps)
    up = _linear(n, level["up"], level.get("up_bias"))
    if config.mlp == "swiglu":
        hidden = F.silu(_linear(n, level["gate"], level.get("gate_bias"))) * up
    else:
        hidden = F.gelu(up, approximate="tanh")
    return _linear(hidden, level["down"], level.get("down_bias"))


def cms_forward(x: Tensor, levels: list[dict[str, Tensor]], config: CMSConfig, mix: Tensor | None = None, eps: float = NORM_EPS) -> Tensor:
    """All levels at fixed weights; differentiable.

    sequential, nested: y = MLP_K(... MLP_1(x)).  independent: y = sum_l softmax(mix)_l MLP_l(x).

    x: [B, T, d].  levels: level 1 first, in the dtype of x.  mix: [K], independent only.  Returns [B, T, d].
    Raises ValueError for a number of levels other than K, or the independent variant without ``mix``.
    Source: Nested Learning eq 72-74.
    """
    if len(levels) != config.num_levels:
        raise ValueError(f"cms_forward: argument levels has {len(levels)} entries, expected {config.num_levels}")
    if config.variant != "independent":
        for level in levels:
            x = x + _branch(x, level, config, eps)
        return x
    if mix is None:
        raise ValueError("cms_forward: argument mix is None, expected [K] for variant='independent'")
    share = torch.softmax(mix.to(x.dtype), 0)
    # The shares sum to 1, so the residual of the mixture is x itself.
    return x + sum(share[l] * _branch(x, level, config, eps) for l, level in enumerate(levels))


def gradient_leaves(levels: list[dict[str, Tensor]], config: CMSConfig, batch: int) -> list[dict[str, Tensor]]:
    """The same levels as constants, except that every matrix of a level with lr > 0 is a fresh leaf [B, rows, cols] that
    requires a gradient. Call with grad enabled and inference_mode off."""
    learning, names = learning_levels(config), matrices(config)
    leaves = []
    for l, level in enumerate(levels):
        leaf = {name: t.detach().clone() for name, t in level.items() if l not in learning or name not in names}
        for name in names if l in learning else ():
            leaf[name] = level[name].detach().expand(batch, -1, -1).clone().requires_grad_()
        leaves.append(leaf)
    return leaves


def cms_gradients(
    x: Tensor, error: Tensor, levels: list[dict[str, Tensor]], config: CMSConfig, mix: Tensor | None = None, eps: float = NORM_EPS
) -> list[dict[str, Tensor] | None]:
    """g_b = d sum_t <error_bt, y_bt> / d theta_b for one segment: the gradient that a refresh accumulates, per row.

    x, error: [B, C1, d], the segment's inputs and dL/dy.  levels, mix: as in ``cms_forward``.
    Returns, per level, None (lr = 0) or a dict name -> [B, rows, cols] in the master dtype. Works under any grad or inference
    mode of the caller and is detached from every outer graph. Source: Nested Learning eq 71.
    """
    wanted = [(l, name) for l in learning_levels(config) for name in matrices(config)]
    if not wanted:
        return [None] * config.num_levels
    with torch.inference_mode(False), torch.enable_grad():
        leaves = gradient_leaves(levels, config, x.shape[0])
        constant_mix = None if mix is None else mix.detach().clone()
        y = cms_forward(x.detach().clone(), leaves, config, constant_mix, eps)
        found = torch.autograd.grad(y, [leaves[l][name] for l, name in wanted], error.detach().clone())
    grads: list[dict[str, Tensor] | None] = [None] * config.num_levels
    for (l, name), g in zip(wanted, found):
        grads[l] = {**(grads[l] or {}), name: g.to(master_dtype(x.dtype))}
    return grads


def newton_schulz(grad: Tensor) -> Tensor:
    """grad [..., rows, cols] -> about U V^T of its singular value decomposition, each matrix on its own, in the dtype of ``grad``.

    Five steps X <- a X + (b X X^T + c (X X^T)^2) X from X = grad / max(|grad|_F, 1e-7), on the transpose if rows > cols.
    """
    tall = grad.shape[-2] > grad.shape[-1]
    x = grad.mT if tall else grad
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=NS_EPS)
    a, b, c = NS_COEFFICIENTS
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def optimizer_step(
    config: CMSConfig, level: int, weight: Tensor, grad: Tensor, moment: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """theta <- theta - lr_l f(g) for one matrix, batched over a leading row axis.

    f: gd g;  momentum m = mu m + g, f = m;  muon 0.2 sqrt(max(rows, cols)) newton_schulz(g).
    level: index, level 1 is 0.  weight, grad, moment: [B, rows, cols], master dtype; moment None is zero.
    Returns (weight, moment), new tensors; moment stays None unless the optimizer is momentum. lr = 0 returns the arguments.
    Source: Nested Learning eq 71.
    """
    lr = config.learning_rates[level]
    if lr == 0:
        return weight, moment
    if config.optimizer == "momentum":
        # a copy: ``grad`` may be the accumulator, which is zeroed after the step
        moment = grad.clone() if moment is None else config.momentum * moment + grad
        return weight - lr * moment, moment
    if config.optimizer == "muon":
        scale = 0.2 * math.sqrt(max(grad.shape[-2:]))
        return weight - (lr * scale) * newton_schulz(grad), None
    return weight - lr * grad, None


def _row_index(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=device)


def row_mask(rows: list, device: torch.device) -> Tensor:
    """[B] truth values -> [B, 1, 1] bool, to choose between matrices of two sources row by row."""
    return torch.tensor([bool(r) for r in rows], dtype=torch.bool, device=device)[:, None, None]


def take_rows(t: Tensor, rows: list[int]) -> Tensor:
    """t [B, ...] -> [len(rows), ...]; rows in ascending order."""
    return t if len(rows) == t.shape[0] else t.index_select(0, _row_index(rows, t.device))


def put_rows(t: Tensor, rows: list[int], new: Tensor) -> Tensor:
    """A copy of t [B, ...] in which ``rows`` (ascending) are ``new`` [len(rows), ...]."""
    return new if len(rows) == t.shape[0] else t.index_copy(0, _row_index(rows, t.device), new)


def _zeroed(tensors: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {name: put_rows(t, rows, t.new_zeros((len(rows), *t.shape[1:]))) for name, t in tensors.items()}


def accumulate(total: dict[str, Tensor] | None, grads: dict[str, Tensor], rows: list[bool]) -> dict[str, Tensor]:
    """total + grads in the rows marked in ``rows``; the others stay bit for bit, whatever ``grads`` holds there.

    total: None (zero) or name -> [B, r, c].  grads: name -> [B, r, c].  Returns new tensors in the dtype of ``grads``.
    """
    result = {}
    for name, g in grads.items():
        old = torch.zeros_like(g) if total is None else total[name]
        result[name] = old + g if all(rows) else torch.where(row_mask(rows, g.device), old + g, old)
    return result


def commit(
    config: CMSConfig,
    initial: list[dict[str, Tensor]],
    weights: list[dict[str, Tensor] | None],
    grads: list[dict[str, Tensor] | None],
    moments: list[dict[str, Tensor] | None],
    own: list[list[int]],
    rows: list[bool],
    counts: list[int],
) -> tuple[list, list, list, list[list[int]]]:
    """The refreshes that are due at a boundary: row b, if ``rows[b]``, is at token count ``counts[b]``.

    Level l is due in a row when its count is a multiple of C^(l): the optimizer step is applied to the accumulated gradient, which is
    then zero. Nested: wherever level l+1 is due, level l (due as well) goes back to its shared initial weights with zero momentum; the
    refresh that this discards is not computed. A level with lr = 0 keeps its clock (its period elapses) and nothing else.

    initial: per level, name -> [r, c] shared matrices, master dtype.  weights, grads, moments: per level None or name -> [B, r, c].
    own: per level one int per row, 1 where the row's matrices in ``weights`` are in force and 0 where the shared ones are.
    Returns new (weights, grads, moments, own); unchanged tensors are passed through, no argument is modified. Weights are allocated at
    a level's first refresh. Source: Nested Learning eq 71-72.
    """
    weights, grads, moments, own = list(weights), list(grads), list(moments), [list(o) for o in own]
    batch = len(rows)

    def due_rows(l: int) -> list[int]:
        return [b for b in range(batch) if rows[b] and counts[b] % config.chunks[l] == 0]

    for l in learning_levels(config):
        due = due_rows(l)
        reset = due_rows(l + 1) if config.variant == "nested" and l + 1 < config.num_levels else []
        step = [b for b in due if b not in reset]
        if step and (grads[l] is not None or moments[l] is not None):
            _refresh(config, l, initial[l], weights, grads, moments, own, step)
        if due and grads[l] is not None:
            grads[l] = _zeroed(grads[l], due)
        if reset:
            own[l] = [0 if b in reset else o for b, o in enumerate(own[l])]
            if moments[l] is not None:
                moments[l] = _zeroed(moments[l], reset)
    return weights, grads, moments, own


def _refresh(config: CMSConfig, l: int, initial: dict, weights: list, grads: list, moments: list, own: list, rows: list[int]) -> None:
    """Replaces the entries of level ``l`` in ``weights``, ``moments`` and ``own`` by those after one optimizer step in ``rows``."""
    batch = len(own[l])
    new_weights, new_moments = {}, {}
    for name in matrices(config):
        shared = initial[name].detach()
        held = shared.expand(batch, -1, -1) if weights[l] is None else weights[l][name]
        base = take_rows(held, rows)
        if weights[l] is not None and not all(own[l][b] for b in rows):
            base = torch.where(row_mask([own[l][b] for b in rows], base.device), base, shared)
        moment = None if moments[l] is None else take_rows(moments[l][name], rows)
        grad = torch.zeros_like(base) if grads[l] is None else take_rows(grads[l][name], rows)
        weight, moment = optimizer_step(config, l, base, grad, moment)
        new_weights[name] = put_rows(held, rows, weight)
        if moment is not None:
            old = torch.zeros_like(held) if moments[l] is None else moments[l][name]
            new_moments[name] = put_rows(old, rows, moment)
    weights[l] = new_weights
    moments[l] = new_moments or None
    own[l] = [1 if b in rows else o for b, o in enumerate(own[l])]
