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

from ..config import CMSConfig
from ..model_state import ModelState
from ..ops.shared.cpu_library import address
from .head import Targets
from .native import unserved, window
from .native_attention_segment import Attention
from .native_level import KINDS, low_rank_of, mixes, settled, shares, vectors_of
from .native_memories import Memories
from .native_reading import BlockCall, LevelCall, Reading, SegmentCall


class Reader:
    """Reads segments of ``model`` for one call, in C++ where that serves it. reason: why it does not, or None.
    learning: as ``unserved`` has it."""

    def __init__(self, model: Any, backend: str | None, learning: bool = True):
        self.plans = [{} for _ in model.blocks]  # of steps, by block and level
        self.model, self.reason = model, unserved(model, backend, learning) or _cms_unserved(model)
        self._readings: dict[tuple, Reading] = {}  # that are done with
        self.mixers = Attention() if model.config.mixer == "attention" else Memories()
        if self.reason is None:
            self._prepare(model)

    def serves(self, state: ModelState) -> bool:
        """Whether it reads with what ``state`` has learned."""
        return self.reason is None and settled(state)

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

    def give_back(self, reading: Reading, mixers: Sequence[Any]) -> None:
        """Nobody needs ``reading``, nor the ``mixers`` before it, if a reading has made them."""
        reading.rest()
        self._readings[(*reading.shape, reading.keep)] = reading
        self.mixers.free(mixers)

    def _prepare(self, model: Any) -> None:
        """What is the same in all readings."""
        config, d, V = model.config, model.config.d_model, model.config.vocab_size
        self._held: list[Any] = []  # whatever the library is handed the address of
        head = model.embed.weight if model.head is None else model.head.weight
        self.blocks = (BlockCall * len(model.blocks))()
        # by block and level: name, address, and how many numbers a row learns of it
        self.matrices: list[list[list[tuple[str, int | None, int]]]] = []
        self.levels: list[Any] = []
        for block, to in zip(model.blocks, self.blocks):
            self.mixers.prepare(to, block, self._at)
            if block.post_norm is not None:
                to.post_gain = self._at(block.post_norm.weight, d)
            cms = block.cms
            levels = [] if cms is None else [
                self._level(cms.config, l, *of) for l, of in enumerate(zip(cms.levels, shares(cms)))]
            to.mixture = mixes(cms)
            self.matrices.append([matrices for _, matrices in levels])
            self.levels.append((LevelCall * len(levels))(*[call for call, _ in levels]))
            to.levels = len(levels)
        self.call = SegmentCall(
            d=d, W=window(config), vocab=V, blocks=len(model.blocks), threads=torch.get_num_threads(),
            eps=config.norm_eps, scale=getattr(model.embed, "scale", 1.0), embed=self._at(model.embed.weight, V * d),
            gain=self._at(model.norm.weight, d), head=self._at(head, V * d),
        )

    def _level(
        self, config: CMSConfig, l: int, level: Any, share: float
    ) -> tuple[LevelCall, list[tuple[str, int | None, int]]]:
        """What is the same of level ``l`` in all readings, and its entry of ``matrices``."""
        t = level.parameters_by_name()
        call = LevelCall(
            kind=KINDS[config.mlp], N=config.hidden, vectors=vectors_of(t, config, self._at), share=share,
            low=low_rank_of(config, l, t["up"], lambda S: self._at(S, S.numel())),
            preconditioned=config.precondition is not None,
        )
        found = []
        for name in config.matrices:
            r, c = t[name].shape
            found.append((name, self._at(t[name], r * c), r * (c if config.rank is None else config.rank)))
        return call, found

    def _at(self, t: Tensor | None, count: int) -> int | None:
        self._held.append(t)
        return address(t, count)


def _cms_unserved(model: Any) -> str | None:
    """Why what the CMS of ``model`` learn is not learned here, or None."""
    for block in model.blocks:
        if block.cms is None:
            continue
        if any(block.cms._slots(l) for l in range(block.cms.config.num_levels)):
            return "serves levels whose factors do not wait to be folded"
    return None
