"""The exact gradient of a call's losses through the refreshes between its segments (``outer="second_order"``).

Of segment j a row's weights W_j are read, and a refresh makes W_{j+1} of them, by gradient descent say

    W_{j+1} = W_j - lr g_j        g_j = dL_j/dW_j

With A_j = dL/dW_j of all segments from j on, G_j that of segment j's losses alone, and H_j = dg_j/dW_j,

    A_j = G_j + (I - lr H_j) A_{j+1}        dL/dtheta += -lr (dg_j/dtheta)^T A_{j+1}

for everything else theta that g_j is a function of: other parameters, W of other levels, and the states of the
mixers, which carry the graph of earlier segments. What is learned is learned as ever, without a graph, so its bits
are those of any other call; it is then given the gradient above. The products with H_j come from differentiating g_j,
which the backward computes a second time, a segment at a time: until then a refresh keeps its row's W_j, what it has
summed up, and the mixers' states at the segment's start. The memories are constants of g_j, and not of its
derivative: a ``Gate`` between them and what is read from them is closed for the one and open for the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import CMSConfig
from ..layers.cms import Inner
from ..model_state import MixerState, ModelState
from ..ops.cms.deviations import straight
from ..ops.cms.relative import TINY, normalises
from ..ops.cms.schedule import Due, due, learning_levels
from ..ops.titans.scan import Gate
from ..state import master_dtype
from .head import Targets, mask
from .protocol import Model

PARTS = ("weights", "grads", "moments")  # of a CMSState: what a refresh reads and makes
Place = tuple[int, str, int, str]  # block, part, level, matrix


class Refreshes:
    """What the draft ``state`` learns of one segment, as a differentiable function. Made before the segment is
    learned, of the arguments of ``segments.learn_segment`` with all rows learning; ``attach`` once it is."""

    def __init__(
        self, model: Model, state: ModelState, mixers: list[MixerState], ids: Tensor, targets: Targets,
        lengths: list[int], counts: list[int] | None, among: list[int] | None
    ):
        self.model, self.ids, self.targets, self.lengths, self.counts = model, ids, targets, lengths, counts
        self.rows = list(range(state.batch)) if among is None else among
        self.batch, self.mixers = state.batch, mixers
        self.given: dict[Place, Tensor] = {}
        self.own, self.dirty = ([c and [list(of) for of in getattr(c, n)] for c in state.cms] for n in ("own", "dirty"))
        for i, c in enumerate(state.cms):
            for part in PARTS if c is not None else ():
                held = getattr(c, part)
                for l, tensors in enumerate(held):
                    if tensors is not None:
                        self.given |= {(i, part, l, n): t for n, t in tensors.items()}
                        held[l] = {n: t.detach() for n, t in tensors.items()}
        self.constant = dict(_places(state))

    def attach(self, state: ModelState) -> None:
        """What the draft has learned since becomes a function of what it was learned from."""
        new = {place: t for place, t in _places(state) if self.constant.get(place) is not t}
        self.made = list(new)
        params = [p for p in _module(self.model).parameters() if p.requires_grad]
        floating = [t for m in self.mixers for t in m.tensors() if t.is_floating_point()]
        found = _Refreshed.apply(self, list(new.values()), *self.given.values(), *floating, *params)
        values = {**self.given, **dict(zip(new, found))}
        for i, c in enumerate(state.cms):
            for part in PARTS if c is not None else ():
                held = getattr(c, part)
                for l, tensors in enumerate(held):
                    held[l] = tensors and {n: values[i, part, l, n] for n in tensors}

    def again(self, saved: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The function computed with a graph: (inputs, which are saved ones as leaves and the parameters; what
        ``attach`` found to be new)."""
        given, at = {}, iter(saved)
        for place in self.given:
            given[place] = next(at).detach().requires_grad_()
        leaves = list(given.values())

        def leaf(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            leaves.append(next(at).detach().requires_grad_())
            return leaves[-1]

        mixers = [m._mapped(leaf, lambda c: c) for m in self.mixers]
        weights = {}
        for i, config in self._learning():
            for l in range(config.num_levels):
                weights |= {(i, "weights", l, n): self._in_force(given, i, l, n) for n in config.matrices}
        grads = self._gradients(mixers, weights)
        new: dict[Place, Tensor] = {}
        for i, config in self._learning():
            for l in learning_levels(config):
                what = due(config, l, self.rows, self.counts)
                for n in config.matrices:
                    self._step(new, given, weights[i, "weights", l, n], grads[i, l, n], (i, l, n), config, what)
        return [*leaves, *at], [new[place] for place in self.made]

    def _learning(self) -> list[tuple[int, CMSConfig]]:
        return [(i, b.cms.config) for i, b in enumerate(self.model.blocks) if b.cms is not None and b.cms.learns]

    def _in_force(self, given: dict[Place, Tensor], i: int, l: int, n: str) -> Tensor:
        """[B, r, c]: the weights of all rows."""
        cms, own = self.model.blocks[i].cms, self.own[i]
        assert cms is not None and own is not None
        shared, mine = cms._parameters_of(l)[n].expand(self.batch, -1, -1), given.get((i, "weights", l, n))
        return shared if mine is None else torch.where(_marks(own[l], mine), mine, shared)

    def _gradients(self, mixers: list[MixerState], weights: dict[Place, Tensor]) -> dict[tuple, Tensor]:
        """dL/dW of the segment, [B, r, c] by block, level and matrix, with its own graph."""
        model, gate, read = self.model, Gate(), {}
        index = torch.tensor(self.rows, device=self.ids.device)
        levels: list[Any] = []
        for cms in [b.cms for b in model.blocks]:
            levels.append(None if cms is None else [dict(cms._parameters_of(l)) for l in range(cms.config.num_levels)])
            for level in levels[-1] or ():
                level.pop("log_rates", None)
        for (i, _, l, n), w in weights.items():
            # a leaf where neither a parameter nor a state asks for gradients
            read[i, l, n] = levels[i][l][n] = w.index_select(0, index).requires_grad_()
        anchor = self.ids.new_zeros((), dtype=torch.float32)
        inner = [Inner(anchor, None, gate=gate) for _ in model.blocks]
        with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
            h, _ = model.run(model.embed(self.ids), mixers, levels, self.lengths, "chunked", inner)
        logits = model.logits(h, self.lengths, "chunked")
        nats = -logits.to(master_dtype(logits.dtype)).log_softmax(-1)
        nats = nats.gather(-1, self.targets.ids.unsqueeze(-1)).squeeze(-1)
        loss = torch.where(mask(self.targets.known, self.ids.shape[1], h.device), nats, 0).sum()
        with gate.closed():
            found = torch.autograd.grad(loss, list(read.values()), create_graph=True)
        return {
            key: g.new_zeros(self.batch, *g.shape[1:]).index_copy(0, index, g) for key, g in zip(read, found)
        }

    def _step(
        self, new: dict[Place, Tensor], given: dict[Place, Tensor], weight: Tensor, g: Tensor,
        place: tuple[int, int, str], config: CMSConfig, what: Due
    ) -> None:
        """``absorb`` of one matrix, [B, r, c], out of place."""
        (i, l, n), dirty = place, self.dirty[place[0]]
        assert dirty is not None
        before = given.get((i, "grads", l, n))
        total = g if before is None else g + torch.where(_marks(dirty[l], g), before, 0)
        step, wait, back = (_marks([int(b in rows) for b in range(self.batch)], g) for rows in (
            what.step, what.wait, what.reset
        ))
        zero = torch.zeros_like(g)
        kept = torch.where(wait, total, zero if before is None else before)
        new[i, "grads", l, n] = torch.where(step | back, zero, kept)
        if normalises(config):
            total = total / total.square().mean((1, 2), keepdim=True).sqrt().clamp(min=TINY)
        if config.optimizer == "momentum":
            old = given.get((i, "moments", l, n), zero)
            total = config.momentum * old + total
            new[i, "moments", l, n] = torch.where(back, zero, torch.where(step, total, old))
        new[i, "weights", l, n] = torch.where(step, weight - self._rate(*place, config) * total, weight)

    def _rate(self, i: int, l: int, n: str, config: CMSConfig) -> Tensor | float:
        """What ``relative.rate`` says, as a function of the parameters."""
        cms = self.model.blocks[i].cms
        assert cms is not None
        held = cms._parameters_of(l)
        at = config.matrix_rates(l)[n] if config.lr != "learned" else held["log_rates"][config.matrices.index(n)].exp()
        return at * held[n].square().mean().sqrt() if config.relative else at


class _Refreshed(torch.autograd.Function):
    """What was learned, as a function of what it was learned from."""

    @staticmethod
    def forward(ctx: Any, refreshes: Any, values: list[Tensor], *inputs: Tensor):
        ctx.refreshes = refreshes
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *errors: Tensor | None):
        if all(e is None for e in errors):
            return (None,) * (2 + len(ctx.saved_tensors))
        with torch.enable_grad():
            inputs, found = ctx.refreshes.again(list(ctx.saved_tensors))
            pairs = [(t, e) for t, e in zip(found, errors) if e is not None and t.requires_grad]
            if not pairs:
                return (None,) * (2 + len(inputs))
            grads = torch.autograd.grad([t for t, _ in pairs], inputs, [e for _, e in pairs], allow_unused=True)
        return None, None, *grads


def begun(model: Model, state: ModelState) -> ModelState:
    """The draft ``state``, which has a base, with what rows have as a function of the model's weights: what they have
    learned before the call is a constant."""
    for block, c in zip(model.blocks, state.cms):
        if c is None or block.cms is None:
            continue
        for l, held in enumerate(c.weights):
            if held is None or any(t.requires_grad for t in held.values()):
                continue
            params = block.cms._parameters_of(l)
            c.weights[l] = {n: straight(c, l, n, t, params[n], None) for n, t in held.items()}
    return state


def _module(model: Model) -> Any:
    return model


def _places(state: ModelState) -> list[tuple[Place, Tensor]]:
    return [
        ((i, part, l, n), t) for i, c in enumerate(state.cms) if c is not None for part in PARTS
        for l, tensors in enumerate(getattr(c, part)) for n, t in (tensors or {}).items()
    ]


def _marks(rows: list[int], like: Tensor) -> Tensor:
    """[B, 1, 1] bools."""
    return torch.tensor(rows, dtype=torch.bool, device=like.device).view(-1, 1, 1)
