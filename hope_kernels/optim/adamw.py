"""AdamW for the parameters that are no matrices: torch.optim's own function, with its names of the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_(
    state: dict[Tensor, Any], group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
) -> None:
    """One step of ``params`` in place, at ``adamw_lr`` times the group's rate."""
    for p in params:
        if "exp_avg" not in state[p]:
            state[p].update(
                step=torch.zeros((), dtype=torch.float32, device="cpu"), exp_avg=torch.zeros_like(p),
                exp_avg_sq=torch.zeros_like(p)
            )
    means, squares, steps = ([state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
    beta1, beta2 = group["adamw_betas"]
    adamw(
        params, grads, means, squares, [], steps, amsgrad=False, beta1=beta1, beta2=beta2,
        lr=float(group["lr"]) * group["adamw_lr"], weight_decay=group["weight_decay"], eps=group["adamw_eps"],
        maximize=False
    )
