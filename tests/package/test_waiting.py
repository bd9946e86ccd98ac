"""OpenMP is asked to wait briefly, unless someone has decided before."""

import os
import subprocess
import sys

import pytest

from hope_kernels import waiting

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize("given, first, want", [
    ({}, "", [waiting.SPINS, None]),
    ({}, "import torch; ", [None, None]),
    ({"OMP_WAIT_POLICY": "active"}, "", [None, "active"]),
    ({"GOMP_SPINCOUNT": "7"}, "", ["7", None]),
])
def test_the_first_to_decide_how_threads_wait_has_decided(given, first, want):
    env = {n: v for n, v in os.environ.items() if n not in VARIABLES} | given
    script = f"{first}import hope_kernels, os; print([os.environ.get(n) for n in {VARIABLES}])"
    found = subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == str(want)
