"""Decoding over one set of buffers: the model's step is captured in a CUDA graph once and replayed for every
token of a segment.

A token is read in three parts. The middle one is the same work on the same addresses for every token:

    1. what is due before it: at a segment boundary the finished segment is learned, eagerly and in place
    2. the step: embedding, blocks, head, new values written into the state's own tensors      <- the graph
    3. counters on the host, the token into the open segment

The kernels of the triton and cuda backends find out on the device whether a chunk closes, so one graph serves
every position. What a graph holds are addresses, and a boundary may change some: a CMS level's first refresh
gives a batch weights of its own. Then the step is captured again.

With backend "cuda" a decoder keeps a rounded copy of every memory's weights beside the state: a token reads a
third of the bytes (ops/titans/rounded.py, which says what keeps it true).
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ..check import check_tensor
from ..config import TitansConfig
from ..identity import unchanged
from ..layers.titans import SelfModifyingTitans
from ..layers.wrapped import placement
from ..model_state import MixerState, ModelState
from ..ops.cms.level import Level
from ..ops.cms.matrix import Matrix
from ..ops.cms.state import CMSState
from ..ops.titans.backends import DEVICE_DECIDES
from ..ops.titans.rounded import RoundedWeights, unserved_copy
from ..ops.titans.state import FastWeights, TitansState
from ..state import expanded
from . import native, segments
from .arrival import Arrival
from .native import NativeStep
from .protocol import Model
from .unread import check_read_next

Levels = list[list[Level] | None]  # the CMS weights in force, per block
_changes, _flags, _weights = attrgetter("_changes"), attrgetter("own", "rank"), attrgetter("weights")
_version = attrgetter("_version")
_NOT_FINITE = "Decoder.step: non-finite logits (weights, state or learning rates diverged); {}"


class Decoder:
    """Reads one token per row and step with ``model``, advancing ``state`` in place: the logits, state and
    counters of ``model(tokens, state, learn=learn, backend=backend)`` under ``no_grad``.

    learn: "off" or "next_token". backend: as in the model's ``forward``. capture: replay the step from a CUDA
    graph; None does where that is possible (a CUDA device, backend "triton" or "cuda", no attention), and
    everything else is the same without. captures: how often the step has been captured so far.

    Every row reads in every step; rows may stand at different positions. Between steps the state may be
    saved, cloned and read on by other calls that advance it in place, and be made to forget or to learn without
    reading. One whose tensors were exchanged (``select``, ``to``) needs a new decoder. A step that raises leaves the
    state as it was, or, interrupted behind its work, with the tokens read; only with backend "triton" or "cuda", which
    write it in place, one that raises may leave it half advanced: go back to a clone or a file.
    On a CPU a step is one call of C++ where ``engine/native.py`` serves the model. Hooks that come later are then not
    called, and what is written past PyTorch (``.data``, NumPy) is not seen: both need a new decoder.

    alone: set it where no code of others runs between steps; weights are then looked at in the first one in C++ only.

    Rows of which some have refreshed a CMS level and some have not are read without a graph. No GPU has run a
    capture yet.
    Raises ValueError for a model divided over processes, a state of another model, an unknown ``learn``, and
    capture=True where it is impossible, as with attention, whose cache grows.
    """

    def __init__(
        self, model: Model, state: ModelState, learn: str = "off", backend: str | None = None,
        capture: bool | None = None,
    ):
        name = "Decoder"
        model.claim(name, state)
        if learn not in ("off", "next_token"):
            raise ValueError(f"{name}: argument learn is {learn!r}, expected 'off' or 'next_token'")
        if model.parallel is not None:
            raise ValueError(f"{name}: argument model is divided over processes, which agree before every call of the "
                             "model itself")
        self.device = placement(model.embed).device
        self._kind = self.device.type
        grows = model.config.mixer == "attention"
        possible = self.device.type == "cuda" and backend in DEVICE_DECIDES and not grows
        if capture and grows:
            raise ValueError(f"{name}: argument capture is True, and the model has attention, whose cache grows with "
                             "the sequence")
        if capture and not possible:
            raise ValueError(f"{name}: argument capture is True, which needs a CUDA device and backend 'triton' "
                             f"or 'cuda', not {self.device.type} and {backend!r}")
        self.model, self.state, self.backend = model, state, backend
        self.learn = learn if model.learns else "off"
        self.capture = possible if capture is None else capture
        self.captures = 0
        self.alone = False
        # a step reads a token or changes nothing, so learning before it must not either
        self._whole = backend not in DEVICE_DECIDES
        with torch.inference_mode(False):
            if any(t.requires_grad or t.is_inference() or expanded(t) for t in state.tensors()):
                state.assign(state.usable())
            self._tokens = torch.zeros(state.batch, 1, dtype=torch.int64, device=self.device)
            self._one_each = torch.ones(state.batch, dtype=torch.int64, device=self.device)
            found = [self._memories(i) for i in range(len(state.mixers))]
            self._rounded = [None if m is None else RoundedWeights(*m) for m in found]
        self._ones = [1] * state.batch
        self._levels: Levels = []
        self._stale = True  # whether ``_levels`` are no longer those of the state
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._pool = self._signature = None
        self._native: NativeStep | None = None  # the step in C++; None: does not serve, if ``_asked``
        self._asked = False
        self._packed = state.fingerprint  # the mark of the weights that ``_strips`` are of
        self._strips = native.strips_of(model)
        self._expected = list(state.pos)
        self._written = state._changes
        self._learned: tuple | None = None  # what says that nothing else changes the CMS weights in force

    @torch.no_grad()
    def step(self, tokens: Tensor, check_finite: bool = False) -> Tensor:
        """Reads tokens [B, 1] int64: logits [B, 1, vocab_size], which with a graph are valid until the next
        step only.

        Raises ValueError for another shape, dtype or device, tokens other than the state's ``unread`` ones, a
        state that another call has in hand, and on the CPU for a token id out of range; nothing is read then.
        check_finite: also for logits that are not finite, where backend "triton" or "cuda" alone has read the token.
        """
        if torch.is_autocast_enabled(self._kind):
            with torch.autocast(self._kind, enabled=False):
                return self._read_next(tokens, check_finite)
        return self._read_next(tokens, check_finite)

    def _read_next(self, tokens: Tensor, check_finite: bool) -> Tensor:
        state = self.state
        if state._unwritten is not None:
            state.settle()
        check_tensor("Decoder.step", "tokens", tokens, (state.batch, 1), torch.int64, self.device)
        if self.device.type == "cpu" and state.batch:
            found, size = tokens.flatten().tolist(), self.model.config.vocab_size
            low, high = min(found), max(found)
            if low < 0 or high >= size:
                raise ValueError(
                    f"Decoder.step: argument tokens has {low if low < 0 else high}, expected 0 to {size - 1}"
                )
        check_read_next("Decoder.step", state.unread, tokens, self._ones)
        state.drop_held()
        looked = self.alone and self._native is not None and self._native.mark is state.fingerprint
        seen = unchanged(self.model, state.fingerprint) if looked else contextlib.nullcontext()
        with seen, self.model.reading("Decoder.step", state):
            new = state.followed(self.model)
            if new is not state:
                state.assign(new)
            if new is not state or self._expected != state.pos or not looked and not self._same_levels():
                self._stale = True  # another call has advanced the state, or weights have moved
            try:
                learned, opened = self._arrive(tokens)
                self._tokens.copy_(tokens)
                logits = self._read(tokens, learned, opened, check_finite)
            except BaseException:
                self._stale = True  # of what the state does not have after all
                raise
            if self._learned is None:
                self._learned = self._look()
            self._written, self._expected = state._changes, list(state.pos)
            return logits

    def _look(self) -> tuple:
        cms = [c for c in self.state.cms if c is not None]
        flags = [([list(c) for c in own], [list(c) for c in rank]) for own, rank in map(_flags, cms)]
        weights = [*chain.from_iterable(map(_weights, cms))]
        tensors = [t for of in weights for t in (of or {}).values() if not t.is_inference()]
        return cms, [*map(_changes, cms)], flags, weights, tensors, [*map(_version, tensors)]

    def _same_levels(self) -> bool:
        """Whether nobody else has changed the CMS weights in force, since a step has looked at them."""
        if self._learned is None or self._written != self.state._changes:
            return False
        cms, changes, flags, weights, tensors, versions = self._learned
        return (
            [*map(_changes, cms)] == changes and [*map(_flags, cms)] == flags
            and all(map(is_, chain.from_iterable(map(_weights, cms)), weights))
            and [*map(_version, tensors)] == versions
        )

    def _arrive(self, tokens: Tensor) -> tuple[ModelState | None, list[MixerState] | None]:
        """What is due when a token arrives and before it is read, as in ``learning.read_off`` and
        ``read_learning``: what the state is to be once the token has been read, and its snapshot; None, None where
        nothing is due, or where the state has it already."""
        state, model = self.state, self.model
        learned = None
        if self.learn == "off":
            complete = segments.complete(state)
            if any(complete):
                done = [0] * state.batch
                learned = segments.replay(model, self._draft(), complete, tokens, done, None, self.backend)
            return self._kept(learned), None
        C = model.segment
        if any(p % C == 0 for p in state.pos):
            done = [0] * state.batch
            learned = segments.boundary(model, self._draft(), self._ones, tokens, done, self.backend)
        seen, learned = (state if learned is None else learned).seen, self._kept(learned)
        opening = [s == 0 for s in seen]
        if not any(opening):
            return learned, None
        pairs, every = zip(state.snapshot, state.mixers), all(opening)
        if self._whole:
            opened: list[Any] = [now.snapshot() if every else old.caught_up(now, opening) for old, now in pairs]
            return learned, opened
        state.snapshot[:] = [old.assign(now if every else old.caught_up(now, opening)) for old, now in pairs]
        return learned, None

    def _draft(self) -> ModelState:
        """A state to learn in: on the tensors of this one, where a graph holds their addresses."""
        return segments.draft(self.state, "made" if self._whole else "all")

    def _kept(self, draft: ModelState | None) -> ModelState | None:
        if draft is None:
            return None
        self._stale, new = True, segments.finished(draft)
        if self._whole:
            return new
        self.state.assign(new)
        return None

    def _read(
        self, tokens: Tensor, learned: ModelState | None, opened: list[Any] | None, check_finite: bool
    ) -> Tensor:
        """Reads ``_tokens``, which are ``tokens``, into the state. learned, opened: of ``_arrive``."""
        state, of = self.state, self.state if learned is None else learned
        if self._native is not None and not self._native.current(state):
            self._stale = True
        if self._stale:
            self._levels, self._stale, self._learned = _all_slots(self.model.levels(of), of.cms), False, None
            self._native, self._asked = None, False
            signature = _signature(self._levels, state.mixers)
            if signature != self._signature:
                self._graph, self._signature = None, signature
        self._renew()
        if self._graph is None and self.capture and _uniform(self._levels):
            self._capture()
        in_cpp = self._in_cpp() if self.device.type == "cpu" else None
        if self._whole and in_cpp is None:
            logits, new = self._forward(state.mixers, self._rounded)
            self._check(logits, check_finite, "the last token has not been read")
            state.written(self._arrival(tokens, learned, opened, logits, new))
        elif in_cpp is not None:
            logits = in_cpp.ready(state, check_finite)
            arrival = self._arrival(tokens, learned, opened, logits, None, in_cpp.step, in_cpp.ended)
            state.written(arrival)
            if not arrival.read:
                raise ValueError(_NOT_FINITE.format("the last token has not been read"))
        else:
            logits = self._in_place(tokens, learned, opened)
            self._check(logits, check_finite, "the state is past them")
        return logits

    def _arrival(self, tokens: Tensor, learned: ModelState | None, opened: list[Any] | None, *more: Any) -> Arrival:
        C = self.model.segment if self.learn == "next_token" else 0
        return Arrival(self.state, tokens, learned, opened, C, *more)

    def _in_place(self, tokens: Tensor, learned: ModelState | None, opened: list[Any] | None) -> Tensor:
        """By kernels that write the state where it lies."""
        logits = self._logits
        if self._graph is None or logits is None:
            logits = self._step()
        else:
            self._graph.replay()
        self.state.written(self._arrival(tokens, learned, opened, logits, []))
        return logits

    def _check(self, logits: Tensor, check_finite: bool, place: str) -> None:
        if check_finite and not bool(torch.isfinite(logits).all()):
            raise ValueError(_NOT_FINITE.format(place))

    def _memories(self, i: int) -> tuple[TitansConfig, FastWeights, TitansState] | None:
        """Of a block whose memories the backend reads from rounded weights: what those are made of."""
        state, layer = self.state.mixers[i], self.model.blocks[i].mixer
        if not isinstance(state, TitansState) or not isinstance(layer, SelfModifyingTitans):
            return None
        served = self.backend == "cuda" and unserved_copy(state.config) is None
        return (state.config, layer.w_init, state) if served else None

    def _renew(self) -> None:
        """Forgets rounded weights of what PyTorch has written since: before a replay, which cannot do so, and
        before a capture, every replay of which would."""
        for i, rounded in enumerate(self._rounded):
            if rounded is not None and (memories := self._memories(i)) is not None:
                rounded.of(*memories)

    def _in_cpp(self) -> NativeStep | None:
        """The step as one call of C++, where that serves the model as it is now."""
        if not self._asked:
            self._asked = True
            served = self._whole and self.state.batch > 0 and native.dense(self.model, self._levels)
            if served and native.unserved(self.model, self.backend, self.learn == "next_token") is None:
                if self._packed is not self.state.fingerprint:  # fused optimizers move no version counter
                    self._packed = self.state.fingerprint
                    self._strips = native.strips_of(self.model)
                self._native = NativeStep(self.model, self.state, self._levels, self._tokens, self._strips)
        return self._native

    def _step(self) -> Tensor:
        """The model's step over the buffers: reads ``_tokens``, writes the mixers' tensors. Asks the host for
        nothing."""
        mixers = self.state.mixers
        logits, new = self._forward(mixers, self._rounded)
        for old, now in zip(mixers, new):
            for a, b in zip(old.tensors(), now.tensors(), strict=True):
                if a is not b:
                    a.copy_(b)
        if self.backend in DEVICE_DECIDES:  # of all layers at once
            counts = [m.count for m in mixers if isinstance(m, TitansState)]
            torch.ops.aten._foreach_add_.Scalar(counts, 1)
        return logits

    def _forward(
        self, mixers: list[MixerState], rounded: list[RoundedWeights | None]
    ) -> tuple[Tensor, list[MixerState]]:
        """Logits and the mixers' new states. The kernels of ``DEVICE_DECIDES`` go by ``count``, and advance
        all else in place but the inputs that the convolution keeps."""
        if self.backend in DEVICE_DECIDES:
            pairs = zip(mixers, rounded)
            mixers = [m.in_place(self._one_each, of) if isinstance(m, TitansState) else m for m, of in pairs]
        h, new = self.model.run(self.model.embed(self._tokens), mixers, self._levels, self._ones, self.backend)
        return self.model.logits(h, self._ones, self.backend), new

    def _capture(self) -> None:
        with torch.cuda.device(self.device):
            aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):  # kernels are compiled and libraries started outside the graph
                self._forward([m.clone() for m in self.state.mixers], [None] * len(self._rounded))
            here.wait_stream(aside)
            self._graph, self._pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(self._graph, pool=self._pool):
                self._logits = self._step()
        self.captures += 1


def _all_slots(levels: Levels, states: list[CMSState | None]) -> Levels:
    """The same levels with all slots for pending factors, of which unused ones are zero: their number stays
    as it is between refreshes."""
    return [
        None if of is None or c is None else [_with_slots(level, c, l) for l, level in enumerate(of)]
        for of, c in zip(levels, states)
    ]


def _with_slots(level: Level, state: CMSState, l: int) -> Level:
    left, right = state.left[l], state.right[l]
    if left is None or right is None:
        return level
    rates = state.config.matrix_rates(l)
    slots = {n: {"left": t, "right": right[n], "scale": -rates[n]} for n, t in left.items()}
    return {n: replace(Matrix.of(t), **slots[n]) if n in slots else t for n, t in level.items()}


def _uniform(levels: Levels) -> bool:
    """Whether no level is shared by some rows and owned by others, which asks the host for indices."""
    matrices = [m for level in levels for one in level or () for m in one.values() if isinstance(m, Matrix)]
    return all(m.own is None or all(m.rows) or not any(m.rows) for m in matrices)


def _signature(levels: Levels, mixers: list[MixerState]) -> list:
    """What a graph has baked in: addresses and shapes of what it reads and writes, and which rows have
    weights of their own."""
    found: list = [(t.data_ptr(), t.shape) for m in mixers for t in m.tensors()]
    for level in levels:
        for one in level or ():
            for t in one.values():
                parts = (t.shared, t.own, t.left, t.right) if isinstance(t, Matrix) else (t,)
                found += [p if p is None else (p.data_ptr(), p.shape) for p in parts]
                found.append(t.rows if isinstance(t, Matrix) else None)
    return found
