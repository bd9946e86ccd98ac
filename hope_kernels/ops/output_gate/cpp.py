"""The output gate on the C++ backend (csrc/cpu/layer.cpp), and its gradient by what flows through it.

fp32 on the CPU, head widths that are multiples of 8, no graph: call under no_grad. Values are those of
``forward.py`` to rounding, and a token's are bit-identical in any company.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.cpu_library import POINTER, SIZE, Function, address

_forward = Function("hope_output_gate", "output_gate", *[SIZE] * 4, *[POINTER] * 4)
_backward = Function("hope_output_gate_backward", "output_gate_backward", *[SIZE] * 4, *[POINTER] * 6)


def output_gate(o: Tensor, gain: Tensor | None, gate: Tensor | None) -> Tensor:
    """``output_gate_chunked``: rmsnorm_per_head(o) * gain * silu(gate), [B, T, d]; o [B, T, H, D]."""
    o, gain, gate = o.contiguous(), _contiguous(gain), _contiguous(gate)
    B, T, H, D = o.shape
    y, every = o.new_empty(B, T, H * D), o.numel()
    _forward(
        B * T, H, D, torch.get_num_threads(), address(o, every), address(gain, H * D), address(gate, every),
        address(y, every),
    )
    return y


def output_gate_backward(
    dy: Tensor, o: Tensor, gain: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dL/do [B, T, H, D] and dL/dgate [B, T, d] of ``output_gate`` from dL/dy [B, T, d]."""
    dy, o, gain, gate = dy.contiguous(), o.contiguous(), _contiguous(gain), _contiguous(gate)
    B, T, H, D = o.shape
    do, dgate, every = torch.empty_like(o), None if gate is None else torch.empty_like(gate), o.numel()
    _backward(
        B * T, H, D, torch.get_num_threads(), address(o, every), address(gain, H * D), address(gate, every),
        address(dy, every), address(do, every), address(dgate, every),
    )
    return do, dgate


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
