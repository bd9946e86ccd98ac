"""resolve(): the only dispatch code. Which implementation serves an operator follows from configuration, dtype and device alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

BACKENDS = ("reference", "chunked", "triton", "cuda")
_REASONS = {
    "triton": "this version has no Triton kernels yet",
    "cuda": "this version has no CUDA C++ kernels yet",
}


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if it can be used here, else the reason why not."""
    return {name: _REASONS.get(name) for name in BACKENDS}


def resolve(op: str, config, dtype: torch.dtype, device: torch.device, backend: str | None = None) -> Callable:
    """The implementation of ``op`` ("titans") for this configuration. ``backend=None`` picks the best one verified on the device.

    Raises ValueError, with the reason, for a backend that cannot serve the request.
    """
    name = "chunked" if backend is None else backend
    if name not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {name!r}, expected one of {BACKENDS}")
    if name in _REASONS:
        raise ValueError(f"{op}: backend {name!r} cannot be used: {_REASONS[name]}")
    if name == "reference":
        from .ops.titans.reference_backend import titans_reference

        return titans_reference
    from .ops.titans.chunked import titans_chunk

    return titans_chunk
