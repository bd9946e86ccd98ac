"""The library of CUDA kernels on a GPU machine: whether the one that is there loads, whether it builds, and what
compute-sanitizer finds in it.

Every check is a process of its own under a time limit, and yields (name, record) as ``gpu`` keeps them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from benchmarks import measure as m
from tools import build_cuda

BUILD_SECONDS, TOOL_SECONDS = 240, 120
LOAD = """
import sys
import torch
from hope_kernels.ops.shared import cuda_library
reason = cuda_library.unavailable()
print(reason or torch.ops.hope_kernels_cuda.build())
sys.exit(reason is not None)
"""
SANITIZED = "tests/ops/titans/test_cuda.py::test_small_enough_for_a_sanitizer"
# initcheck has to see who wrote what a kernel reads: all kernels. The others look at ours only.
SANITIZERS = {
    tool: ("--kernel-regex", "kns=titans") for tool in ("memcheck", "racecheck", "synccheck")
} | {"initcheck": ()}


def environment() -> dict[str, str]:
    """Of processes that run kernels."""
    return {
        k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"
    } | {"PYTHONPATH": str(m.ROOT), "PYTHONUNBUFFERED": "1"}


def process(*command: str, seconds: float, **variables: str) -> dict:
    """The record of a process: ok, failed, or died where it took longer."""
    began = time.time()
    try:
        done = subprocess.run(
            command, cwd=m.ROOT, env=environment() | variables, capture_output=True, text=True,
            timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired as e:
        return {
            "status": "died", "reason": f"took more than {e.timeout:.0f} s",
            "log": (e.stdout or b"").decode(errors="replace")[-4000:]
        }
    found = {"seconds": round(time.time() - began, 2), "log": (done.stdout + done.stderr).strip()[-4000:]}
    return (
        {"status": "ok"} | found if done.returncode == 0
        else {"status": "failed", "reason": f"exit status {done.returncode}"} | found
    )


def loaded(until: float) -> dict:
    """Whether the library loads with this PyTorch; "log" says against which one it was built."""
    return process(sys.executable, "-c", LOAD, seconds=until - time.time()) | {"torch": torch.__version__}


def built(capability: int, until: float) -> Iterator[tuple[str, dict]]:
    """A library that is there has to load, wherever it was built and against whichever PyTorch; then one is
    built here, for this GPU only."""
    absent = {"status": "skipped", "reason": "there was none"}
    yield "CUDA library as found", loaded(until) if build_cuda.LIBRARY.exists() else absent
    if build_cuda.nvcc() is None:
        yield "CUDA library, build", {"status": "skipped", "reason": "nvcc was not found"}
        return
    record = process(
        sys.executable, "-m", "tools.build_cuda", str(capability), seconds=min(BUILD_SECONDS, until - time.time())
    )
    yield "CUDA library, build", record
    if record["status"] == "ok":
        yield "CUDA library as built", loaded(until)


def sanitized(known: dict[str, dict], until: float) -> Iterator[tuple[str, dict]]:
    """One small test of the kernels under every tool of compute-sanitizer; a tool that has found nothing before
    (``known``) is not run again."""
    for tool, options in SANITIZERS.items():
        name = f"compute-sanitizer {tool}"
        if known.get(name, {}).get("status") == "ok":
            continue
        if shutil.which("compute-sanitizer") is None:
            yield name, {"status": "skipped", "reason": "compute-sanitizer is not on PATH"}
        elif not build_cuda.LIBRARY.exists():
            yield name, {"status": "skipped", "reason": "the CUDA library was not built"}
        elif time.time() > until:
            yield name, {"status": "died", "reason": "the time was up"}
        else:
            record = process(
                "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *options, sys.executable, "-m",
                "pytest", "-q", "-p",
                "no:cacheprovider", SANITIZED, seconds=min(TOOL_SECONDS, until - time.time()),
                PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            if record["status"] == "ok" and "1 passed" not in record["log"]:
                record |= {"status": "failed", "reason": "its test did not run"}
            yield name, record
