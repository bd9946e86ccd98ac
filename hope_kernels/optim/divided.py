"""Parameters of which every process holds a part (DTensor: FSDP2, tensor parallel): parts and wholes.

What an optimizer does to every element on its own it does to a process's part; a rule for matrices needs the
whole one, which every process then computes, and takes its part of.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_divided(t: Tensor) -> bool:
    """Without importing DTensor where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def layout(t: Any) -> tuple:
    """Equal for tensors that are divided alike."""
    return (t.device_mesh, tuple(t.placements)) if is_divided(t) else ()


def gradient(p: Any) -> Tensor:
    """The gradient, divided as the parameter is."""
    if is_divided(p) and tuple(p.grad.placements) != tuple(p.placements):
        return p.grad.redistribute(placements=p.placements)
    return p.grad


def part(t: Any) -> Tensor:
    """What this process holds, in the same memory."""
    return t.to_local() if is_divided(t) else t


def whole(t: Tensor, like: Any) -> Tensor:
    """The whole of which every process has the part ``t``, divided as ``like`` is. Communicates."""
    if not is_divided(like):
        return t
    module = sys.modules["torch.distributed.tensor"]
    return module.DTensor.from_local(
        t, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


def own(t: Tensor, like: Any) -> Tensor:
    """This process's part of ``t``, which every process has whole. Does not communicate."""
    if not is_divided(like):
        return t
    module = sys.modules["torch.distributed.tensor"]
    return module.distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None).to_local()
