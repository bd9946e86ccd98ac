"""Builds what needs a compiler. Everything here is optional: an installation without one works, on the PyTorch backend.

HOPE_KERNELS_CPU: 1 makes a failed build of the CPU library an error, 0 skips it.
"""

import os
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("HOPE_KERNELS_CPU", "")


class BuildLibrary(build_ext):
    """Plain shared libraries, loaded with ctypes: no Python in their names, nothing exported for the interpreter."""

    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


def cpu_library() -> list[Extension]:
    if WANTED == "0" or platform.machine().lower() not in ("x86_64", "amd64") or platform.system() != "Linux":
        return []
    folder = "csrc/cpu"
    return [Extension(
        "hope_kernels._titans_cpu", [f"{folder}/titans.cpp"], depends=[f"{folder}/{f}" for f in os.listdir(folder)], language="c++",
        # no contraction: every fused multiply-add is written as one, so that all tiles round alike
        extra_compile_args=["-std=c++17", "-O3", "-mavx2", "-mfma", "-ffp-contract=off", "-fopenmp", "-g0", "-Wno-ignored-attributes"],
        extra_link_args=["-fopenmp"], optional=WANTED != "1",
    )]


setup(ext_modules=cpu_library(), cmdclass={"build_ext": BuildLibrary})
