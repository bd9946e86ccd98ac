"""Who serves the convolution before the memories, in order of preference; PyTorch where a backend has none."""

from __future__ import annotations

from collections.abc import Callable

from ...backend import NO_GRADIENT, Entry, Request
from ..shared import cpu_library, triton_library
from . import cpp, cpp_training
from .forward import causal_conv_chunked


def _triton(request: Request) -> Callable:
    from .triton.forward import causal_conv_triton

    return causal_conv_triton


def _triton_unserved(request: Request) -> str | None:
    from .triton.forward import MAX_WINDOW

    window = request.config.conv_window
    return None if window is None or window <= MAX_WINDOW else f"serves windows up to {MAX_WINDOW}"


def _cpp(request: Request) -> Callable:
    return cpp.causal_conv if request.gradient == NO_GRADIENT else cpp_training.causal_conv_training


def _cpp_unserved(request: Request) -> str | None:
    return cpu_library.unserved(request, request.config.d_model)


ENTRIES = (
    Entry("cpp", _cpp, _cpp_unserved, cpu_library.unavailable, default=True),
    Entry("triton", _triton, _triton_unserved, triton_library.unavailable, serves=("cuda",)),
    Entry("chunked", lambda request: causal_conv_chunked, default=True, serves=("*",)),
)
