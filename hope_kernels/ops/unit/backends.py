"""Who serves unit vectors, in order of preference."""

from __future__ import annotations

from collections.abc import Callable

from ...backend import NO_GRADIENT, Entry, Request
from ..shared import cpu_library
from . import cpp, cpp_training
from .forward import l2norm


def _cpp(request: Request) -> Callable:
    return cpp.unit if request.gradient == NO_GRADIENT else cpp_training.unit_training


def _cpp_unserved(request: Request) -> str | None:
    return cpu_library.unserved(request, request.config.head_dim)


ENTRIES = (
    Entry("cpp", _cpp, _cpp_unserved, cpu_library.unavailable, default=True),
    Entry("chunked", lambda request: l2norm, default=True, serves=("*",)),
)
