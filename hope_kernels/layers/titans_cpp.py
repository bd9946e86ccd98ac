"""A Titans layer on the C++ backend: y and, where a gradient is asked for, its gradient by x with constant
weights and memories.

    u = W_in conv(x)    q = norm(W_q u)    o = M_memory(q)    y = W_o (rmsnorm_per_head(o) * silu(W_g x))

and backwards through each by formula. A graph of the same small operators costs as much again as all the
layer's arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..ops.shared import cpu_layer as cpu
from ..ops.titans.cpp import Pullback, titans_cpp, titans_cpp_gradient
from ..ops.titans.state import TitansState


@torch.compiler.disable(reason="a call through ctypes")
def scan_cpp(layer, x: Tensor, state: TitansState, lengths: list[int], update: bool) -> tuple[Tensor, TitansState]:
    """``layer.scan(x, state, lengths, update=update)`` for x [B, T, d_model] where ``cpp.unserved`` finds
    nothing against it (without gradients, or with ``constant_memory``) and all projections are plain: their
    weights stand in the formulas."""
    c, graph = layer.config, torch.is_grad_enabled() and x.requires_grad
    with torch.no_grad():
        conv, gain = layer.conv, layer.norm_gain  # a parametrized one is computed at every access
        _, real = layer._real(lengths, x)
        given = x if real is None else torch.where(real, x, 0.0)
        u, tail = (given, None) if conv is None else cpu.causal_conv(given, state.conv_tail, conv, lengths)
        if layer.in_proj is not None:
            u = layer.in_proj(u)
        raw = layer._heads(layer.q_proj(u))
        inputs = layer._inputs(u, cpu.unit(raw) if c.qk_l2norm else raw)
        scan = titans_cpp_gradient if graph else titans_cpp
        o, new, *by_q = scan(c, layer.w_init, inputs, state, lengths, update=update)
        gate = None if layer.gate_proj is None else layer.gate_proj(given)
        y = cpu.output_gate(o, gain, gate)
        if layer.out_proj is not None:
            y = layer.out_proj(y)
        if real is not None:
            y = torch.where(real, y, 0.0)
        if update:
            new = replace(new, conv_tail=tail)

    def by_x(dy: Tensor) -> Tensor:
        if real is not None:
            dy = torch.where(real, dy, 0.0)
        if layer.out_proj is not None:
            dy = dy @ layer.out_proj.weight
        do, dgate = cpu.output_gate_backward(dy, o, gain, gate)
        dq = by_q[0](do)
        if c.qk_l2norm:
            dq = cpu.unit_backward(dq, raw)
        dx = dq.flatten(2) @ layer.q_proj.weight
        if layer.in_proj is not None:
            dx = dx @ layer.in_proj.weight
        if conv is not None:
            dx = cpu.causal_conv_backward(dx, conv)
        if dgate is not None:
            dx.flatten(0, 1).addmm_(dgate.flatten(0, 1), layer.gate_proj.weight)
        return dx

    return Pullback.apply(x, y, by_x) if graph else y, new
