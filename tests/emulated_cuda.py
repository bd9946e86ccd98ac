"""The kernels of backend="cuda" for tests: on a GPU where there is one, else compiled for the emulated one."""

import pytest
import torch

from hope_kernels import available_backends
from hope_kernels.ops.shared import cuda_library as library
from hope_kernels.ops.shared.triton_build import SHARED_KIB
from tools import build_cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The library that backend="cuda" calls."""
    if DEVICE == "cuda" and not build_cuda.LIBRARY.exists():
        pytest.skip("the CUDA library was not built (python -m tools.build_cuda)")
    if DEVICE == "cpu" and build_cuda.host_compiler() is None:
        pytest.skip("needs a CUDA device or a C++ compiler")
    if DEVICE == "cpu":
        library.emulate(str(build_cuda.build_emulated()))
    assert available_backends()["cuda"] is None
    yield
    library.emulate(None)


def emulate(capability: int = 90, seed: int = 0, resident: int = 9) -> None:
    """The GPU that the next calls run on, its threads in an order that follows from ``seed``, unordered
    accesses being errors; on a real GPU this changes nothing. A number of resident blocks that is no multiple
    of what works together shows who waits for whom; with fewer than a call has, decoding takes two launches."""
    if DEVICE == "cpu":
        image, shared = 80 if capability < 90 else capability, 1024 * SHARED_KIB[capability]
        torch.ops.hope_kernels_cuda.emulate(capability, shared, image, seed, resident, True)
