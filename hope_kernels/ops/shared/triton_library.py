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
def unavailable() -> str | None:
    """Why this machine cannot use Triton's kernels, or None."""
    try:
        if interpreted():
            return None
    except ImportError as e:
        return f"Triton cannot be imported: {e}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "needs a CUDA device (or TRITON_INTERPRET=1, to debug)"
    recent = torch.cuda.get_device_capability() >= (8, 0)
    return None if recent else "needs a CUDA device of compute capability 8.0 or more"
