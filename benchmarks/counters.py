"""One look of Nsight Compute at the prefill kernels: how many issue slots they use, and what their warps wait
for.

    python -m benchmarks.counters [BACKEND ...]      runs what ncu watches: a prefill of each backend

``counted`` runs that under ncu, with the clocks left as they are, and keeps what it says of each kernel.
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace

import torch

from benchmarks import bench_titans, gpu_library, processes
from benchmarks.script import Script

CASE = bench_titans.P(T=2048)
KERNELS = "regex:titans_prefill|scan_kernel|carry_kernel"
SECTIONS = ("SchedulerStats", "WarpStateStats", "SpeedOfLight", "Occupancy", "LaunchStats")
ABOUT = ("issue", "stall", "warps_active", "throughput", "duration", "registers", "shared_mem", "cluster",
         "occupancy")


def parsed(output: str) -> dict[str, dict[str, str]]:
    """{kernel: {metric: value and unit}} of ncu's ``--page raw --csv``: a line of names, one of units, one a
    kernel."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    rows = list(csv.reader(io.StringIO("\n".join(lines))))
    if len(rows) < 3:
        return {}
    names, units = rows[0], rows[1]
    at = names.index("Kernel Name")
    return {
        row[at]: {name: f"{value} {unit}".strip() for name, unit, value in zip(names, units, row)
                  if value and any(word in name for word in ABOUT)}
        for row in rows[2:]
    }


def counted(script: Script, backends: Iterable[str], until: float, now: float) -> dict:
    """The record of the pass over ``backends``."""
    if shutil.which("ncu") is None:
        return {"status": "skipped", "reason": "ncu is not on PATH"}
    backends = tuple(backends)
    if not backends:
        return {"status": "skipped", "reason": "no backend to look at"}
    sections = (f"--section={section}" for section in SECTIONS)
    command = ("ncu", "--clock-control", "none", "--kernel-name", KERNELS, "--launch-count", f"{len(backends)}",
               *sections, "--page", "raw", "--csv", "--target-processes", "all",
               sys.executable, "-m", "benchmarks.counters", *backends)
    record = gpu_library.process(
        *command, seconds=until - now, env=processes.environment(script.variables), keep=400_000)
    kernels = parsed(record["log"])
    record["log"] = record["log"][-2000:]
    if why := next((w for w in gpu_library.UNABLE if w in record["log"]), None):
        return record | {"status": "skipped", "reason": why}
    if record["status"] == "ok" and not kernels:
        return record | {"status": "failed", "reason": "ncu saw no kernel"}
    return record | {"kernels": kernels, "case": CASE.name}


@torch.no_grad()
def main(backends: list[str]) -> int:
    for backend in backends or ["cuda", "triton"]:
        case = replace(CASE, backend=backend)
        w, inputs = bench_titans.problem(case, "cuda", 0)
        bench_titans.titans_chunk(case.config, w, inputs, backend=backend)
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
