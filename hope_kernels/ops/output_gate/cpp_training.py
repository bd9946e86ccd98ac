"""The output gate under training on the C++ backend. Gradients of gradients are those of ``forward.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.again import gradients_again
from ..shared.cpu_library import POINTER, SIZE, Function, address, is_plain
from .cpp import output_gate, output_gate_backward
from .forward import output_gate_chunked

_gain_backward = Function("hope_output_gate_gain_backward", "output_gate gain_backward", *[SIZE] * 4, *[POINTER] * 4)


def output_gate_training(o: Tensor, gain: Tensor | None, gate: Tensor | None) -> Tensor:
    """``output_gate_chunked``, differentiable."""
    return _Gate.apply(o, gain, gate) if is_plain(o, gain, gate) else output_gate_chunked(o, gain, gate)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o: Tensor, gain: Tensor | None, gate: Tensor | None):
        ctx.save_for_backward(o, gain, gate)
        return output_gate(o, gain, gate)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (o, gain, gate), wanted = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():
            found = gradients_again(_chunked, (o, gain, gate), wanted, (dy,))
            return found[0], found[1], found[2]
        do, dgate = output_gate_backward(dy, o, gain, gate)
        return do, _gain(dy, o, gain, gate) if gain is not None and wanted[1] else None, dgate


def _chunked(o: Tensor, gain: Tensor | None, gate: Tensor | None) -> tuple[Tensor]:
    return output_gate_chunked(o, gain, gate),


def _gain(dy: Tensor, o: Tensor, gain: Tensor, gate: Tensor | None) -> Tensor:
    dy, o, gate = dy.contiguous(), o.contiguous(), None if gate is None else gate.contiguous()
    B, T, H, D = o.shape
    found, every = torch.empty_like(gain, memory_format=torch.contiguous_format), o.numel()
    _gain_backward(
        B * T, H, D, torch.get_num_threads(), address(o, every), address(gate, every), address(dy, every),
        address(found, H * D),
    )
    return found
