"""A device that Triton compiles for and launches on, without a GPU: its PTX runs in tools.ptx.machine, on
tensors of the CPU.

    device = triton_device.install(80)       # from now on Triton's kernels take tensors of the CPU, on an sm_80
    device.options = Options(seed=3)         # of the machine, for the launches to come
    device.arch = 90                         # other kernels: nothing compiled for one serves the other

Triton's own path is untouched: its launcher binds and specialises the arguments, its compiler makes the PTX
that a GPU of this architecture would be given, its cache keeps it (build/triton_ptx). Two parts are ours: the
compiler ends at PTX, without an assembler, and the driver's launcher packs the arguments into a parameter
block as the CUDA driver does. A kernel may touch the tensors of its arguments, each from its first to its last
element, and nothing else.

Triton decides when it is imported whether it interprets kernels: TRITON_INTERPRET must not be set then.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from hope_kernels.ops.shared.triton_build import SHARED_KIB
from tools.ptx.machine import Kernel, Options, Region

CACHE = Path(__file__).parents[2] / "build" / "triton_ptx"
SCALARS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d",
}  # as struct packs them; a pointer is 8 bytes, aligned like every parameter to its own size


@dataclass(frozen=True)
class Launch:
    """What was compiled for a launch. module: where the kernel is defined; types: argument -> Triton's name of
    its type, a tuple of them for a group; constants: argument -> value of what is known at compile time; aligned:
    paths of the arguments that are multiples of 16."""

    kernel: str
    module: str
    arch: int
    types: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[tuple[int, ...], ...]
    num_warps: int
    num_stages: int
    maxnreg: int | None
    shared: int


class PtxBackend(CUDABackend):
    """Triton's compiler for NVIDIA GPUs, up to PTX."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def hash(self) -> str:
        return f"ptx-{super().hash()}"

    def add_stages(self, stages: dict, options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]


class Device(DriverBase):
    """What Triton asks a driver for, and what a launch needs. ``launches``: how often each kernel was launched;
    ``kernels``: what the machine decoded, with its counts; ``changed``: kernels to run in the place of others;
    ``multiprocessors``: what kernels are told of (the memory's takes four programs for each); ``options``: the
    machine's, of the next launch: the seed of a random schedule goes up by one with every launch."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch, self.options, self.multiprocessors = arch, Options(), 1
        self.launches: Counter[Launch] = Counter()
        self.kernels: dict[str, Kernel] = {}
        self.changed: dict[Kernel, Kernel] = {}
        self.utils, self.launcher_cls = self, self._launcher

    @classmethod
    def is_active(cls) -> bool:
        return False  # never found by looking, only installed

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed on this device")

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_KIB[device] * 1024, "multiprocessor_count": self.multiprocessors, "warpSize": 32
        }

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[str, Kernel, int, int, int]:
        """(module, kernel, registers, spills, most threads a block)"""
        text = ptx.decode()
        if text not in self.kernels:
            self.kernels[text] = Kernel(text, name)
        return name, self.kernels[text], 0, 0, 1024

    def _launcher(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(self, source, metadata)


class Launcher:
    """Launches one compiled kernel."""

    def __init__(self, device: Device, source: Any, metadata: Any) -> None:
        self.device, self.metadata = device, metadata
        self.types, self.names = tuple(source.signature.values()), tuple(source.signature)
        self.launch = Launch(
            source.fn.__name__, source.fn.__module__, metadata.target.arch, tuple(source.signature.items()),
            tuple((self._name(path), value) for path, value in source.constants.items()),
            tuple(path for path, attrs in source.attrs.items() if attrs), metadata.num_warps, metadata.num_stages,
            metadata.maxnreg, metadata.shared,
        )

    def _name(self, path: tuple[int, ...]) -> str:
        return ".".join([self.names[path[0]], *map(str, path[1:])])

    def __call__(
        self, x: int, y: int, z: int, stream: int, kernel: Kernel, packed: Any, launch_metadata: Any, enter: Any,
        leave: Any, *arguments: Any
    ) -> None:
        if not x * y * z:
            return
        block, regions, kept = bytearray(), {}, []
        for name, kind, value in flattened(self.names, self.types, arguments):
            if kind.startswith("*"):
                region = region_of(name, value)
                if region is not None:
                    regions.setdefault((region.address, region.bytes), region)
                value = 0 if region is None else region.address
            append(block, kind, value)
        m = self.metadata
        for name in ("global_scratch", "profile_scratch"):
            size, region = getattr(m, f"{name}_size"), None
            if size:
                kept.append(torch.empty(x * y * z * m.num_ctas * size + 128, dtype=torch.uint8))
                region = Region(-(-kept[-1].data_ptr() // 128) * 128, x * y * z * m.num_ctas * size, name)
                regions[region.address, region.bytes] = region
            append(block, "*u8", 0 if region is None else region.address)
        last = kernel.parameters[-1]
        if len(block) != last.offset + last.bytes:
            raise RuntimeError(f"{kernel.name} takes {last.offset + last.bytes} bytes of arguments, not {len(block)}")
        kernel = self.device.changed.get(kernel, kernel)
        self.device.launches[self.launch] += 1
        options = self.device.options
        if options.seed:
            self.device.options = replace(options, seed=options.seed + 1)
        grid, threads = (x * m.num_ctas, y, z), 32 * m.num_warps
        kernel.launch(grid, threads, bytes(block), list(regions.values()), m.shared, m.num_ctas, options)


def flattened(names: Any, types: Any, values: Any) -> Iterator[tuple[str, str, Any]]:
    """(name, type, value) of every argument that a kernel has at run time; groups of them in order."""
    for name, kind, value in zip(names, types, values, strict=True):
        if isinstance(kind, tuple):
            fields = getattr(value, "_fields", range(len(kind)))
            yield from flattened([f"{name}.{field}" for field in fields], kind, value)
        elif kind != "constexpr":
            yield name, kind, value


def region_of(name: str, t: Tensor | None) -> Region | None:
    """From the first to the last element of a tensor; None: it has none."""
    if t is None or not t.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return Region(t.data_ptr(), (last + 1) * t.element_size(), name)


def append(block: bytearray, kind: str, value: Any) -> None:
    """Appends a parameter at the next multiple of its size."""
    code = "Q" if kind.startswith("*") else SCALARS[kind]
    block.extend(bytes(-len(block) % struct.calcsize(code)))
    block.extend(struct.pack(f"<{code}", value))


def install(arch: int) -> Device:
    """Makes an emulated GPU of this architecture (80: sm_80) the one that Triton uses in this process."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton was imported with TRITON_INTERPRET set: it has no compiled kernels")
    backends["nvidia"] = Backend(PtxBackend, backends["nvidia"].driver)
    triton.knobs.cache.dir = str(CACHE)
    device = Device(arch)
    driver.set_active(device)
    return device
