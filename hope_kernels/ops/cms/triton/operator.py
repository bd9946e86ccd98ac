"""backend="triton" of the CMS: the functions of ``level.py`` by Triton kernels, as four dispatcher operators.

    cms_level_forward     norm, [inner], up, [inner], down              ``level_operator.py``
    cms_level_backward    [inner], error, [[inner], back, norm]
    cms_refresh_          one launch per matrix, or PyTorch's GEMM      ``refresh_operator.py``
    cms_newton_schulz     2 + 3 * 5 launches                            ``newton_schulz_operator.py``

Brackets: where the level has a pending part, or dx is asked for. fp32, bf16 and fp16, masters in fp32. A
row's outputs have the same bits for any split of its tokens, in any company, whether it owns its matrices or
shares equal ones (``common.py``). No operator is differentiable: ``level_backward`` is the derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....check import check_tensor
from ....config import CMSConfig
from ...shared.triton_build import DTYPES
from ...shared.triton_library import on_cpu
from ..level import Adam, Factors, Level, Saved
from . import level_operator, newton_schulz_operator, refresh_operator  # noqa: F401  they define the operators
from .library import whole_segments as whole_segments
from .norm import MAX_WIDTH
from .operands import matrices_of


def unserved(config: CMSConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the backend cannot serve a layer, or None."""
    if dtype not in DTYPES:
        return f"serves {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    if config.mlp not in ("gelu", "swiglu"):
        return f'serves mlp="gelu" and "swiglu", not "{config.mlp}"'
    if config.post_norm:
        return "serves levels without post_norm"
    if config.d_model > MAX_WIDTH:
        return f"serves d_model up to {MAX_WIDTH}, not {config.d_model}"
    if config.d_model * config.hidden >= 2**31:
        return f"serves matrices below 2^31 elements, not {config.hidden} x {config.d_model}"
    if device.type != "cuda" and not on_cpu():
        return f"needs a CUDA device, not {device.type}"
    return None


def level_forward(
    x: Tensor, level: Level, config: CMSConfig, eps: float, *, residual: bool, keep: bool
) -> tuple[Tensor, Saved | None]:
    """As ``level.level_forward``: x [B, T, d] -> (branch(x), or x + branch(x) with ``residual``; what the
    backward needs, with ``keep``).

    Raises ValueError for other shapes, dtypes or devices, TypeError for non-tensors.
    """
    _checked("cms level_forward", x, level, config)
    vectors = (
        level["norm_gain"], *(level.get(name) for name in ("norm_bias", "up_bias", "gate_bias", "down_bias"))
    )
    y, n, z, g, a = torch.ops.hope_kernels.cms_level_forward(
        x, *vectors, *matrices_of(level), eps, config.norm == "layernorm", residual, keep
    )
    return y, Saved(x, n, z, g if config.mlp == "swiglu" else None, a) if keep else None


def level_backward(
    dy: Tensor, saved: Saved, level: Level, config: CMSConfig, eps: float, *, residual: bool, need_dx: bool
) -> tuple[Tensor | None, Factors]:
    """As ``level.level_backward``: dy [B, T, d] -> (dL/dx or None, the factors of dL/dW per matrix). Raises
    as ``level_forward``."""
    B, T, d = _checked("cms level_backward", dy, level, config)
    for name, t, width in (
        ("x", saved.x, d), ("n", saved.n, d), ("z", saved.z, config.hidden), ("a", saved.a, config.hidden)
    ):
        check_tensor("cms level_backward", f"saved.{name}", t, (B, T, width), dtype=dy.dtype, device=dy.device)
    dx, d_up, d_gate = torch.ops.hope_kernels.cms_level_backward(
        dy, saved.x, saved.z, saved.g, level["norm_gain"], *matrices_of(level), eps, config.norm == "layernorm",
        residual, need_dx,
    )
    factors = {"up": (d_up, saved.n)} | (
        {"gate": (d_gate, saved.n)} if config.mlp == "swiglu" else {}
    ) | {"down": (dy, saved.a)}
    return dx if need_dx else None, factors


def outer_add_(
    target: Tensor, left: Tensor, right: Tensor, rows: list[int], alpha: float = 1.0, beta: float = 1.0
) -> None:
    """As ``level.outer_add_``: target_b <- beta target_b + alpha left_b^T right_b in ``rows``. Raises as
    ``refresh_``."""
    _refresh("cms outer_add_", target, None, left, right, rows, -alpha, beta, None, 0.0, None)


def refresh_(
    weight: Tensor, copy: Tensor | None, left: Tensor | None, right: Tensor | None, rows: list[int], lr: float, *,
    moment: Tensor | None = None, mu: float = 0.0, total: Tensor | None = None, adam: Adam | None = None,
) -> None:
    """As ``level.refresh_``: one optimizer step in ``rows``, in place; for long segments by ``library.py``.

    weight, moment, adam.square, total: [B, r, c] fp32 and copy: [B, r, c], contiguous, at multiples of 16
    bytes.  left: [B, C, r], right: [B, C, c]. Raises ValueError for other shapes, dtypes, devices or rows.
    """
    _refresh("cms refresh_", weight, copy, left, right, rows, lr, 1.0, moment, mu, total, adam)


def newton_schulz(grad: Tensor, narrow: bool = False) -> Tensor:
    """As ``level.newton_schulz``: grad [..., r, c] fp32 -> about U V^T of each matrix; also for 16-bit models
    (``narrow``) all in fp32. Raises ValueError for another dtype."""
    if grad.dtype != torch.float32 or grad.dim() < 2:
        raise ValueError(
            f"cms newton_schulz: argument grad is {list(grad.shape)} {grad.dtype}, expected [..., r, c] torch.float32"
        )
    return torch.ops.hope_kernels.cms_newton_schulz(grad)


def _checked(op: str, x: Tensor, level: Level, config: CMSConfig) -> tuple[int, int, int]:
    """(B, T, d) of a well-formed call."""
    d, N = config.d_model, config.hidden
    sizes = check_tensor(op, "x", x, ("B", "T", d))
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: argument x has dtype {x.dtype}, expected one of {list(DTYPES)}")
    for name, width in (("norm_gain", d), ("norm_bias", d), ("up_bias", N), ("gate_bias", N), ("down_bias", d)):
        if level.get(name) is not None:
            check_tensor(op, f"level.{name}", level[name], (width,), dtype=x.dtype, device=x.device)
    if config.mlp == "swiglu" and (level.get("up_bias") is None) != (level.get("gate_bias") is None):
        raise ValueError(f"{op}: argument level has one of up_bias and gate_bias, expected both or none")
    ranks = set()
    for name in ("up", "gate", "down") if config.mlp == "swiglu" else ("up", "down"):
        W, (r, c) = level[name], (d, N) if name == "down" else (N, d)
        R = 0 if W.left is None else W.left.shape[1]
        for part, shape in (
            ("shared", (r, c)), ("own", (sizes["B"], r, c)), ("left", (sizes["B"], R, r)),
            ("right", (sizes["B"], R, c))
        ):
            if getattr(W, part) is not None:
                check_tensor(op, f"level.{name}.{part}", getattr(W, part), shape, dtype=x.dtype, device=x.device)
        if W.shared is None and (W.own is None or not all(W.rows)):
            raise ValueError(
                f"{op}: argument level.{name} has rows without a matrix, expected shared, or own in every row"
            )
        if W.own is not None and len(W.rows) != sizes["B"]:
            raise ValueError(f"{op}: argument level.{name} has {len(W.rows)} rows, expected {sizes['B']}")
        if (W.left is None) != (W.right is None):
            raise ValueError(f"{op}: argument level.{name} has one of left and right, expected both or none")
        if name != "down":
            ranks.add(R)
    if len(ranks) > 1:
        raise ValueError(
            f"{op}: arguments level.up and level.gate have pending parts of {sorted(ranks)} slots, expected one size"
        )
    return sizes["B"], sizes["T"], d


def _refresh(op: str, weight, copy, left, right, rows, lr, beta, moment, mu, total, adam=None) -> None:
    """Checks the arguments and calls ``cms_refresh_``."""
    sizes = check_tensor(
        op, "target" if op.endswith("outer_add_") else "weight", weight, ("B", "r", "c"), dtype=torch.float32
    )
    B, r, c = sizes["B"], sizes["r"], sizes["c"]
    if adam is not None and moment is None:
        raise ValueError(f"{op}: argument moment is None, expected a tensor with adam")
    square = None if adam is None else adam.square
    for name, t in (("moment", moment), ("adam.square", square), ("total", total)):
        if t is not None:
            check_tensor(op, name, t, (B, r, c), dtype=torch.float32, device=weight.device)
    if copy is not None:
        check_tensor(op, "copy", copy, (B, r, c), device=weight.device)
    if (left is None) != (right is None):
        raise ValueError(f"{op}: arguments left and right: one is None, expected both or none")
    if left is not None:
        C = check_tensor(op, "left", left, (B, "C", r), device=weight.device)["C"]
        check_tensor(op, "right", right, (B, C, c), dtype=left.dtype, device=weight.device)
    for name, t in (("left", left), ("copy", copy)):
        if t is not None and t.dtype not in DTYPES:
            raise ValueError(f"{op}: argument {name} has dtype {t.dtype}, expected one of {list(DTYPES)}")
    if any(not 0 <= b < B for b in rows) or len(set(rows)) != len(rows):
        raise ValueError(f"{op}: argument rows is {list(rows)}, expected different rows below {B}")
    averages, late = (0.0,) * 4, None
    if adam is not None:
        late = adam.late
        if late is not None:
            check_tensor(op, "adam.late", late, (4,), dtype=torch.float32, device=weight.device)
        (lr, root), (mu, beta2) = adam.rates(lr), adam.betas
        averages = beta2, *adam.shares, root
    torch.ops.hope_kernels.cms_refresh_(
        weight, copy, left, right, list(rows), lr, beta, moment, mu, total, square, *averages, late
    )
