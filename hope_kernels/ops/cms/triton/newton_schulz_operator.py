"""The operator ``cms_newton_schulz``: the launches of ``newton_schulz.py``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...shared.triton_build import aligned
from ..level import NS_COEFFICIENTS, NS_EPS, NS_STEPS
from .newton_schulz import (
    LANES,
    NUM_WARPS,
    PARTS,
    squares_kernel,
    start_kernel,
    step_kernel,
    symmetric_kernel,
)
from .tiles import GROUP, WHOLE

_library = torch.library.Library("hope_kernels", "FRAGMENT")
_library.define("cms_newton_schulz(Tensor grad) -> Tensor")


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


_library.impl("cms_newton_schulz", _launch_newton_schulz, "CPU")  # interpreted or emulated
_library.impl("cms_newton_schulz", _launch_newton_schulz, "CUDA")


@torch.library.register_fake("hope_kernels::cms_newton_schulz", lib=_library)
def _(grad):
    return grad.new_empty(grad.shape)
