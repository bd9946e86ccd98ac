"""The library of CUDA kernels on a GPU machine: whether the one that is there can be used, whether it builds,
and what compute-sanitizer finds in it. Every check is a process of its own under a time limit."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import processes
from benchmarks.script import Script
from tools import build_cuda

BUILD_SECONDS = 150
LOAD = """
import sys
from hope_kernels.ops.shared import cuda_library
reason = cuda_library.unavailable()
if reason is None:
    import torch
    print(torch.ops.hope_kernels_cuda.build())
sys.exit(reason)
"""
# The kernels of this project alone; what PyTorch launches is its own affair.
SANITIZERS = ("memcheck", "racecheck")
# the machine does not let the tool look
UNABLE = ("Device not supported", "ERR_NVGPUCTRPERM", "LibraryNotLoaded")


def process(*command: str, seconds: float, env: dict[str, str], keep: int = 4000) -> dict:
    """The record of a process: ok, failed, or died where it took longer."""
    with tempfile.TemporaryDirectory() as folder:
        log, began = Path(folder, "log"), time.time()
        running = processes.start(command, env, log)
        return processes.record(running, log, began, began + max(1.0, seconds), keep)


def loaded(script: Script, until: float) -> dict:
    """Whether the library loads, and is that of these sources; "log" says what it was built from."""
    record = process(
        sys.executable, "-c", script.load + LOAD, seconds=until - time.time(),
        env=processes.environment(script.variables)
    ) | {"torch": torch.__version__}
    sources = build_cuda.hash_of(build_cuda.files(emulated="emulated" in record["log"]))
    if record["status"] == "ok" and sources not in record["log"]:
        record |= {"status": "failed", "reason": "it was built from other sources"}
    return record


def made_usable(script: Script, until: float, build_until: float) -> dict[str, dict]:
    """The library as found; where that cannot be used, it is built here, for this GPU only."""
    if script.load or build_cuda.LIBRARY.exists():
        found = {"CUDA library as found": loaded(script, until)}
        if found["CUDA library as found"]["status"] == "ok" or script.load:
            return found
        found["CUDA library as found"]["status"] = "skipped"  # what is built here takes its place
    else:
        found = {"CUDA library as found": {"status": "skipped", "reason": "there was none"}}
    if build_cuda.nvcc() is None:
        return found | {"CUDA library, build": {"status": "failed", "reason": "nvcc was not found"}}
    found["CUDA library, build"] = process(
        sys.executable, "-m", "tools.build_cuda", str(script.capability()),
        seconds=min(BUILD_SECONDS, build_until - time.time()), env=processes.environment(script.variables)
    )
    if found["CUDA library, build"]["status"] == "ok":
        found["CUDA library as built"] = loaded(script, time.time() + 30)
    return found


def usable(found: dict[str, dict]) -> bool:
    return any(found.get(f"CUDA library as {how}", {}).get("status") == "ok" for how in ("found", "built"))


class Sanitizers:
    """One small test of the CUDA C++ kernels under tools of compute-sanitizer, all at once, while other tests
    run."""

    def __init__(self, script: Script, known: dict[str, dict]):
        """A tool that has found nothing before (``known``) is not run again."""
        self.records: dict[str, dict] = {}
        self.running: dict[str, tuple] = {}
        self.scratch = tempfile.TemporaryDirectory()
        for tool in SANITIZERS:
            name = f"compute-sanitizer {tool}"
            if known.get(name, {}).get("status") == "ok":
                continue
            if shutil.which("compute-sanitizer") is None:
                self.records[name] = {"status": "skipped", "reason": "compute-sanitizer is not on PATH"}
                continue
            log = Path(self.scratch.name, tool)
            command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex",
                       "kns=titans", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o",
                       "minversion=7.0", script.sanitized)
            env = processes.environment({**script.variables, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            self.running[name] = processes.start(command, env, log), log, time.time()

    def finish(self, until: float) -> dict[str, dict]:
        for name, (process, log, began) in self.running.items():
            record = processes.record(process, log, began, until)
            why = next((w for w in UNABLE if w in record["log"]), None)
            if record["status"] == "failed" and why:
                record |= {"status": "skipped", "reason": why}
            elif record["status"] == "ok" and "1 passed" not in record["log"]:
                record |= {"status": "failed", "reason": "its test did not run"}
            self.records[name] = record
        self.scratch.cleanup()
        return self.records
