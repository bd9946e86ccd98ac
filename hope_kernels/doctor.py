"""``python -m hope_kernels doctor``: what is installed, which backends work here and why the others do not, and a self-check."""

from __future__ import annotations

import importlib.metadata
import platform

import numpy as np
import torch

from .backend import available_backends
from .config import TitansConfig
from .layers.titans import SelfModifyingTitans
from .model import bundled_models

TOLERANCE = 1e-12


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


def self_check() -> float:
    """Largest difference, in fp64, between the chunked backend and the token-by-token reference on a small layer."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(TitansConfig(16, 2, chunk_memory=4, chunk_other=8), dtype=torch.float64)
    x = torch.randn(2, 37, 16, dtype=torch.float64)
    with torch.no_grad():
        ours, _ = layer(x)
        theirs, _ = layer(x, backend="reference")
    return float(np.abs(ours.numpy() - theirs.numpy()).max())


def doctor() -> int:
    """Prints the report; returns 0 if the self-check holds, else 1."""
    for name, version in versions().items():
        print(f"{name:14} {version}")
    for device in devices():
        print(f"{'device':14} {device}")
    for name, reason in available_backends().items():
        print(f"{'backend':14} {name}: {'usable' if reason is None else reason}")
    print(f"{'models':14} {', '.join(bundled_models()) or 'none bundled'}")
    error = self_check()
    good = error < TOLERANCE
    print(f"{'self-check':14} chunked against reference, fp64: {error:.1e} ({'ok' if good else f'FAILED, expected below {TOLERANCE}'})")
    return 0 if good else 1
