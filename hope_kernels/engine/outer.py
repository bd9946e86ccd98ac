"""Training through refreshes: what a call with ``outer`` asks for, and how its graph begins.

    first_order    W_b = W_0 + sg(Delta_b): refreshes are straight-through (``ops/cms/deviations.py``)
    second_order   the exact gradient of the call's losses (``second_order.py``)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..model_state import ModelState
from ..state import master_dtype
from . import second_order
from .protocol import Model

ORDERS = ("first_order", "second_order")


def check_outer(op: str, model: Any, state: ModelState, outer: str, learn: str, guard: bool | None) -> None:
    """Raises ValueError, in the name of ``op``, where a call may not have ``outer``."""
    where = f"{op}: argument outer is {outer!r}"
    if outer not in ORDERS:
        raise ValueError(f"{where}, expected None, 'first_order' or 'second_order'")
    if learn != "next_token":
        raise ValueError(f"{where}, expected None with learn={learn!r}: nothing is learned")
    if not torch.is_grad_enabled():
        raise ValueError(f"{where}, expected None outside grad mode: there is no outer graph")
    if guard or state.guard is not None and guard is None:
        raise ValueError(f"{where}, expected None with a guard: what a guard takes back is no function of the "
                         "weights; pass guard=False")
    if model.parallel is not None:
        raise ValueError(f"{where}, expected None for a model that is divided over processes")
    if outer == "second_order":
        _check_second(where, model)


def _check_second(where: str, model: Any) -> None:
    dtype = model.embed.weight.dtype
    if dtype != master_dtype(dtype):
        raise ValueError(f"{where}, expected a model in fp32 or fp64, and this one is in {dtype}")
    for config in model.config.block_cms:
        if config is None or not any(config.learning_rates):
            continue
        for field, served in (("optimizer", ("gd", "momentum")), ("precondition", (None,)), ("rank", (None,))):
            value = getattr(config, field)
            if value not in served:
                raise ValueError(f"{where}, expected CMS levels with {field} in {served}, and these have {value!r}; "
                                 "outer='first_order' serves them")
    for block in model.blocks:
        if block.cms is not None and any(block.cms._slots(l) for l in range(block.cms.config.num_levels)):
            raise ValueError(f"{where}, expected levels whose factors do not wait to be folded (pending=None)")


def begun(model: Model, state: ModelState, outer: str | None) -> ModelState:
    """The draft ``state`` of a call: its rows hold deviations from the model's weights from here on."""
    if outer is None:
        return state
    cms = [c if c is None or b.cms is None else b.cms.based(c) for b, c in zip(model.blocks, state.cms)]
    state = replace(state, cms=cms)
    return state if outer == "first_order" else second_order.begun(model, state)
