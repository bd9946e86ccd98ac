"""Builds what needs a compiler. Everything here is optional: an installation without one works, on the
PyTorch backend.

HOPE_KERNELS_CPU: 1 makes a failed build of the CPU library an error, 0 skips it.
HOPE_KERNELS_CUDA: 1 makes a failed build of the CUDA library, or a missing nvcc, an error; 0 skips it.
Otherwise it is built where nvcc and a PyTorch for CUDA are found. HOPE_KERNELS_CUDA_ARCHS: the compute
capabilities it is for, "90" say; those of tools/build_cuda.py otherwise. PyTorch has to be visible to the
build: pip install --no-build-isolation.
"""

import os
import platform
import shutil
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from tools import build_cuda  # noqa: E402

WANTED, CUDA_WANTED = os.environ.get("HOPE_KERNELS_CPU", ""), os.environ.get("HOPE_KERNELS_CUDA", "")
CUDA = "hope_kernels._hope_cuda"
AVX2 = ["-mavx2", "-mfma"]
VECTORS = {"x86_64": AVX2, "amd64": AVX2, "aarch64": [], "arm64": []}  # NEON is a part of the latter two


class BuildLibrary(build_ext):
    """Plain shared libraries, loaded with ctypes: no Python in their names, nothing exported for the
    interpreter."""

    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA:
            return super().build_extension(ext)
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            shutil.copy(build_cuda.build(), path)
        except build_cuda.BuildError as reason:
            raise CompileError(f"the CUDA library: {reason}") from None


class Wheel(bdist_wheel):
    """Tagged py3-none: its libraries ask for a platform, and for no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def cpu_library() -> list[Extension]:
    machine, system = platform.machine().lower(), platform.system()
    if WANTED == "0" or system not in ("Linux", "Darwin") or machine not in VECTORS:
        return []
    files = [f"csrc/cpu/{f}" for f in sorted(os.listdir("csrc/cpu"))]
    return [Extension(
        "hope_kernels._titans_cpu", [f for f in files if f.endswith(".cpp")],
        depends=[*files, "setup.py"], language="c++",
        # no contraction: every fused multiply-add is written as one, so that all tiles round alike
        extra_compile_args=["-std=c++17", "-O3", *VECTORS[machine], "-ffp-contract=off", "-g0",
            "-Wno-ignored-attributes",
            # Apple's compiler has no OpenMP: there the library computes with one thread
            *(["-fopenmp"] if system == "Linux" else ["-Wno-unknown-pragmas"])],
        # not linked with an OpenMP: hope_kernels/ops/shared/cpu_library.py finds it the one of PyTorch
        optional=WANTED != "1",
    )]


def cuda_library() -> list[Extension]:
    if CUDA_WANTED != "1":
        torch = None if CUDA_WANTED == "0" or build_cuda.nvcc() is None else build_cuda.pytorch()
        if torch is None or torch[2] is None:
            return []
    files = [os.path.relpath(path, build_cuda.ROOT) for path in build_cuda.files()]
    return [
        Extension(CUDA, [f for f in files if f.endswith((".cu", ".cpp"))], depends=files,
            optional=CUDA_WANTED != "1")
    ]


setup(ext_modules=cpu_library() + cuda_library(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
