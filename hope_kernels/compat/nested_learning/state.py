"""The fast weights of a context as the package holds them, one object a memory, and as the operators do,
stacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...config import TitansConfig
from ...ops.titans.state import FastWeights, Layout

NAMES = ("k", "v", "q", "eta", "alpha", "memory")


@dataclass
class ResidualMLPMemoryState:
    """One memory: w1 [out, N], w2 [N, dim], w_skip [1, dim] or None, and their momentum (None before its
    first use); with a leading batch dimension once a batch has been read."""

    w1: Tensor
    w2: Tensor
    w_skip: Tensor | None = None
    m_w1: Tensor | None = None
    m_w2: Tensor | None = None
    m_w_skip: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> ResidualMLPMemoryState:
        rest = (self.w_skip, self.m_w1, self.m_w2, self.m_w_skip)
        return ResidualMLPMemoryState(fn(self.w1), fn(self.w2), *(None if t is None else fn(t) for t in rest))

    def clone(self) -> ResidualMLPMemoryState:
        return self.map(lambda t: t.detach().clone())


@dataclass
class SelfModifyingTitansState:
    """Fast weights of all memories of a context."""

    k: ResidualMLPMemoryState
    v: ResidualMLPMemoryState
    q: ResidualMLPMemoryState
    eta: ResidualMLPMemoryState
    alpha: ResidualMLPMemoryState
    memory: ResidualMLPMemoryState

    def clone(self) -> SelfModifyingTitansState:
        return SelfModifyingTitansState(**{name: getattr(self, name).clone() for name in NAMES})


def stacked(
    state: SelfModifyingTitansState, layout: Layout, dtype: torch.dtype, prefix: str = ""
) -> FastWeights:
    """The weights of a batched state, or their momentum (prefix "m_"; zero where there is none yet), in
    ``dtype``: a copy, which may be written over, as the state's tensors may not."""
    def part(name: str, weight: str) -> Tensor:
        memory = getattr(state, name)
        found = getattr(memory, prefix + weight)
        return (torch.zeros_like(getattr(memory, weight)) if found is None else found).to(dtype)

    skips = [part(n, "w_skip") for n in layout.scalars] if layout.skip else []
    w2 = torch.cat([part(n, "w2") for n in layout.names] + skips, 1)
    w1 = torch.stack([part(n, "w1") for n in layout.full], 1)
    w1s = torch.cat([part(n, "w1") for n in layout.scalars], 1) if layout.scalars else None
    return FastWeights(w2, w1, w1s)


def unstack(
    state: SelfModifyingTitansState, layout: Layout, weights: FastWeights, prefix: str = ""
) -> None:
    """The reverse of ``stacked``: the state's fields become parts of ``weights``, in the state's dtype and
    contiguous; where that is a view, of rows that no other field has."""
    for name in layout.names:
        memory = getattr(state, name)
        for part, value in layout.views(weights, name).items():
            setattr(memory, prefix + part, value.to(getattr(memory, part).dtype).contiguous())


def layout_of(config: TitansConfig, names: tuple[str, ...], dim: int) -> Layout:
    """dim 1: eta and alpha have as many outputs as inputs, so like all other memories they skip by the
    identity."""
    layout = Layout.of(config, names)
    return layout if dim > 1 else replace(layout, full=names, scalars=())
