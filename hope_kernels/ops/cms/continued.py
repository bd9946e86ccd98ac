"""A CMSState that goes on with other rates or another optimizer.

What was learned stays as it is, and counts as learned at the rates it was read with. What the next step starts
from is kept where it means the same under the new configuration: gradients that wait for a slower level's
commit, and what an optimizer keeps from step to step while it remains the optimizer. Another optimizer starts
as on a new sequence, from nothing: one's momentum is in units that another one would misread. So does Adam with
other ``betas``, by which its averages are corrected, and momentum when rates become relative or absolute, which
decides whether it is an average of normalised gradients. P of ``precondition`` says what was learned, and stays
while there is a rho.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ...config import CMSConfig
from ...state import Counters
from .absorb import Shared, fold
from .schedule import learning_levels
from .state import CMSState

KEPT = ("moments", "squares")  # what an optimizer keeps from step to step


@torch.no_grad()
def continued(state: CMSState, config: CMSConfig, start: Callable[[int], Shared]) -> CMSState:
    """``state`` under ``config``, which differs from its own in fields of ``NEXT_STEP`` alone. It shares what
    is the same with ``state``, which stays as it is. start: what rows of a level start from, by its index."""
    before, draft, none = state.config, state.draft(), [0] * state.batch
    for l, new in enumerate(config.learning_rates):
        other = any(getattr(before, field) != getattr(config, field) for field in _units(config))
        held = [b for b, rank in enumerate(draft.rank[l]) if rank]
        if held and (other or before.matrix_rates(l) != config.matrix_rates(l)):
            fold(draft, before, start(l), l, held)
        if other or new == 0:
            for part in KEPT:
                getattr(draft, part)[l] = None
            draft.steps[l] = Counters(none)
        if config.precondition is None:
            draft.inverses[l] = draft.following[l] = None
        if new == 0:  # nothing commits here: what waits for it never would
            draft.grads[l], draft.dirty[l], draft.tokens[l] = None, Counters(none), Counters(none)
    draft = replace(draft.finished(), config=config)
    return draft if learning_levels(config) else _closed(draft)


def _units(config: CMSConfig) -> tuple[str, ...]:
    """Fields that say what ``KEPT`` means."""
    return ("optimizer", *{"adam": ("betas",), "momentum": ("relative",)}.get(str(config.optimizer), ()))


def _closed(state: CMSState) -> CMSState:
    """Without an open segment: of one that has begun, as if its tokens had been read with learn=False."""
    zero, C1 = [0] * state.batch, state.config.chunks[0]
    return replace(state, inputs=None, errors=None, seen=Counters(zero), delivered=Counters(zero),
                   tainted=Counters([int(p % C1 > 0) for p in state.pos]))
