"""How a text is read, for what is measured and segment by segment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from hope_kernels import HopeForCausalLM
from hope_kernels.model_state import ModelState
from hope_kernels.state import Counters


def forgotten(state: ModelState, model: HopeForCausalLM) -> ModelState:
    """A fresh state of ``model`` with the CMS of ``state``: memories empty, no open segment, counters at 0.
    Shares no tensor with it."""
    fresh, zero = model.init_state(state.batch), [0] * state.batch
    return replace(fresh, cms=[None if c is None else replace(c, pos=Counters(zero)) for c in state.clone().cms])


def segments(model: HopeForCausalLM, state: ModelState, ids: Tensor) -> Iterator[Tensor]:
    """Reads and learns ids segment by segment, in place: the losses of each, once it has been learned."""
    C = model.segment
    for at in range(0, ids.shape[1], C):
        more = at + C < ids.shape[1]
        found, _ = model(
            ids[:, at : at + C], state, learn="next_token", output="losses", check_finite=False,
            following=ids[:, at + C] if more else None,
        )
        if not more:
            model.flush(state)
        yield found.nats if more else found.nats[:, :-1]
