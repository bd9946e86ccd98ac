"""Who serves the CMS levels, in order of preference: modules with the functions of ``level.py``.

Where a backend has none for a configuration, PyTorch serves; training, of the Triton ones, too.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from ...backend import BY_ALL, Entry, Request, choose, gradient
from ...config import CMSConfig
from ..shared import cpu_library, triton_library
from ..shared.across import Across
from . import cpp, cpp_gated, cpp_step, cpp_training, level

TRAINING = "training runs in PyTorch"


def _cpp(request: Request) -> ModuleType:
    return cpp_training if request.gradient == BY_ALL else cpp


def _cpp_unserved(request: Request) -> str | None:
    return _cpp(request).unserved(request.config, request.dtype, request.device)


def _gated_unserved(request: Request) -> str | None:
    return TRAINING if request.gradient == BY_ALL else cpp_gated.unserved(
        request.config, request.dtype, request.device
    )


def _triton(request: Request) -> ModuleType:
    from .triton import operator

    return operator


def _triton_unserved(request: Request) -> str | None:
    if request.gradient == BY_ALL:
        return TRAINING
    return _triton(request).unserved(request.config, request.dtype, request.device)


ENTRIES = (
    Entry("cpp", _cpp, _cpp_unserved, cpu_library.unavailable, default=True),
    Entry("cpp", lambda request: cpp_gated, _gated_unserved, cpu_library.unavailable),
    Entry("triton", _triton, _triton_unserved, triton_library.unavailable, serves=("cuda",)),
    Entry("chunked", lambda request: level, default=True, serves=("*",)),
)


def resolve(
    config: CMSConfig, dtype: torch.dtype, device: torch.device, backend: str | None = None, inner: bool = False
) -> ModuleType:
    """The functions of the CMS levels. inner: for the pass that learns, which needs no gradient of the
    parameters; where nobody has asked for a backend, levels that PyTorch reads are updated in C++. Raises
    ValueError for an unknown backend."""
    found = choose("cms", ENTRIES, Request(config, dtype, device, gradient(inner)), backend)
    in_cpp = inner and backend is None and found is level and cpp_step.serves(dtype, device)
    return cpp_step if in_cpp else found


def divided(across: Across) -> Any:
    """The functions of levels of which each process has some of the hidden units: PyTorch's, with one sum over
    the processes in the forward and one in the backward. Steps that take every element for itself need none;
    ``muon_step_`` and ``normalise_`` find ``across`` here."""
    return SimpleNamespace(
        across=across,
        level_forward=partial(level.level_forward, across=across),
        level_backward=partial(level.level_backward, across=across),
        refresh_=level.refresh_, outer_add_=level.outer_add_, newton_schulz=level.newton_schulz,
    )
