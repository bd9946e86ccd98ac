"""The library of C++ kernels for CPUs (csrc/cpu/): whether it is there, loading it, and what it is handed.

It is plain C behind ctypes (pointers and sizes), so that one file serves every Python and every torch.
setup.py builds it where a C++ compiler is found.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level

from ...backend import NO_GRADIENT, Request
from ...tracing import constant_result

LIBRARY = str(Path(__file__).parents[2] / "_titans_cpu.so")
ABI = 23
NO_GRAPH = "has no gradient that torch.compile and transformations of torch.func can follow"
SIZE, POINTER, REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    if not os.path.exists(LIBRARY):
        return "its library was not built (a C++ compiler is needed when hope_kernels is installed)"
    try:
        lib = _loaded()
        if lib.hope_titans_abi() != ABI:
            return f"{os.path.basename(LIBRARY)} was built from another version; install hope_kernels again"
    except (OSError, AttributeError) as e:
        return f"{os.path.basename(LIBRARY)} cannot be loaded: {e}"
    if not lib.hope_titans_supported():
        return "needs a CPU with AVX2 and FMA"
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_alone)
    return lib


def _alone() -> None:
    """A process that was forked has none of the threads of the pool it inherited: to wait for them, in a kernel of
    this library or of PyTorch, would take forever. So it computes with one thread, as workers of a DataLoader do."""
    torch.set_num_threads(1)


def _loaded() -> ctypes.CDLL:
    """The library is linked with no OpenMP: it takes the one of PyTorch, whose names are global once torch is
    imported, so that a process has one pool of threads. Where PyTorch has none: the system's."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(LIBRARY)


def library() -> ctypes.CDLL:
    """The library. Raises RuntimeError where ``unavailable()`` has a reason."""
    found = _library()
    if isinstance(found, str):
        raise RuntimeError(f"backend 'cpp': {found}")
    return found


@constant_result
def unavailable() -> str | None:
    """Why this machine cannot use the library, or None."""
    found = _library()
    return found if isinstance(found, str) else None


class Function:
    """The library's function ``name`` with arguments of these ctypes kinds; called, it raises as
    ``check_outcome``. op: what errors call it."""

    def __init__(self, name: str, op: str, *kinds: type):
        self.name, self.op, self.kinds, self._bound = name, op, kinds, None

    def bound(self):
        """The function itself, as ctypes has it: returns 0, 1 (no memory) or 2 (bad arguments)."""
        if self._bound is None:
            function = getattr(library(), self.name)
            function.argtypes, function.restype = list(self.kinds), ctypes.c_int
            self._bound = function
        return self._bound

    def __call__(self, *arguments: int | float | None) -> None:
        check_outcome(self.bound()(*arguments), self.op)


def unserved(request: Request, width: int) -> str | None:
    """Why what surrounds the memories cannot be served, or None. width: of its vectors."""
    if request.device.type != "cpu" or request.dtype != torch.float32:
        return f"serves float32 on the CPU, not {request.dtype} on {request.device.type}"
    if request.gradient != NO_GRADIENT and not has_autograd():
        return NO_GRAPH
    if request.gradient != NO_GRADIENT and torch.is_autocast_enabled("cpu"):
        return "serves float32, which projections under autocast are not"
    return None if width % 8 == 0 else f"serves widths that are multiples of 8, not {width}"


def has_autograd() -> bool:
    """Whether functions of PyTorch's autograd work here: torch.compile and torch.func cannot look inside them."""
    return not torch.compiler.is_compiling() and maybe_current_level() is None


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether the library can read all of them: fp32 on the CPU, and of no class of their own."""
    return all([
        t is None or t.dtype is torch.float32 and t.is_cpu and type(t) in (Tensor, nn.Parameter) for t in tensors
    ])


def address(
    t: Tensor | None, count: int, name: str = "a tensor of the layer, its input or its state",
    dtype: torch.dtype = torch.float32,
) -> int | None:
    """What the library is handed for ``t``, ``count`` numbers of ``dtype`` one after another. Raises
    ValueError for anything else: it would read, and write, past the end."""
    if t is None:
        return None
    if t.dtype is not dtype or t.numel() != count or not t.is_cpu or not t.is_contiguous():
        raise ValueError(
            f"backend 'cpp': {name} has dtype {t.dtype}, shape {list(t.shape)} and strides {list(t.stride())} on "
            f"{t.device}, expected {count} numbers of {dtype}, contiguous, on the CPU (state.to(...) casts "
            "and moves a state)"
        )
    return t.data_ptr()


def check_outcome(outcome: int, op: str) -> None:
    """Raises MemoryError or ValueError where the library returned something other than 0."""
    if outcome == 1:
        raise MemoryError(f"{op}: backend 'cpp' could not allocate its work space; nothing was read")
    if outcome:
        raise ValueError(
            f"{op}: backend 'cpp' was handed sizes, lengths or tensors that do not fit each other; nothing was read"
        )


def row_array(values: list[int], B: int) -> ctypes.Array:
    """One int64 a row. Raises ValueError for another number of rows."""
    if len(values) != B:
        raise ValueError(f"backend 'cpp': {len(values)} lengths or positions, expected one per row ({B})")
    return (ctypes.c_int64 * B)(*values)
