"""Who serves the output gate after the memories, in order of preference; PyTorch where a backend has none."""

from __future__ import annotations

from collections.abc import Callable

from ...backend import NO_GRADIENT, Call, Entry
from ..shared import cpu_library, triton_library
from . import cpp
from .forward import output_gate_chunked


def _triton(call: Call) -> Callable:
    from .triton.forward import output_gate_triton

    return output_gate_triton


def _cpp_unserved(call: Call) -> str | None:
    return None if call.gradient == NO_GRADIENT else "has no autograd graph"


ENTRIES = (
    Entry("cpp", lambda call: cpp.output_gate, _cpp_unserved, cpu_library.unavailable, default=True),
    Entry("triton", _triton, unavailable=triton_library.unavailable, serves=("cuda",)),
    Entry("chunked", lambda call: output_gate_chunked, default=True, serves=("*",)),
)
