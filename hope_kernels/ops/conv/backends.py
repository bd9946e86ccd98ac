"""Who serves the convolution before the memories, in order of preference; PyTorch where a backend has none."""

from __future__ import annotations

from collections.abc import Callable

from ...backend import NO_GRADIENT, Call, Entry
from ..shared import cpu_library, triton_library
from . import cpp
from .forward import causal_conv_chunked


def _triton(call: Call) -> Callable:
    from .triton.forward import causal_conv_triton

    return causal_conv_triton


def _triton_unserved(call: Call) -> str | None:
    from .triton.forward import MAX_WINDOW

    window = call.config.conv_window
    return None if window is None or window <= MAX_WINDOW else f"serves windows up to {MAX_WINDOW}"


def _cpp_unserved(call: Call) -> str | None:
    return None if call.gradient == NO_GRADIENT else "has no autograd graph"


ENTRIES = (
    Entry("cpp", lambda call: cpp.causal_conv, _cpp_unserved, cpu_library.unavailable, default=True),
    Entry("triton", _triton, _triton_unserved, triton_library.unavailable, serves=("cuda",)),
    Entry("chunked", lambda call: causal_conv_chunked, default=True, serves=("*",)),
)
