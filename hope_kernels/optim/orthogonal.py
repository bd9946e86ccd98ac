"""Matrices of one shape made orthogonal together, and the learning rates that belong to such steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import NO_GRADIENT, Entry, Request, choose
from ..ops.cms import cpp_step, level
from ..ops.cms.level import NS_COEFFICIENTS, NS_EPS, NS_STEPS
from ..ops.shared import cpu_library, triton_library

BATCH = 1 << 26  # elements of the matrices that are stacked at once: what a step needs beside the state
ADJUSTMENTS = ("original", "match_rms_adamw")


def _triton(request: Request) -> Callable[..., Tensor]:
    from ..ops.cms.triton import operator

    return operator.newton_schulz


def _triton_unserved(request: Request) -> str | None:
    if request.dtype != torch.float32:
        return f"serves torch.float32, not {request.dtype}"
    if request.device.type != "cuda" and not triton_library.on_cpu():
        return f"needs a CUDA device, not {request.device.type}"
    return None


def _cpp_unserved(request: Request) -> str | None:
    served = cpp_step.serves(request.dtype, request.device)
    return None if served else f"serves fp32 matrices on a CPU, not {request.dtype} on {request.device.type}"


ENTRIES = (
    Entry(
        "cpp", lambda request: cpp_step.newton_schulz, _cpp_unserved, cpu_library.unavailable, default=True
    ),
    Entry("triton", _triton, _triton_unserved, triton_library.unavailable),
    Entry("chunked", lambda request: level.newton_schulz, default=True, serves=("reference",)),
)


def check_backend(name: str, backend: Any) -> None:
    """Raises ValueError for a backend that does not exist or has no Newton-Schulz iteration."""
    known = [entry.backend for entry in ENTRIES] + ["reference"]
    if backend is not None and backend not in known:
        raise ValueError(f"{name}: argument backend is {backend!r}, expected None or one of {known}")


def orthogonalised(
    matrices: Sequence[Tensor], dtype: torch.dtype | None = None, backend: str | None = None
) -> list[Tensor]:
    """About U V^T of the singular value decomposition of each of ``matrices``, all [r, c], stacked.

    dtype None: in their own, 16-bit ones in fp32, or in bf16 where that pays (``level.orthogonal``), by
    ``backend`` (None: the best one verified on the device). torch.bfloat16: as torch.optim.Muon does it, from
    the start to the end in bf16. Raises ValueError for a backend that cannot serve.
    """
    found: list[Tensor] = []
    at_once = max(1, BATCH // matrices[0].numel())
    for i in range(0, len(matrices), at_once):
        stacked = torch.stack(list(matrices[i : i + at_once]))
        narrow = stacked.dtype in (torch.bfloat16, torch.float16)
        if dtype == torch.bfloat16:
            step = _in_bf16(stacked)
        else:
            stacked = stacked.float() if narrow else stacked
            request = Request(None, stacked.dtype, stacked.device, NO_GRADIENT)
            step = choose("newton_schulz", ENTRIES, request, backend)(stacked, narrow=narrow)
        found.extend(step.unbind())
    return found


def _in_bf16(grads: Tensor) -> Tensor:
    """[n, r, c] -> [n, r, c] in bf16, with torch.optim.Muon's operations in its order: on a CPU, where
    products of many matrices sum in another order and save nothing, one matrix after another and so to the
    same bits."""
    if len(grads) > 1 and grads.device.type == "cpu":
        return torch.cat([_in_bf16(g[None]) for g in grads])
    tall = grads.shape[1] > grads.shape[2]
    x = grads.bfloat16()
    x = x.mT if tall else x
    x = x / torch.stack([m.norm() for m in x]).clamp(min=NS_EPS)[:, None, None]
    x, product = (x[0], torch.addmm) if len(x) == 1 else (x, torch.baddbmm)
    a, b, c = NS_COEFFICIENTS
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(grads.shape)


def adjusted(lr: float, adjustment: str, shape: Sequence[int]) -> float:
    """The rate of an orthogonal step [r, c]: lr sqrt(max(1, r / c)), or 0.2 lr sqrt(max(r, c)), at which its
    elements are about as large as those of AdamW's step."""
    r, c = shape
    return lr * (math.sqrt(max(1, r / c)) if adjustment == "original" else 0.2 * math.sqrt(max(r, c)))
