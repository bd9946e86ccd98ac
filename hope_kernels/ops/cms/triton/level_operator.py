"""The operators ``cms_level_forward`` and ``cms_level_backward``: launches, fakes, and that they have no gradient."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...shared.triton_build import aligned, filled
from .backward import back_kernel, error_kernel
from .forward import down_kernel, up_kernel
from .norm import norm_backward_kernel, norm_kernel, norm_options, norm_tile
from .operands import MATRICES, PER_MATRIX, operands, slots_of
from .tiles import GROUP, RANK, Tile, down_tile, error_tile, up_tile

_library = torch.library.Library("hope_kernels", "FRAGMENT")
_library.define(
    "cms_level_forward(Tensor x, Tensor norm_gain, Tensor? norm_bias, Tensor? up_bias, Tensor? gate_bias, "
    "Tensor? down_bias, "
    f"{MATRICES}, float eps, bool layernorm, bool residual, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"cms_level_backward(Tensor dy, Tensor x, Tensor z, Tensor? g, Tensor norm_gain, {MATRICES}, float eps, "
    "bool layernorm, "
    "bool residual, bool need_dx) -> (Tensor, Tensor, Tensor)"
)


def _product(kernel, tile: Tile, width: int, x: Tensor, OWN: bool, R: int, factor: Tensor, **arguments) -> None:
    """Launches a product with an output ``width`` wide over the tokens of x [B, T, .]; factor: the pending
    part's outer one, of R slots. arguments: what the kernel takes beyond sizes and tiles."""
    B, T = x.shape[:2]
    groups, S = (B, T) if OWN else (1, B * T)
    kernel[(groups * triton.cdiv(S, tile.BM) * triton.cdiv(width, tile.BN),)](
        **arguments, S=S, T=T, groups=groups, R=R, slots=slots_of(factor) if R else 0, PENDING=R > 0, OWN=OWN,
        BR=RANK, GROUP=GROUP, **tile.sizes(), **tile.options(R > 0),
    )


def _hidden(matrices: tuple) -> int:
    """N, from the matrix up."""
    return (matrices[1] if matrices[0] is None else matrices[0]).shape[-2]


def _launch_forward(x, norm_gain, norm_bias, up_bias, gate_bias, down_bias, *rest) -> tuple[Tensor, ...]:
    *matrices, eps, layernorm, residual, keep = rest
    x = aligned(x)
    (B, T, d), N, size = x.shape, _hidden(matrices), x.itemsize
    up, gate, down = operands(matrices, x)
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
    up, gate, down = operands(matrices, x)
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


for _name, _implementation in (
    ("cms_level_forward", _launch_forward), ("cms_level_backward", _launch_backward),
):
    _library.impl(_name, _implementation, "CPU")  # interpreted or emulated
    _library.impl(_name, _implementation, "CUDA")


@torch.library.register_fake("hope_kernels::cms_level_forward", lib=_library)
def _(x, norm_gain, norm_bias, up_bias, gate_bias, down_bias, *rest):
    *matrices, _, _, _, keep = rest
    hidden = (*x.shape[:2], _hidden(matrices))
    gated = matrices[PER_MATRIX] is not None or matrices[PER_MATRIX + 1] is not None
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
