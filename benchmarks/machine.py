"""What every result says about where it comes from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess

import torch

from hope_kernels.files import write_atomically

# of the working tree; results and what is made of them may have changed
CODE = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)docs", ":(top,exclude)*.md")


def machine() -> dict:
    """Processor, cores, versions, commit and date of this run."""
    cpu = platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    except OSError:
        pass

    def git(*args: str) -> str:
        try:
            return subprocess.run(
                ("git", *args), capture_output=True, text=True, check=True, cwd=os.path.dirname(__file__)
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    given = os.environ.get("HOPE_KERNELS_COMMIT", "")  # of a copy without git

    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": git("rev-parse", "--short", "HEAD") or given,
        "dirty": bool(git("status", "--porcelain", "--", *CODE)),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_json(path: str, data: dict) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())
