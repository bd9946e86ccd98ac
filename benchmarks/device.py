"""The device that is measured: its name, what describes it, and the ceilings taken of it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess

import torch

from benchmarks.machine import machine
from hope_kernels import available_backends

CEILINGS = {"copy": "GB/s", "matmul bf16": "TFLOP/s", "matmul fp16": "TFLOP/s", "matmul fp32": "TFLOP/s"}
CPU_CEILINGS = {"copy": "GB/s", "fma fp32": "TFLOP/s"}  # a library's product is no ceiling where ours is faster


def slug(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu " + machine()["cpu"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def nvidia_smi() -> str:
    """Name, driver, clocks, power and temperature as the driver reports them now; only reads."""
    query = ("name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
             "temperature.gpu")
    try:
        done = subprocess.run(
            ("nvidia-smi", f"--query-gpu={query}", "--format=csv"), capture_output=True, text=True, timeout=20
        )
        return (done.stdout or done.stderr).strip()
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"nvidia-smi: {e}"


def describe(device: str) -> dict:
    found: dict = {"machine": machine(), "device": device, "backends": available_backends()}
    for package in (
        "torch", "triton", "numpy", "nested-learning", "titans-pytorch", "flash-linear-attention", "flash-qla"
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= {"name": p.name, "capability": [p.major, p.minor],
                  "multiprocessors": p.multi_processor_count, "L2": p.L2_cache_size,
                  "memory": p.total_memory, "cuda": torch.version.cuda, "nvidia_smi": nvidia_smi()}
    return found


def ceilings_of(device: str) -> dict[str, str]:
    """{ceiling: its unit}."""
    return CEILINGS if device == "cuda" else CPU_CEILINGS
