"""The weights of a CMS level as every row of a batch has them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import CMSConfig
from ..ops.cms import low_rank
from ..ops.cms.deviations import straight
from ..ops.cms.level import Level
from ..ops.cms.matrix import Matrix
from ..ops.cms.schedule import matrices
from ..ops.cms.state import CMSState


def effective(
    config: CMSConfig, l: int, state: CMSState, parameters: dict[str, Tensor],
    dtype: torch.dtype | None = None
) -> Level:
    """Level ``l`` as ``cms_forward`` takes it: see ``ContinuumMemory.effective_levels``. In a draft of a call with
    ``outer``, what rows have learned carries a graph (``ops/cms/deviations.py``)."""
    rates = parameters.get("log_rates")
    tensors: Level = {
        name: p if dtype is None else p.to(dtype) for name, p in parameters.items() if name != "log_rates"
    }
    own, rank = state.own[l], max([0, *state.rank[l]])
    if not any(own) and not rank:
        return tensors
    outer = None if state.private is None or not torch.is_grad_enabled() else state.private.outer

    def usable(t: Tensor, dtype: torch.dtype) -> Tensor:
        t = (t if outer == "second_order" else t.detach()).to(dtype)
        # autograd refuses to save an inference tensor
        return t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t

    held = None if not any(own) else state.weights[l]
    if held is not None and state.copies[l] is not None and dtype in (
        None, next(iter(state.copies[l].values())).dtype
    ):
        held = state.copies[l]

    def learned(i: int, name: str) -> Tensor | None:
        """What rows have of the i-th matrix."""
        if held is None:
            return None
        mine = usable(held[name], tensors[name].dtype)
        if outer != "first_order":
            return mine
        return straight(state, l, name, mine, parameters[name], None if rates is None else rates[i])

    names = matrices(config)
    if held is not None and config.rank is not None:
        where = None if all(own) else torch.tensor(own, dtype=torch.bool, device=parameters["up"].device)
        for i, name in enumerate(names):
            shared, L = tensors[name], learned(i, name)
            assert L is not None
            L = L if where is None else torch.where(where[:, None, None], L, 0.0)
            S = low_rank.signs(config, l, name, shared).expand(state.batch, -1, -1)
            tensors[name] = Matrix(shared, left=L.mT, right=S, scale=1.0)
        return tensors
    for i, name in enumerate(names):
        shared, mine = tensors[name], learned(i, name)
        rows = () if mine is None else tuple(map(bool, own))
        pending = [
            None if not rank else usable(part[l][name][:, :rank], shared.dtype)
            for part in (state.left, state.right)
        ]
        tensors[name] = Matrix(shared, mine, rows, *pending, scale=-state.config.matrix_rates(l)[name])
        if rank and shared.requires_grad and torch.is_grad_enabled() and outer is None:
            # rows that learned are constants: their base is not the parameter, but its value
            constant = tuple(bool(o or r) for o, r in zip(own, state.rank[l]))
            tensors[name] = Matrix(shared, tensors[name].detach().dense(state.batch), constant)
    return tensors
