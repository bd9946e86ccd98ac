"""Whether this process can use the Triton kernels. Importing this module does not import Triton."""

from __future__ import annotations

import torch

from ...tracing import constant_result


@constant_result
def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    import triton

    return triton.knobs.runtime.interpret


@constant_result
def on_cpu() -> bool:
    """Whether Triton's kernels take tensors of the CPU: interpreted, or where Triton was given a driver for an
    emulated GPU (tools/ptx/triton_device.py)."""
    if interpreted():
        return True
    if torch.cuda.is_available():
        return False
    from triton.runtime import driver

    try:
        return driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # no driver
        return False


def multiprocessors(device: torch.device) -> int:
    """Of the GPU, or the emulated one, on which kernels with tensors of ``device`` run."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(driver.active.get_current_device())["multiprocessor_count"]


def architecture(device: torch.device) -> int:
    """Of the GPU, or the emulated one, on which kernels with tensors of ``device`` run: 90 is sm_90. 80 where
    they are interpreted."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if interpreted():
        return 80
    from triton.runtime import driver

    return driver.active.get_current_target().arch


@constant_result
def unavailable() -> str | None:
    """Why this machine cannot use Triton's kernels, or None."""
    try:
        if on_cpu():
            return None
    except ImportError as e:
        return f"Triton cannot be imported: {e}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "needs a CUDA device (or TRITON_INTERPRET=1, to debug)"
    recent = torch.cuda.get_device_capability() >= (8, 0)
    return None if recent else "needs a CUDA device of compute capability 8.0 or more"
