"""The library of CUDA C++ kernels (csrc/cuda/): whether it is there, and loading it. Importing this module
does neither.

Tests call ``emulate`` with the path of a library that ``tools.build_cuda.build_emulated`` made: it puts the
same kernels on an emulated GPU in the CPU's memory, what TRITON_INTERPRET=1 is to Triton.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from ...tracing import constant_result

LIBRARY = str(Path(__file__).parents[2] / "_hope_cuda.so")
_loaded: dict[str, str | None] = {}  # path -> None, or why it cannot be loaded
_emulated: str | None = None


def emulate(path: str | None) -> None:
    """From now on this process uses the emulated library at ``path``; None: the real one again."""
    global _emulated
    _emulated = path


@constant_result
def emulated() -> str | None:
    """The emulated library's path, if this process is to use it."""
    return _emulated


@constant_result
def unavailable() -> str | None:
    """Why this process cannot use the kernels, or None: then ``torch.ops.hope_kernels_cuda`` has them."""
    if path := emulated():
        return _load(path)
    if not os.path.exists(LIBRARY):
        return "its library was not built (hope_kernels has to be installed where nvcc is, beside a PyTorch for CUDA)"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "needs a CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a CUDA device of compute capability 8.0 or more"
    return _load(LIBRARY)


def _load(path: str) -> str | None:
    """The reason why the library at ``path`` cannot be used, or None. A process can hold one: its operators
    have one name."""
    if path not in _loaded:
        other = next((p for p, reason in _loaded.items() if reason is None), None)
        if other is not None:
            return f"this process has already loaded {other}"
        try:
            torch.ops.load_library(path)
            for name in ("titans_scan", "titans_advance"):
                torch.library.register_fake(f"hope_kernels_cuda::{name}", _titans_scan_fake)
            _loaded[path] = None
        except (OSError, RuntimeError) as e:
            _loaded[path] = f"{os.path.basename(path)} cannot be loaded: {e}"
    return _loaded[path]


def _titans_scan_fake(x, q, *others):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@constant_result
def unserved(D: int, N: int, C: int, device: torch.device) -> str | None:
    """Why the kernels cannot serve heads of width D with N hidden units and chunks of C tokens on a device,
    or None. Needs the library."""
    if emulated():
        return torch.ops.hope_kernels_cuda.unserved(D, N, C, 0) or None
    return _unserved(D, N, C, torch.cuda.current_device() if device.index is None else device.index)


def at_once(D: int, N: int, C: int, device: torch.device) -> int:
    """How many (row, head) pairs of a prefill the device runs at once; where there are more, they come in
    turns. Needs the library, and what it serves."""
    index = 0 if emulated() else torch.cuda.current_device() if device.index is None else device.index
    return torch.ops.hope_kernels_cuda.at_once(D, N, C, index)


@cache
def _unserved(D: int, N: int, C: int, index: int) -> str | None:
    return torch.ops.hope_kernels_cuda.unserved(D, N, C, index) or None
