"""A segment through a whole model, its loss, and back, in three calls of C++ (csrc/cpu/segment.h): what is read to
be learned on a CPU, and what that learns from it. ``native_segments.py`` has several of them in one call.

Between the calls stands what only Python knows: what the guard says of the losses, and which levels are due
(``ops/cms/plan.py``). Every number is one chain of operations over its own token and row, so
what is learned does not depend on how a text is cut, on company in a batch, or on threads: not by a bit, as long as
tokens are read by such calls alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..model_state import ModelState
from ..ops.shared.cpu_library import address
from ..ops.titans.cpp import TitansCall, settings
from ..ops.titans.state import Layout, TitansState
from .head import Targets
from .native import size_of, unserved
from .native_mixer import GATES, MEMORY, SQUARE, constant_momentum
from .native_reading import BlockCall, LevelCall, Memory, Reading, SegmentCall, addresses


class Reader:
    """Reads segments of ``model`` for one call, in C++ where that serves it. reason: why it does not, or None."""

    def __init__(self, model: Any, backend: str | None):
        self.plans = [{} for _ in model.blocks]  # of steps, by block and level
        self.model, self.reason = model, unserved(model, backend) or _cms_unserved(model)
        self._readings: dict[tuple, Reading] = {}  # that are done with
        self._made: dict[int, tuple[list[TitansState], list[Memory]]] = {}  # mixers after readings: by their id
        self._free: list[list[TitansState]] = []  # of these, those that nobody needs any more
        if self.reason is None:
            self._prepare(model)

    def serves(self, state: ModelState) -> bool:
        """Whether it reads with what ``state`` has learned."""
        return self.reason is None and not any([c is not None and any(map(any, c.rank)) for c in state.cms])

    def read(
        self, state: ModelState, mixers: Sequence[Any], ids: Tensor, lengths: list[int], among: list[int] | None,
        keep: bool
    ) -> tuple[Reading, list[Any]]:
        """Reads ``lengths`` tokens of each row of ids [B, n] from ``mixers``, which stay as they are, with what
        ``state`` has learned in the rows ``among`` (None: all): the reading, and the mixers after it. keep: its loss
        is to be learned."""
        B, T = ids.shape
        reading = self.reading(B, T, keep)
        return reading, reading.read(state, mixers, ids.contiguous(), lengths, among)

    @torch.no_grad()  # a segment is learned with a graph, which this look has no part in
    def own_losses(
        self, state: ModelState, mixers: Sequence[Any], ids: Tensor, lengths: list[int], targets: Targets
    ) -> Tensor:
        """Nats [B, n] of tokens as the model's own weights read them, from ``mixers``, which stay as they are."""
        own = replace(state, cms=[b.cms and b.cms.init_state(len(lengths)) for b in self.model.blocks])
        reading, after = self.read(own, mixers, ids, lengths, None, keep=False)
        heads, _ = reading.head(targets, logits=False)
        self.give_back(reading, after)
        assert heads.nats is not None
        return heads.nats

    def reading(self, B: int, T: int, keep: bool) -> Reading:
        """For segments of T tokens."""
        spare = self._readings.pop((B, T, keep), None)
        if spare is None:
            return Reading(self, B, T, keep)
        spare.reader = self
        return spare

    def mixers_like(self, mixers: Sequence[TitansState]) -> tuple[list[TitansState], list[Memory]]:
        """States as ``mixers``, whose tensors are to be written, and where these lie."""
        if self._free and self._free[-1][0].batch == mixers[0].batch:
            free = self._free.pop()
            return free, self._made[id(free)][1]
        # normal tensors under inference mode too: they may be written outside it
        with torch.inference_mode(False):
            empty = [{n: _empty(getattr(m, n)) for n in (*MEMORY, "count")} for m in mixers]
            made = [replace(m, **tensors) for m, tensors in zip(mixers, empty)]
        self._made[id(made)] = made, [addresses(m)[0] for m in made]
        return self._made[id(made)]

    def made(self, mixers: Sequence[Any]) -> list[Memory] | None:
        """Where the tensors of ``mixers`` lie, if this has made them, in this call."""
        known = self._made.get(id(mixers))
        return None if known is None else known[1]

    def give_back(self, reading: Reading, mixers: Sequence[Any]) -> None:
        """Nobody needs ``reading``, nor the ``mixers`` before it, if a reading has made them."""
        reading.reader = None  # while it waits here: what both hold would otherwise live on until garbage is collected
        self._readings[(*reading.shape, reading.keep)] = reading
        self.free(mixers)

    def free(self, mixers: Sequence[Any]) -> None:
        """Nobody needs ``mixers``, if a reading has made them."""
        known = self._made.get(id(mixers))
        if known is not None:
            self._free.append(known[0])

    def _prepare(self, model: Any) -> None:
        """What is the same in all readings."""
        config, d, V = model.config, model.config.d_model, model.config.vocab_size
        self._held: list[Any] = []  # whatever the library is handed the address of
        head = model.embed.weight if model.head is None else model.head.weight
        self.blocks = (BlockCall * len(model.blocks))()
        self.matrices: list[list[list[tuple[str, int | None, int]]]] = []  # by block and level: name, address, size
        self.levels: list[Any] = []
        for block, to in zip(model.blocks, self.blocks):
            self._mixer(to, block, d)
            cms = block.cms
            levels = [] if cms is None else [level.parameters_by_name() for level in cms.levels]
            calls = (LevelCall * len(levels))()
            for at, tensors in zip(calls, levels):
                at.N, at.gain = tensors["up"].shape[0], self._at(tensors["norm_gain"], d)
            self.matrices.append([
                [(n, self._at(t[n], t[n].numel()), t[n].numel()) for n in ("up", "down")] for t in levels
            ])
            self.levels.append(calls)
            to.levels = len(levels)
        self.call = SegmentCall(
            d=d, W=config.titans.conv_window or 0, vocab=V, blocks=len(model.blocks), threads=torch.get_num_threads(),
            eps=config.norm_eps, embed=self._at(model.embed.weight, V * d), gain=self._at(model.norm.weight, d),
            head=self._at(head, V * d),
        )

    def _mixer(self, to: Any, block: Any, d: int) -> None:
        mixer, c = block.mixer, block.mixer.config
        for name in SQUARE + GATES:
            module = getattr(mixer, name)
            count = d * d if name in SQUARE else c.num_heads * d
            setattr(to, name, None if module is None else self._at(module.weight, count))
        to.beta_bias = self._at(mixer.beta_bias, c.num_heads)
        to.beta = constant_momentum(c)
        to.gain, to.out_gain = self._at(block.norm.weight, d), self._at(mixer.norm_gain, d)
        to.conv = self._at(mixer.conv, (c.conv_window or 1) * d)
        where: dict[str, Any] = {"eta_bias": self._at(mixer.eta_bias, c.num_heads),
                                 "alpha_bias": self._at(mixer.alpha_bias, c.num_heads)}
        if c.retain_to == "init":
            shapes = Layout.of(c).shapes(c.num_heads)
            for name, t, shape in zip(("base2", "base1", "base1s"), mixer.w_init, shapes):
                where[name] = self._at(t, size_of(shape))
        to.titans = TitansCall(H=c.num_heads, update=1, **settings(c), **where)

    def _at(self, t: Tensor | None, count: int) -> int | None:
        self._held.append(t)
        return address(t, count)


def _empty(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _cms_unserved(model: Any) -> str | None:
    """Why what the CMS of ``model`` learn is not learned here, or None."""
    for block in model.blocks:
        if block.cms is None:
            continue
        if block.cms.config.precondition is not None:
            return "serves steps without precondition"
        if any(block.cms._slots(l) for l in range(block.cms.config.num_levels)):
            return "serves levels whose factors do not wait to be folded"
    return None
