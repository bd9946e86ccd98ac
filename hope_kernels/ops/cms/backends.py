"""Who serves the CMS levels, in order of preference: modules with the functions of ``level.py``.

Where a backend has none for a configuration, and for training, PyTorch serves.
"""

from __future__ import annotations

from types import ModuleType

import torch

from ...backend import BY_ALL, Call, Entry, choose, gradient
from ...config import CMSConfig
from ..shared import cpu_library, triton_library
from . import cpp, level

TRAINING = "training runs in PyTorch"


def _cpp_unserved(call: Call) -> str | None:
    return TRAINING if call.gradient == BY_ALL else cpp.unserved(call.config, call.dtype, call.device)


def _triton(call: Call) -> ModuleType:
    from .triton import operator

    return operator


def _triton_unserved(call: Call) -> str | None:
    return TRAINING if call.gradient == BY_ALL else _triton(call).unserved(call.config, call.dtype, call.device)


ENTRIES = (
    Entry("cpp", lambda call: cpp, _cpp_unserved, cpu_library.unavailable, default=True),
    Entry("triton", _triton, _triton_unserved, triton_library.unavailable, serves=("cuda",)),
    Entry("chunked", lambda call: level, default=True, serves=("*",)),
)


def resolve(
    config: CMSConfig, dtype: torch.dtype, device: torch.device, backend: str | None = None, inner: bool = False
) -> ModuleType:
    """The functions of the CMS levels. inner: for the pass that learns, which needs no gradient of the
    parameters. Raises ValueError for an unknown backend."""
    return choose("cms", ENTRIES, Call(config, dtype, device, gradient(inner)), backend)
