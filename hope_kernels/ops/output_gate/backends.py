"""Who serves the output gate after the memories, in order of preference; PyTorch where a backend has none."""

from __future__ import annotations

from collections.abc import Callable

from ...backend import NO_GRADIENT, Entry, Request
from ..shared import cpu_library, triton_library
from . import cpp, cpp_training
from .forward import output_gate_chunked


def _triton(request: Request) -> Callable:
    from .triton.forward import output_gate_triton

    return output_gate_triton


def _cpp(request: Request) -> Callable:
    return cpp.output_gate if request.gradient == NO_GRADIENT else cpp_training.output_gate_training


def _cpp_unserved(request: Request) -> str | None:
    return cpu_library.unserved(request, request.config.head_dim)


ENTRIES = (
    Entry("cpp", _cpp, _cpp_unserved, cpu_library.unavailable, default=True),
    Entry("triton", _triton, unavailable=triton_library.unavailable, serves=("cuda",)),
    Entry("chunked", lambda request: output_gate_chunked, default=True, serves=("*",)),
)
