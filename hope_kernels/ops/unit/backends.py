"""Who serves unit vectors, in order of preference."""

from __future__ import annotations

from ...backend import Entry, Request
from ..shared import cpu_library
from . import cpp
from .forward import l2norm


def _cpp_unserved(request: Request) -> str | None:
    return cpu_library.unserved(request, request.config.head_dim)


ENTRIES = (
    Entry("cpp", lambda request: cpp.unit, _cpp_unserved, cpu_library.unavailable, default=True),
    Entry("chunked", lambda request: l2norm, default=True, serves=("*",)),
)
