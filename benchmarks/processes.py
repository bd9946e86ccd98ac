"""Processes under a time limit, each in a group of its own, so that what it has started ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks import measure as m


def environment(variables: Mapping[str, str] = {}) -> dict[str, str]:
    """Of processes that run kernels: without Triton's interpreter, unless ``variables`` ask for it; of pytest
    itself, no plugin that happens to be installed."""
    path = os.pathsep.join(filter(None, (str(m.ROOT), os.environ.get("PYTHONPATH"))))
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return inherited | {
        "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"
    } | dict(variables)


def start(
    command: tuple[str, ...], env: dict[str, str], log: Path | None = None, errors: Path | None = None,
    folder: Path = m.ROOT
) -> subprocess.Popen:
    """log: the file of its output and errors; errors: of its errors alone, its output goes where this
    process's goes; folder: where it runs."""
    with open(log or errors or os.devnull, "wb") as out:
        outputs = {"stdout": out, "stderr": subprocess.STDOUT} if log else {"stderr": out}
        return subprocess.Popen(command, cwd=folder, env=env, process_group=0, **outputs)


def end(process: subprocess.Popen) -> None:
    """Kills the group. One that the kernel does not let go (a driver that hangs) is not waited for."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        pass


def wait(process: subprocess.Popen, until: float) -> int | None:
    """The exit status, or None where it was ended because its time was up."""
    try:
        return process.wait(timeout=max(0.1, until - time.time()))
    except subprocess.TimeoutExpired:
        end(process)
        return None


def record(process: subprocess.Popen, log: Path, began: float, until: float, keep: int = 4000) -> dict:
    """What became of a process: ok, failed, or died where it took longer; with the end of its output."""
    status = wait(process, until)
    text = log.read_text(errors="replace").strip()[-keep:]
    found = {"seconds": round(time.time() - began, 2), "log": text}
    if status is None:
        return {"status": "died", "reason": f"took more than {until - began:.0f} s"} | found
    if status != 0:
        return {"status": "failed", "reason": f"exit status {status}"} | found
    return {"status": "ok"} | found
