"""``python -m hope_kernels doctor``: what is installed, which backends work here and why the others do not,
and a self-check."""

from __future__ import annotations

import copy
import importlib.metadata
import platform

import numpy as np
import torch

from ..backend import available_backends
from ..config import TitansConfig
from ..folders import bundled_models
from ..layers.titans import SelfModifyingTitans
from ..ops.shared import cpu_library


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("hope_kernels", "torch", "triton", "numpy", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> list[str]:
    found = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return found


def self_checks() -> list[tuple[str, float, float]]:
    """(what, largest difference of the outputs of a small layer, tolerance) for the chunked backend and every
    kernel usable here."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(
        TitansConfig(32, 2, chunk_memory=4, chunk_other=8), device="cpu", dtype=torch.float64
    )
    x = torch.randn(2, 37, 32, dtype=torch.float64, device="cpu")

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(np.abs(a.double().numpy() - b.double().numpy()).max())

    with torch.no_grad():
        exact, _ = layer(x, backend="reference")
        found = [("chunked against reference, fp64", difference(layer(x, backend="chunked")[0], exact), 1e-12)]
        if cpu_library.unavailable() is None:
            single = copy.deepcopy(layer).float()
            found.append(
                ("cpp against reference, fp32", difference(single(x.float(), backend="cpp")[0], exact), 1e-4)
            )
    return found


def doctor() -> int:
    """Prints the report; returns 0 if the self-check holds, else 1."""
    for name, version in versions().items():
        print(f"{name:14} {version}")
    for device in devices():
        print(f"{'device':14} {device}")
    for name, reason in available_backends().items():
        print(f"{'backend':14} {name}: {'usable' if reason is None else reason}")
    print(f"{'models':14} {', '.join(bundled_models()) or 'none bundled'}")
    good = True
    for what, error, tolerance in self_checks():
        holds = error < tolerance
        good &= holds
        print(f"{'self-check':14} {what}: {error:.1e} ({'ok' if holds else f'FAILED, expected below {tolerance}'})")
    return 0 if good else 1
