"""Triton's kernels as compiled PTX, on an emulated GPU: HOPE_KERNELS_PTX=1 python -m pytest tests/ptx/triton

Every test starts with the same random schedule, and every launch has another one: whatever is compared bit for
bit is compared under different schedules too. Eight blocks are at work at a time, four programs of the memory's
kernel. Buffers start as NaN, and a race, an access outside a tensor or a deadlock raises
``tools.ptx.machine.Fault``.
"""

import pytest

from benchmarks import launched_rows
from benchmarks.measure import poisoned
from tools.ptx import triton_device
from tools.ptx.machine import Options

DEVICE = triton_device.install(80)


@pytest.fixture(autouse=True)
def device():
    DEVICE.arch, DEVICE.multiprocessors, DEVICE.options = 80, 1, Options(seed=1)
    with poisoned():
        yield DEVICE


def pytest_terminal_summary(terminalreporter):
    rows = sum(map(len, launched_rows.rows((80, 90)).values()))
    launched = rows - len(launched_rows.missing(DEVICE.launches, (80, 90)))
    terminalreporter.write_line(f"rows of Triton's tile tables launched on sm_80 and sm_90: {launched} of {rows}")
