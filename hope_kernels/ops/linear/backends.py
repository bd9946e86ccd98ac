"""Who serves projections, norms and gates, in order of preference: modules with the functions of ``forward.py``;
PyTorch where a backend has none."""

from __future__ import annotations

from types import ModuleType

from ...backend import Entry, Request, choose
from ..shared import cpu_library
from . import cpp, forward

ENTRIES = (
    Entry("cpp", lambda request: cpp, cpp.unserved_unasked, cpu_library.unavailable, default=True),
    Entry("cpp", lambda request: cpp, cpp.unserved, cpu_library.unavailable),
    Entry("chunked", lambda request: forward, default=True, serves=("*",)),
)


def resolve(request: Request, backend: str | None = None) -> ModuleType:
    """The functions for a call. Raises ValueError where ``backend`` cannot serve."""
    return choose("linear", ENTRIES, request, backend)
