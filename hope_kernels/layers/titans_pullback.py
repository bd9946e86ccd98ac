"""The gradient of a Titans layer by its input, by formulas: what surrounds the memories, backwards.

    u = W_in conv(x)    q = norm(W_q u)    o = M_memory(q)    y = W_o (rmsnorm_per_head(o) * silu(W_g x))

with parameters, fast weights and writes as constants, on the C++ backend. A graph of the same small operators
costs as much again as all the layer's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.conv.cpp import causal_conv_backward
from ..ops.output_gate.cpp import output_gate_backward
from ..ops.titans.state import MaybeTensor
from ..ops.unit.cpp import unit_backward


@torch.no_grad()
def pullback(
    layer: Any, real: Tensor | None, raw: MaybeTensor, o: Tensor, gate: Tensor | None,
    by_q: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    """dL/dy [B, T, d] -> dL/dx [B, T, d].

    layer: all its projections are plain (``wrapped.is_plain``). real [B, T, 1]: which tokens count; None: all.
    raw [B, T, H, D]: W_q u, or None with adaptive_q. o [B, T, H, D], gate [B, T, d]: the memory's answers and W_g x.
    by_q: dL/do -> dL/dq, with adaptive_q dL/du.
    Where processes share the layer, H and the rows of W are those of this one's heads.
    """
    conv, gain, across = layer.conv, layer.norm_gain, layer.across

    def by_x(dy: Tensor) -> Tensor:
        if real is not None:
            dy = torch.where(real, dy, 0.0)
        if layer.out_proj is not None:
            dy = dy @ layer.out_proj.weight
        elif across is not None:
            dy = across.own(dy).contiguous()
        do, dgate = output_gate_backward(dy, o, gain, gate)
        dq = by_q(do)
        if layer.q_proj is None:  # M_q makes q of u
            dx = dq.flatten(2)
        else:
            dx = (unit_backward(dq, raw) if layer.config.qk_l2norm else dq).flatten(2) @ layer.q_proj.weight
        if layer.in_proj is not None:
            dx = (dx if across is None else across.sum_of_own(dx)) @ layer.in_proj.weight
        if conv is not None:
            dx = causal_conv_backward(dx, conv)
        if dgate is not None:
            dx.flatten(0, 1).addmm_(dgate.flatten(0, 1), layer.gate_proj.weight)
        return dx if across is None else across.sum(dx)

    return by_x
