"""The CUDA C++ half of the compile report: every kernel file through nvcc, gated like the Triton rows. Without nvcc it is empty."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from . import cubin

ROOT = Path(__file__).parents[1]
SOURCES: tuple[tuple[str, tuple[str, ...], bool], ...] = ()  # (file, architectures such as "90a", its kernels want tensor cores)
FLAGS = ("-std=c++20", "-O3", "-Xptxas", "-v,-warn-spills")
COMPLAINT = re.compile(r"warning|\(C7\d+\)|setmaxnreg", re.IGNORECASE)  # C75xx: wgmma serialized; "setmaxnreg ignored" is only an info


def report(archs: list[int] | None, only: str | None, sources=SOURCES) -> list[dict]:
    """One record per kernel, file and architecture, as ``compile_report`` prints them. shared: what is static; a kernel's dynamic shared
    memory is known at its launch only."""
    if shutil.which("nvcc") is None:
        return []
    wanted = [(f, arch, mma) for f, offered, mma in sources for arch in offered
              if (not only or only in f) and (not archs or int(arch.rstrip("af")) in archs)]
    return [record for f, arch, mma in wanted for record in compile_file(ROOT / f, arch, mma)]


def compile_file(path: Path, arch: str, wants_mma: bool) -> list[dict]:
    sm = int(arch.rstrip("af"))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.cubin"
        done = subprocess.run(["nvcc", "-cubin", f"-arch=sm_{arch}", *FLAGS, "-o", out, str(path)], capture_output=True, text=True)
        common = {"row": path.name, "arch": sm, "seconds": round(time.perf_counter() - start, 2)}
        if done.returncode:
            return [{"kernel": path.stem, **common, "violations": [f"does not compile: {done.stderr.strip()}"]}]
        complaints = [line.strip() for line in done.stderr.splitlines() if COMPLAINT.search(line)]
        return [
            {"kernel": name, **common, **asdict(u), "violations": complaints + cubin.violations(u, sm, u.shared, wants_mma)}
            for name, u in cubin.usage(out).items()
        ]
