"""The C++ library under the sanitizers: addresses and undefined behaviour under its Python tests and damaged
files, races under a program of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hope_kernels.ops.shared import cpu_library
from tools.build_cuda import host_compiler

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}"),
    pytest.mark.skipif(host_compiler() is None, reason="needs a C++ compiler"),
]


@pytest.mark.parametrize("what", ["races", "memory", "files"])
def test_no_report(what):
    environment = {n: v for n, v in os.environ.items() if n != "HOPE_KERNELS_TEST_DRAWS"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [ROOT / "tools" / "sanitize.sh", what, sys.executable], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "passed" in done.stdout or what == "races"
