"""The CPU library computes the same bits on every machine: bits.txt has the hashes of what all of its functions make
of given numbers, with AVX2, AVX-512 and, in an emulated processor, NEON."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from hope_kernels.ops.shared import cpu_library
from tools.build_cuda import host_compiler

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cpu"
KNOWN = (HERE / "bits.txt").read_text()
ARM = platform.machine() in ("aarch64", "arm64")
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def built(compiler: str, out: Path, *more: str) -> Path:
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wno-ignored-attributes", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, str(HERE / "bits.cpp"), *more, "-o", str(out)], check=True)
    return out


@pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")
@pytest.mark.skipif(host_compiler() is None, reason="needs a C++ compiler")
def test_this_machines_bits_are_everyones(tmp_path):
    compiler = host_compiler()
    assert compiler is not None
    machine = [] if ARM else ["-mavx2", "-mfma"]
    program = built(compiler, tmp_path / "bits", *machine, cpu_library.LIBRARY, "-fopenmp")
    most = cpu_library.library().hope_cpu_width(0)
    for width in {128} if ARM else {256, most}:
        found = subprocess.run([program, str(width)], check=True, capture_output=True, text=True).stdout
        assert found == KNOWN, width


@pytest.mark.skipif(ARM, reason="this machine is the other kind")
@pytest.mark.skipif(shutil.which(CROSS) is None or shutil.which(EMULATOR) is None, reason=f"needs {CROSS}, {EMULATOR}")
def test_neons_bits_are_everyones(tmp_path):
    program = built(CROSS, tmp_path / "bits", *map(str, sorted(SOURCES.glob("*.cpp"))), "-static")
    assert subprocess.run([EMULATOR, program], check=True, capture_output=True, text=True).stdout == KNOWN
