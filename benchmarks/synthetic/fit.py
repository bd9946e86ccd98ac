"""The loop that trains a small model on fresh samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hope_kernels import HopeForCausalLM

SMOOTH = 0.95  # of the loss that is reported


def fit(
    model: HopeForCausalLM, loss_of: Callable[[int], Tensor], steps: int, lr: float,
    done: Callable[[], bool] | None = None,
) -> list[list[float]]:
    """AdamW with one cycle of rates, ``loss_of(step)`` the loss. Returns [[step, smoothed loss], ...], a point every
    fiftieth step; stops where the loss is no number, or where ``done``, asked at every point, says so."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    curve, smooth = [], None
    for step in range(steps):
        loss = loss_of(step)
        value = loss.item()
        smooth = value if smooth is None else SMOOTH * smooth + (1 - SMOOTH) * value
        if step % 50 == 49 or step == steps - 1 or not value == value:
            curve.append([step + 1, smooth])
            if not value == value or done is not None and done():
                break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return curve
