"""resolve(): the only dispatch code. Which implementation serves an operator follows from configuration,
dtype and device alone."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from .ops.shared import cuda_library as cuda
from .ops.titans import cpp

BACKENDS = ("reference", "chunked", "cpp", "triton", "cuda")
DEVICE_DECIDES = ("triton", "cuda")  # those whose kernels ask the device, not the host, where a row stands


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if it can be used here, else the reason why not."""
    return {backend: _unavailable(backend) for backend in BACKENDS}


def _unavailable(backend: str) -> str | None:
    if backend == "cpp":
        return cpp.unavailable()
    if backend == "triton":
        try:
            from .ops.titans.triton import operator as triton
        except ImportError as e:
            return f"Triton cannot be imported: {e}"
        return triton.unavailable()
    return cuda.unavailable() if backend == "cuda" else None


def resolve(
    op: str, config, dtype: torch.dtype, device: torch.device, backend: str | None = None,
    constant_memory: bool = False
) -> Callable:
    """The implementation of ``op`` ("titans") for this configuration. ``backend=None`` picks the best one
    verified on the device: the Triton and CUDA kernels, which no GPU has run yet, only on request.

    Which one that is follows from configuration, dtype, device and whether gradients are on, never from the
    shape of a call. constant_memory: the gradients asked for are those of reads by their queries alone.
    Raises ValueError, with the reason, for a backend that cannot serve the request.
    """
    from .ops.titans.scan import titans_chunk

    if backend is None:
        return titans_chunk if cpp.unserved(config, dtype, device, constant_memory) else cpp.titans_cpp
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}, expected one of {BACKENDS}")
    reason, chosen = _unavailable(backend), titans_chunk
    if reason is None and backend == "cpp":
        reason, chosen = cpp.unserved(config, dtype, device, constant_memory), cpp.titans_cpp
    elif reason is None and backend == "triton":
        from .ops.titans.triton import operator as triton
        from .ops.titans.triton import training as triton_training

        chosen = triton_training.titans_triton_training if torch.is_grad_enabled() else triton.titans_triton
        reason = triton.unserved(config, dtype, device)
    elif reason is None and backend == "cuda":
        from .ops.titans import cuda as titans

        reason, chosen = titans.unserved(config, dtype, device), titans.titans_cuda
    elif backend == "reference":
        from .ops.titans.reference_backend import titans_reference as chosen
    if reason is not None:
        raise ValueError(
            f"{op}: backend {backend!r} cannot be used: {reason}; the chunked backend serves every configuration"
        )
    return chosen


def resolve_conv_and_gate(config, backend: str | None = None) -> tuple[Callable, Callable]:
    """The convolution before the memories and the output gate behind them, for a ``backend`` that ``resolve``
    accepted: Triton kernels with "triton", and with "cuda" where Triton can be used (windows above 8 keep the
    PyTorch convolution), else PyTorch."""
    from .ops.conv.forward import causal_conv_chunked as conv
    from .ops.output_gate.forward import output_gate_chunked as gate

    if backend == "triton" or (backend == "cuda" and _unavailable("triton") is None):
        from .ops.conv.triton.forward import MAX_WINDOW, causal_conv_triton
        from .ops.output_gate.triton.forward import output_gate_triton as gate

        conv = causal_conv_triton if config.conv_window is None or config.conv_window <= MAX_WINDOW else conv
    return conv, gate


def resolve_cms(
    config, dtype: torch.dtype, device: torch.device, backend: str | None = None, inner: bool = False
) -> ModuleType:
    """The functions of the CMS levels (``ops/cms/chunked.py`` says which) for a ``backend`` (Triton's with
    "cuda" too), those in PyTorch where it has none for this configuration. ``inner``: for the pass that
    learns, which needs no gradient of the parameters; training always runs in PyTorch.

    Raises ValueError for an unknown backend.
    """
    from .ops.cms import cpp as compiled
    from .ops.cms import level as chunked

    if backend not in (None, *BACKENDS):
        raise ValueError(f"cms: unknown backend {backend!r}, expected one of {BACKENDS}")
    if torch.is_grad_enabled() and not inner:
        return chunked
    if backend in (None, "cpp") and compiled.unserved(config, dtype, device) is None:
        return compiled
    if backend in ("triton", "cuda") and _unavailable("triton") is None:
        from .ops.cms.triton import operator as triton

        if triton.unserved(config, dtype, device) is None:
            return triton
    return chunked
