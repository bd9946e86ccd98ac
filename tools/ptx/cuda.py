"""The CUDA C++ kernels as nvcc compiles them, in the PTX machine, behind backend="cuda".

The emulated library (tools.build_cuda.build_emulated) checks, plans and launches as the real one does. Within
``Driver`` its launches run here instead of in the fibers of csrc/emulator: the same kernel, by name, out of
nvcc's PTX, with the same bytes of parameters, on the memory of the call's tensors and no other.

    with Driver(library) as gpu:
        gpu.arch, gpu.options = 80, Options(seed=1)
        titans_chunk(..., backend="cuda")
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from .. import build_cuda
from .machine import Kernel, Options, Region

SYMBOL = re.compile(r"_ZN4hope\d+(titans_\w+?)ILi(\d+)ENS_4(bf16|fp16)E\w*")
_WARPGROUPS = re.compile(r"ENS_4bf16ELi\dELi[23]E")  # activation, mode
ENTRY = re.compile(r"^\.visible \.entry (\w+)\(", re.M)


class _Region(ctypes.Structure):  # csrc/emulator/executor.h has these two
    _fields_ = [("address", ctypes.c_void_p), ("bytes", ctypes.c_int64), ("name", ctypes.c_char_p)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_int64), ("parameters", ctypes.c_void_p), ("parameter_bytes", ctypes.c_int64),
        ("regions", ctypes.POINTER(_Region)), ("region_count", ctypes.c_int64), ("blocks", ctypes.c_int64),
        ("threads", ctypes.c_int), ("cluster", ctypes.c_int), ("shared_bytes", ctypes.c_int),
    ]


_Executor = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Launch))


def source_of(name: str) -> Path:
    """The file of kernels that has the kernel of this (mangled) name."""
    _, width, kind = SYMBOL.fullmatch(name).groups()
    way = "_warpgroups" * bool(_WARPGROUPS.search(name))
    return next(p for p in build_cuda.kernels() if p.stem == f"{width}_{kind}{way}")


def names(ptx: str) -> list[str]:
    return ENTRY.findall(ptx)


@cache
def _ptx(source: Path, arch: int) -> str:
    return build_cuda.ptx(source, arch).read_text()


def alone(ptx: str, name: str) -> str:
    """The PTX without the other kernels, every line where it was: what is left is fast to read, and its line
    numbers are those of the file."""
    found = list(ENTRY.finditer(ptx))
    first, start = found[0].start(), next(m.start() for m in found if m[1] == name)
    stop = re.compile(r"^\}", re.M).search(ptx, start).end()
    files = "\n".join(re.findall(r"^[ \t]*\.file\s.*", ptx, re.M))
    blank = "\n" * ptx.count("\n", first, start)
    return f"{ptx[:first]}{blank}{ptx[start:stop]}\n{files}\n"


def text(name: str, arch: int) -> str:
    """The PTX of one kernel."""
    return alone(_ptx(source_of(name), arch), name)


@cache
def kernel(name: str, arch: int) -> Kernel:
    """One kernel, decoded once."""
    return Kernel(text(name, arch), name)


def symbols(library: Path) -> dict[int, str]:
    """The kernels that the library launches: their places in it, and their names."""
    done = subprocess.run(["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    found = (line.split() for line in done.stdout.splitlines())
    return {int(at, 16): name for at, _, name in found if SYMBOL.fullmatch(name)}


class Driver:
    """The GPU that the emulated library's launches go to while it is entered. ``ran``: the kernels that have
    run; ``kernel``: where they come from."""

    def __init__(self, library: Path):
        self.arch, self.options = 90, Options()
        self.kernel: Callable[[str, int], Kernel] = kernel
        self.ran: dict[tuple[str, int], int] = {}
        self.error: BaseException | None = None
        self._symbols = symbols(library)
        self._callback = _Executor(self._execute)
        self._message: ctypes.Array | None = None

    def __enter__(self) -> Driver:
        torch.ops.hope_kernels_cuda.execute_by(ctypes.cast(self._callback, ctypes.c_void_p).value)
        return self

    def __exit__(self, *_: object) -> None:
        torch.ops.hope_kernels_cuda.execute_by(0)

    @contextmanager
    def fibers(self) -> Iterator[None]:
        """Meanwhile launches run the sources, as if nobody had entered this."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _execute(self, pointer) -> int | None:
        try:
            self.launch(pointer.contents)
        except BaseException as error:  # none may pass through C++
            self.error = error
            self._message = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
            return ctypes.addressof(self._message)
        return None

    def launch(self, what: _Launch) -> None:
        name = self._symbols[what.kernel]
        self.ran[name, self.arch] = self.ran.get((name, self.arch), 0) + 1
        kernel = self.kernel(name, self.arch)
        last = kernel.parameters[-1]
        wanted, given = last.offset + last.bytes, what.parameter_bytes
        if wanted != given:
            raise ValueError(f"{name} takes {wanted} bytes of parameters, the host has {given}")
        lent = [Region(r.address, r.bytes, r.name.decode()) for r in what.regions[: what.region_count]]
        parameters = ctypes.string_at(what.parameters, given)
        kernel.launch(
            (what.blocks, 1, 1), what.threads, parameters, lent, what.shared_bytes, what.cluster, self.options
        )
