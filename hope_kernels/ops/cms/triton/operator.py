"""backend="triton" of the CMS: the functions of ``level.py`` by Triton kernels, as four dispatcher operators.

    cms_level_forward     norm, [inner], up, [inner], down              ``norm.py``, ``forward.py``
    cms_level_backward    [inner], error, [[inner], back, norm]         ``backward.py``
    cms_refresh_          one launch per matrix, or PyTorch's GEMM      ``refresh.py``, ``library.py``
    cms_newton_schulz     2 + 3 * 5 launches                            ``newton_schulz.py``

Brackets: where the level has a pending part, or dx is asked for. fp32, bf16 and fp16, masters in fp32. A
row's outputs have the same bits for any split of its tokens, in any company, whether it owns its matrices or
shares equal ones (``common.py``). No operator is differentiable: ``level_backward`` is the derivative.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ....check import check_tensor
from ....config import CMSConfig
from ...shared.triton_build import DTYPES, aligned, filled
from ...shared.triton_library import on_cpu
from ..level import ADAM_EPS, NS_COEFFICIENTS, NS_EPS, NS_STEPS, Adam, Factors, Level, Saved
from . import library
from .backward import back_kernel, error_kernel
from .common import Operand
from .forward import down_kernel, inner_kernel, up_kernel
from .library import whole_segments as whole_segments
from .newton_schulz import (
    LANES,
    NUM_WARPS,
    PARTS,
    squares_kernel,
    start_kernel,
    step_kernel,
    symmetric_kernel,
)
from .norm import MAX_WIDTH, norm_backward_kernel, norm_kernel, norm_options, norm_tile
from .refresh import refresh_kernel
from .tiles import GROUP, INNER, RANK, WHOLE, Tile, down_tile, error_tile, refresh_tile, up_tile


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
        x, *vectors, *_matrices(level), eps, config.norm == "layernorm", residual, keep
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
        dy, saved.x, saved.z, saved.g, level["norm_gain"], *_matrices(level), eps, config.norm == "layernorm",
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


# A matrix as an operator sees it. rows: 1 for a row of the batch with a base of its own, else 0; empty: none has one.
_MATRIX = "Tensor? {0}, Tensor? {0}_own, int[] {0}_rows, Tensor? {0}_left, Tensor? {0}_right, float {0}_scale"
_MATRICES = ", ".join(_MATRIX.format(name) for name in ("up", "gate", "down"))
_PER_MATRIX = _MATRIX.count(",") + 1


def _matrices(level: Level) -> list:
    """The arguments of ``_MATRICES``."""
    flat = []
    for name in ("up", "gate", "down"):
        W = level.get(name)
        if W is None:
            flat += [None, None, [], None, None, 0.0]
            continue
        own, rows = (W.own, [int(r) for r in W.rows]) if W.own is not None and any(W.rows) else (None, [])
        pending = (None, None) if W.left is None or not W.left.shape[1] else (W.left, W.right)
        flat += [W.shared, own, rows, *pending, float(W.scale)]
    return flat


@lru_cache(maxsize=1024)
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int32, copied to the device once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int32, device=device)


class _Matrix:
    """A matrix [r, c] in a launch: its base, and the pending part's factors [B, slots, .], of which the first
    R count."""

    def __init__(self, shared, own, rows, left, right, scale, like: Tensor):
        self.exists = shared is not None or own is not None
        self.OWN = own is not None
        self.shared, self.own = map(aligned, filled((own if shared is None else shared, own), like))
        self.owns = _on_device(tuple(rows), like.device) if self.OWN else like
        self.scale, self.like, self.R = scale, like, 0 if left is None else left.shape[1]
        self.left, self.right = (like if t is None else t if _slots(t) else aligned(t) for t in (left, right))

    def operand(self, x: Tensor, side: str, OWN: bool, bias: Tensor | None = None) -> Operand:
        """In a launch some of whose matrices have rows of their own (OWN). side: the pending factor that x
        [B, T, .] meets first, "right" on the way up and "left" on the way back."""
        owns = self.owns if self.OWN or not OWN else _on_device((0,) * self.like.shape[0], self.like.device)
        inner, outer = (self.right, self.left) if side == "right" else (self.left, self.right)
        u = self._inner(x, inner)
        return Operand(self.shared, self.own, owns, self.like if bias is None else bias, u, outer)

    def _inner(self, x: Tensor, factor: Tensor) -> Tensor:
        """x factor^T [B, T, R up to a multiple of RANK]: x [B, T, K], factor left or right; without a pending
        part a stand-in."""
        if not self.R:
            return x
        (B, T, K), tile = x.shape, INNER[x.itemsize]
        u = x.new_empty(B, T, triton.cdiv(self.R, RANK) * RANK)
        inner_kernel[(B * triton.cdiv(T, tile.BM), triton.cdiv(self.R, tile.BN))](
            x, factor, u, T, self.R, _slots(factor), K=K, BR=RANK, **tile.sizes(), **tile.options(),
        )
        return u


def _operands(matrices: tuple, like: Tensor) -> list[_Matrix]:
    up, gate, down = (
        _Matrix(*matrices[i : i + _PER_MATRIX], like=like) for i in range(0, len(matrices), _PER_MATRIX)
    )
    for side in ("left", "right") if up.R and gate.R else ():
        a, b = getattr(up, side), getattr(gate, side)
        if _slots(a) != _slots(b):  # one launch takes both
            setattr(up, side, a.contiguous())
            setattr(gate, side, b.contiguous())
    return [up, gate, down]


def _slots(factor: Tensor) -> int:
    """Slots from one row of the batch to the next in factor [B, R, width], the first slots of a larger
    buffer; 0: it must be copied."""
    B, R, width = factor.shape
    slots = factor.stride(0) // max(width, 1) if B > 1 else R
    fits = factor.stride()[1:] == (width, 1) and (B == 1 or factor.stride(0) == slots * width >= R * width)
    return slots if fits and factor.data_ptr() % 16 == 0 else 0


def _product(kernel, tile: Tile, width: int, x: Tensor, OWN: bool, R: int, factor: Tensor, **arguments) -> None:
    """Launches a product with an output ``width`` wide over the tokens of x [B, T, .]; factor: the pending
    part's outer one, of R slots. arguments: what the kernel takes beyond sizes and tiles."""
    B, T = x.shape[:2]
    groups, S = (B, T) if OWN else (1, B * T)
    kernel[(groups * triton.cdiv(S, tile.BM) * triton.cdiv(width, tile.BN),)](
        **arguments, S=S, T=T, groups=groups, R=R, slots=_slots(factor) if R else 0, PENDING=R > 0, OWN=OWN,
        BR=RANK, GROUP=GROUP, **tile.sizes(), **tile.options(R > 0),
    )


_library = torch.library.Library("hope_kernels", "FRAGMENT")
_library.define(
    "cms_level_forward(Tensor x, Tensor norm_gain, Tensor? norm_bias, Tensor? up_bias, Tensor? gate_bias, "
    "Tensor? down_bias, "
    f"{_MATRICES}, float eps, bool layernorm, bool residual, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"cms_level_backward(Tensor dy, Tensor x, Tensor z, Tensor? g, Tensor norm_gain, {_MATRICES}, float eps, "
    "bool layernorm, "
    "bool residual, bool need_dx) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "cms_refresh_(Tensor(a!) weight, Tensor(b!)? copy, Tensor? left, Tensor? right, int[] rows, float lr, float beta, "
    "Tensor(c!)? moment, float mu, Tensor(d!)? total, Tensor(e!)? square=None, float beta2=0.0, "
    "float first=0.0, float second=0.0, float root=0.0, Tensor? late=None) -> ()"
)
_library.define("cms_newton_schulz(Tensor grad) -> Tensor")


def _hidden(matrices: tuple) -> int:
    """N, from the matrix up."""
    return (matrices[1] if matrices[0] is None else matrices[0]).shape[-2]


def _launch_forward(x, norm_gain, norm_bias, up_bias, gate_bias, down_bias, *rest) -> tuple[Tensor, ...]:
    *matrices, eps, layernorm, residual, keep = rest
    x = aligned(x)
    (B, T, d), N, size = x.shape, _hidden(matrices), x.itemsize
    up, gate, down = _operands(matrices, x)
    gain, shift, up_bias_, gate_bias_, down_bias_ = map(
        aligned, filled((norm_gain, norm_bias, up_bias, gate_bias, down_bias), x)
    )
    y, n, a = torch.empty_like(x), torch.empty_like(x), x.new_empty(B, T, N)
    z, g = (torch.empty_like(a) if keep and wanted else x.new_empty(0) for wanted in (True, gate.exists))
    if B * T:
        with torch.cuda.device_of(x):
            tile = norm_tile(d)
            norm_kernel[(triton.cdiv(B * T, tile["BR"]),)](
                x, gain, shift, n, B * T, EPS=eps, D=d, LAYERNORM=layernorm, BIAS=norm_bias is not None,
                **tile, **norm_options(d)
            )
            OWN = up.OWN or gate.OWN
            _product(
                up_kernel, up_tile(N, size, gate.exists), N, x, OWN, up.R, up.left, n_p=n,
                up=up.operand(n, "right", OWN, up_bias_), gate=gate.operand(n, "right", OWN, gate_bias_),
                z_p=z, g_p=g, a_p=a, scale_up=up.scale, scale_gate=gate.scale, D=d, N=N, GATED=gate.exists,
                BIAS=up_bias is not None, KEEP=keep,
            )
            _product(
                down_kernel, down_tile(d, size), d, x, down.OWN, down.R, down.left, a_p=a,
                down=down.operand(a, "right", down.OWN, down_bias_), x_p=x, y_p=y, scale=down.scale, D=d, N=N,
                BIAS=down_bias is not None, RESIDUAL=residual,
            )
    return (y, n, z, g, a) if keep else (y, *(x.new_empty(0) for _ in range(4)))


def _launch_backward(dy, x, z, g, norm_gain, *rest) -> tuple[Tensor, Tensor, Tensor]:
    *matrices, eps, layernorm, residual, need_dx = rest
    dy, x, z, gain = map(aligned, (dy, x, z, norm_gain))
    (B, T, d), N, size = x.shape, _hidden(matrices), x.itemsize
    up, gate, down = _operands(matrices, x)
    g = z if g is None else aligned(g)
    d_up, d_gate = torch.empty_like(z), torch.empty_like(z) if gate.exists else z.new_empty(0)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    if B * T:
        with torch.cuda.device_of(x):
            _product(
                error_kernel, error_tile(N, size, gate.exists), N, x, down.OWN, down.R, down.right, dy_p=dy,
                down=down.operand(dy, "left", down.OWN), z_p=z, g_p=g, d_up_p=d_up, d_gate_p=d_gate,
                scale=down.scale, D=d, N=N, GATED=gate.exists,
            )
            if need_dx:
                dn, OWN, tile = torch.empty_like(x), up.OWN or gate.OWN, norm_tile(d)
                _product(
                    back_kernel, down_tile(d, size), d, x, OWN, up.R, up.right, d_up_p=d_up,
                    up=up.operand(d_up, "left", OWN), d_gate_p=d_gate, gate=gate.operand(d_gate, "left", OWN),
                    dn_p=dn, scale_up=up.scale, scale_gate=gate.scale, D=d, N=N, GATED=gate.exists,
                )
                norm_backward_kernel[(triton.cdiv(B * T, tile["BR"]),)](
                    dn, x, gain, dy, dx, B * T, EPS=eps, D=d, LAYERNORM=layernorm, RESIDUAL=residual, **tile,
                    **norm_options(d)
                )
    return dx, d_up, d_gate


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


class _Held(NamedTuple):
    """What an update may read and write, each [B, r, c]; copy in the inputs' dtype, the rest in fp32. late: as in
    ``Adam``, for all rows."""

    weight: Tensor
    copy: Tensor | None
    moment: Tensor | None
    square: Tensor | None
    total: Tensor | None
    late: Tensor | None = None

    def rows(self) -> tuple[Tensor | None, ...]:
        """Those that have one matrix a row."""
        return self[:-1]

    def only(self, b: int) -> _Held:
        return _Held(*(None if t is None else t[b : b + 1] for t in self.rows()), self.late)


def _launch_refresh(
    weight, copy, left, right, rows, lr, beta, moment, mu, total, square=None, beta2=0.0, first=0.0,
    second=0.0, root=0.0, late=None,
) -> None:
    held, rates = _Held(weight, copy, moment, square, total, late), (lr, mu, beta, beta2, first, second, root)
    if any(t is not None and (not t.is_contiguous() or t.data_ptr() % 16) for t in held.rows()):
        raise ValueError(
            "cms refresh_: what is updated in place is expected contiguous, at a multiple of 16 bytes"
        )
    if not rows or not weight[0].numel():
        return
    with torch.cuda.device_of(weight):
        if left is None or not library.serves(left, right, moment is not None or total is not None):
            _update(held, left, right, rows, rates, clear=total is not None)
        else:
            _update_by_library(held, library.placed(left), library.placed(right), rows, rates)


def _update_by_library(held: _Held, left: Tensor, right: Tensor, rows: list[int], rates: tuple) -> None:
    """The product by ``library.py``, row by row, and what it does not do by ``refresh_kernel`` without one."""
    lr, mu, beta, *_ = rates
    if held.total is not None:
        for b in rows:
            library.add_product_(held.total[b], left[b], right[b], 1.0, 1.0)
        _update(held, None, None, rows, rates, clear=True)
    elif held.square is not None:
        grad = torch.empty_like(held.weight[:1])
        for b in rows:
            library.add_product_(grad[0], left[b], right[b], 0.0, 1.0)
            _update(held.only(b)._replace(total=grad), None, None, [0], rates, clear=False)
    elif held.moment is not None:
        for b in rows:
            library.add_product_(held.moment[b], left[b], right[b], mu, 1.0)
        _update(held._replace(moment=None, total=held.moment), None, None, rows, rates, clear=False)
    else:
        for b in rows:
            library.add_product_(held.weight[b], left[b], right[b], beta, -lr)
            if held.copy is not None:
                held.copy[b].copy_(held.weight[b])


def _update(
    held: _Held, left: Tensor | None, right: Tensor | None, rows: list[int], rates: tuple, clear: bool
) -> None:
    """``refresh_kernel``. clear: what is held as the total becomes zero."""
    weight, copy, moment, square, total, late = held
    (_, r, c), C = weight.shape, 0 if left is None else left.shape[1]
    tile = refresh_tile(
        4 if left is None else left.itemsize, left is not None, moment is not None or total is not None
    )
    factors = [aligned(t) for t in filled((left, right), weight)]
    refresh_kernel[(triton.cdiv(r, tile.BM) * triton.cdiv(c, tile.BN), len(rows))](
        *filled((weight, copy, moment, square, total), weight), *factors,
        _on_device(tuple(rows), weight.device), weight if late is None else late, C, *rates, ROWS=r, COLS=c,
        PRODUCT=left is not None, MOMENT=moment is not None, ADAM=square is not None, TOTAL=total is not None,
        COPY=copy is not None, CLEAR=clear, READ=rates[2] != 0, LATE=late is not None, EPS=ADAM_EPS, GROUP=GROUP,
        **tile.sizes(), **tile.options(),
    )


def _launch_newton_schulz(grad: Tensor) -> Tensor:
    grad = aligned(grad)
    rows, cols = grad.shape[-2:]
    tall, R, L = rows > cols, min(rows, cols), max(rows, cols)
    out = torch.empty_like(grad)
    if not out.numel():
        return out
    M, a, b, c = grad.numel() // (R * L), *NS_COEFFICIENTS
    parts = grad.new_empty(M, triton.cdiv(R * L, PARTS))
    xs, grams = [grad.new_empty(M, R, L) for _ in range(2)], [grad.new_empty(M, R, R) for _ in range(2)]
    tile = WHOLE
    triangle, whole = triton.cdiv(R, tile.BM), triton.cdiv(R, tile.BM) * triton.cdiv(L, tile.BN)
    halves, launch = (triangle * (triangle + 1) // 2, M), tile.options()
    strides = (1, R) if tall else (L, 1)  # of element (i, j) of the wide matrix in grad and out
    with torch.cuda.device_of(grad):
        squares_kernel[(parts.shape[1], M)](
            grad, parts, SIZE=R * L, BLOCK=PARTS, num_warps=NUM_WARPS, num_stages=1
        )
        start_kernel[(triton.cdiv(R, 32) * triton.cdiv(L, 32), M)](
            grad, parts, xs[0], EPS=NS_EPS, R=R, L=L, G_R=strides[0], G_L=strides[1], COUNT=parts.shape[1],
            BP=LANES, BM=32, BN=32, num_warps=NUM_WARPS, num_stages=1,
        )
        for i in range(NS_STEPS):
            last, (x, new), (s, p) = i == NS_STEPS - 1, (xs[i % 2], xs[1 - i % 2]), grams
            symmetric_kernel[halves](x, s, s, 1.0, 0.0, R=R, L=L, ADD=False, BM=tile.BM, BK=tile.BK, **launch)
            symmetric_kernel[halves](s, s, p, c, b, R=R, L=R, ADD=True, BM=tile.BM, BK=tile.BK, **launch)
            O_R, O_L = strides if last else (L, 1)
            step_kernel[(whole, M)](
                p, x, out if last else new, a, R=R, L=L, O_R=O_R, O_L=O_L, GROUP=GROUP, **tile.sizes(), **launch
            )
    return out


for _name, _implementation in (
    ("cms_level_forward", _launch_forward), ("cms_level_backward", _launch_backward),
    ("cms_refresh_", _launch_refresh), ("cms_newton_schulz", _launch_newton_schulz),
):
    _library.impl(_name, _implementation, "CPU")  # interpreted or emulated
    _library.impl(_name, _implementation, "CUDA")


@torch.library.register_fake("hope_kernels::cms_level_forward", lib=_library)
def _(x, norm_gain, norm_bias, up_bias, gate_bias, down_bias, *rest):
    *matrices, _, _, _, keep = rest
    hidden = (*x.shape[:2], _hidden(matrices))
    gated = matrices[_PER_MATRIX] is not None or matrices[_PER_MATRIX + 1] is not None
    shapes = (x.shape, hidden, hidden if gated else 0, hidden) if keep else (0,) * 4
    return x.new_empty(x.shape), *(x.new_empty(s) for s in shapes)


def _no_gradient(ctx, *grads):
    raise RuntimeError(
        "cms: the Triton level has no gradient of its own: level_backward gives it, or the chunked backend"
    )


torch.library.register_autograd("hope_kernels::cms_level_forward", _no_gradient, lib=_library)


@torch.library.register_fake("hope_kernels::cms_level_backward", lib=_library)
def _(dy, x, z, g, norm_gain, *rest):
    return x.new_empty(x.shape if rest[-1] else 0), z.new_empty(z.shape), z.new_empty(0 if g is None else z.shape)


@torch.library.register_fake("hope_kernels::cms_refresh_", lib=_library)
def _(weight, *rest):
    return None


@torch.library.register_fake("hope_kernels::cms_newton_schulz", lib=_library)
def _(grad):
    return grad.new_empty(grad.shape)
