"""Elastic weight consolidation for a CMS (Kirkpatrick et al., arXiv 1612.00796), as a baseline.

After a text, F is the mean of the squared gradients of its segments at the weights learned by then. While another
text is learned, every step of a level ends with

    W <- argmin_V  |V - W|^2 / 2 + strength / 2 sum (F / mean F) (V - W_A)^2
       = W_A + (W - W_A) / (1 + strength F / mean F)

the pull to the weights W_A before that text as a proximal step, which is stable at any strength.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import studies as s
from benchmarks.continual.reading import forgotten, segments
from hope_kernels import HopeForCausalLM
from hope_kernels.model_state import ModelState

Place = tuple[int, int, str]  # block, level, matrix
TINY = 1e-20  # a rate that moves no weight


def weights(state: ModelState, copied: bool = False) -> dict[Place, Tensor]:
    """[rows, r, c] of every matrix in which any row has learned."""
    return {
        (i, l, name): t.clone() if copied else t
        for i, cms in enumerate(state.cms) if cms is not None
        for l, held in enumerate(cms.weights) if held is not None and any(cms.own[l])
        for name, t in held.items()
    }


@torch.no_grad()
def fisher(model: HopeForCausalLM, state: ModelState, ids: Tensor) -> dict[Place, Tensor]:
    """Means over the steps of each level of its squared gradients on ids, at the weights of ``state``, which stays
    as it is. A momentum that forgets at once is the gradient."""
    cms = s.cms_of(model)
    rates = tuple(TINY if lr else 0.0 for lr in cms.learning_rates)
    probe = s.with_cms(model, cms.replace(
        optimizer="momentum", momentum=0.0, relative=False, precondition=None, lr=rates
    ))
    state = forgotten(state, model)
    state.adopt(probe)
    found: dict[Place, Tensor] = {}
    steps: dict[Place, int] = {}
    for _ in segments(probe, state, ids):
        for i, of in enumerate(state.cms):
            for l, held in enumerate(of.moments if of is not None else ()):
                for name, g in held.items() if held is not None and not state.pos[0] % cms.chunks[l] else ():
                    place = i, l, name
                    found[place] = found.get(place, 0) + g.square()
                    steps[place] = steps.get(place, 0) + 1
    return {place: total / steps[place] for place, total in found.items()}


def added(old: dict[Place, Tensor], new: dict[Place, Tensor]) -> dict[Place, Tensor]:
    return {place: new.get(place, 0) + old.get(place, 0) for place in {**old, **new}}


@torch.no_grad()
def pull_(state: ModelState, anchor: dict[Place, Tensor], fisher: dict[Place, Tensor], strength: float) -> None:
    """The proximal step, in place, in every matrix that has an anchor and an F, where its level has just stepped."""
    total = sum(float(F.double().sum()) for F in fisher.values())
    mean = total / max(sum(F.numel() for F in fisher.values()), 1)
    for place, W in weights(state).items():
        period = state.cms[place[0]].config.chunks[place[1]]
        if place in anchor and place in fisher and not state.pos[0] % period:
            W.sub_(anchor[place]).div_(fisher[place] * (strength / max(mean, 1e-30)) + 1).add_(anchor[place])
