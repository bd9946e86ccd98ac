"""backend="cuda" in the PTX machine, for tests: which GPU, in which order its warps run, how to reach it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from problems import DEVICE

from benchmarks.measure import poisoned
from hope_kernels import TitansConfig, available_backends
from hope_kernels.ops.shared import cuda_library as library
from hope_kernels.ops.shared.triton_build import SHARED_KIB
from tools import build_cuda
from tools.ptx import cuda as ptx
from tools.ptx.machine import Options

BF16, FP16 = torch.bfloat16, torch.float16
NAMES = {BF16: "bf16", FP16: "fp16"}


@contextmanager
def driven() -> Iterator[ptx.Driver]:
    """Launches of the emulated library go to the driver. Skips where nothing can be compiled."""
    if DEVICE == "cuda":
        pytest.skip("a GPU runs the kernels themselves")
    if build_cuda.nvcc() is None or build_cuda.host_compiler() is None:
        pytest.skip("needs nvcc and a C++ compiler")
    path = build_cuda.build_emulated()
    library.emulate(str(path))
    assert available_backends()["cuda"] is None
    with ptx.Driver(path) as gpu, poisoned():  # outputs and scratch start as NaN
        yield gpu
    library.emulate(None)


def image_of(capability: int) -> int:
    """The architecture of the code that such a GPU runs."""
    return 80 if capability < 90 else capability


def emulate(gpu: ptx.Driver, capability: int, seed: int = 0, resident: int = 9) -> None:
    """The GPU of the next calls, and the schedule of its blocks and warps. ``resident`` is no multiple of the
    blocks that work together."""
    gpu.arch = image_of(capability)
    gpu.options = Options(seed=seed, resident=resident)
    torch.ops.hope_kernels_cuda.emulate(capability, 1024 * SHARED_KIB[capability], gpu.arch, 0, 9, True)


def config_of(width: int, mult: int, chunk: int = 16, heads: int = 1, **switches) -> TitansConfig:
    both = dict(chunk_memory=chunk, chunk_other=chunk)
    return TitansConfig(width * heads, heads, hidden_mult=mult, **both, **switches)
