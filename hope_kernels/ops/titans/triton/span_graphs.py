"""Spans of the backward from recorded CUDA graphs: one call of the host in place of a hundred launches.

What the host decides for a span follows from its kind (``_kind``): the configuration, where its rows stand in their
chunks and how many tokens they read, and which tensors there are, of what shape. The spans of a long call are of
one kind but for its ends, and so are those of all layers and steps that are alike. The first span of a kind is
launched as ever, which also compiles its kernels; the second one is recorded, over buffers of its own, and done both
ways: unless all bits agree nothing is recorded any more. From then on a span is copies into the buffers, a graph,
and copies out of them.

A graph keeps the memory that a span takes, for all spans of its kind. The ``KINDS`` that were used last are kept.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....recorder import Part, Recorder, alike, recorder_for
from ..inputs import TokenInputs
from ..state import FastWeights, TitansState
from . import backward
from .spans import CARRIED, Call, Span

KINDS, MET = 8, 256  # recorded; and met once, of which it is remembered

Tensors = list[Tensor | None]
# as backward.span_adjoint returns: of w_init's and the inputs' tensors, and of the state before the span
Adjoint = tuple[Tensors, dict[str, Tensor | None]]


def span_adjoint(
    call: Call, w_init: FastWeights, inputs: TokenInputs, state: TitansState, span: Span, do: Tensor | None,
    adjoint: dict[str, Tensor | None], needed: tuple[bool, ...],
) -> Adjoint:
    """As ``backward.span_adjoint``, bit for bit."""
    device = state.delta2.device
    graphs = of(device) if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()) else None
    if graphs is None:
        return backward.span_adjoint(call, w_init, inputs, state, span, do, adjoint, needed)
    carried = [getattr(state, n) for n in CARRIED]
    return graphs.adjoint(call, span, [*w_init, *inputs, *carried, do, *(adjoint[n] for n in CARRIED)])


def of(device: torch.device) -> SpanGraphs | None:
    """Those of a device and of its current stream, on which one span follows another; None: nothing can be
    recorded there."""
    if device.type != "cuda":
        return None
    key = device.index, torch.cuda.current_stream(device).cuda_stream
    with _lock:
        if key not in _of:
            recorder = recorder_for(device)
            assert recorder is not None
            _of[key] = SpanGraphs(recorder)
        return _of[key]


_lock = threading.Lock()
_of: dict[tuple, SpanGraphs] = {}


@dataclass
class _Kind:
    """tensors: what the graph reads; adjoint: what it writes."""

    again: Part
    tensors: list[Tensor]
    adjoint: Adjoint
    checked: bool = False


class SpanGraphs:
    """recorded, replayed: how many kinds, and how many spans from their graphs, so far."""

    def __init__(self, recorder: Recorder):
        self.recorder: Recorder | None = recorder  # None: nothing can be recorded after all
        self.recorded = self.replayed = 0
        self._kinds: OrderedDict[tuple, _Kind] = OrderedDict()
        self._met: OrderedDict[tuple, None] = OrderedDict()
        self._lock = threading.Lock()

    def adjoint(self, call: Call, span: Span, tensors: Tensors) -> Adjoint:
        """tensors: w_init's, the inputs', the state's, do, and the adjoint of the state after the span."""
        with self._lock:
            if self.recorder is None:
                return _launched(call, span, tensors)
            kind = _kind(call, span, tensors)
            if kind not in self._kinds:
                if kind not in self._met:
                    self._met[kind] = None
                    _shorten(self._met, MET)
                    return _launched(call, span, tensors)
                if (made := self._record(call, span, tensors)) is None:
                    return _launched(call, span, tensors)
                self._kinds[kind] = made
                _shorten(self._kinds, KINDS)
            self._kinds.move_to_end(kind)
            return self._replay(self._kinds[kind], call, span, tensors)

    def _record(self, call: Call, span: Span, tensors: Tensors) -> _Kind | None:
        assert self.recorder is not None
        mine: Tensors = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format)
                         for t in tensors]
        span = replace(span, at=span.at.clone(), reads=span.reads.clone())
        found: list[Adjoint] = []
        try:
            (again,) = self.recorder.record([lambda: found.append(_launched(call, span, mine))])
        except RuntimeError as e:
            self._refuse(f"spans of a backward cannot be recorded here ({e})")
            return None
        self.recorded += 1
        return _Kind(again, _present([*mine, span.at, span.reads]), found[0])

    def _replay(self, kind: _Kind, call: Call, span: Span, tensors: Tensors) -> Adjoint:
        for to, t in zip(kind.tensors, _present([*tensors, span.at, span.reads]), strict=True):
            to.copy_(t)
        kind.again()
        self.replayed += 1
        given, before = kind.adjoint
        # the next span of this kind writes where this one has written
        found = [_copy(t) for t in given], {n: _copy(t) for n, t in before.items()}
        if kind.checked:
            return found
        want = _launched(call, span, tensors)
        pairs = list(zip(_flat(found), _flat(want), strict=True))
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        kind.checked = all((a is None) == (b is None) for a, b in pairs) and alike(both)
        if not kind.checked:
            self._refuse("a recorded span of a backward has other bits than the span itself")
        return want

    def _refuse(self, why: str) -> None:
        warnings.warn(f"training on backend 'triton': {why}; none is recorded any more", RuntimeWarning, stacklevel=2)
        self.recorder = None
        self._kinds.clear()


def _kind(call: Call, span: Span, tensors: Tensors) -> tuple:
    big = max(call.config.chunk_memory, call.config.chunk_other)
    phases = tuple(p % big for p in span.pos)
    shapes = tuple(None if t is None else (t.dtype, t.shape) for t in tensors)
    return call.config, call.update, call.constant_memory, phases, tuple(span.counts), shapes


def _launched(call: Call, span: Span, tensors: Tensors) -> Adjoint:
    last = len(FastWeights._fields) + len(TokenInputs._fields)
    w_init, inputs = FastWeights(*tensors[:3]), TokenInputs(*tensors[3:last])
    end = last + len(CARRIED)
    state, after = call.at(span, tensors[last:end]), dict(zip(CARRIED, tensors[end + 1 :], strict=True))
    return backward.span_adjoint(call, w_init, inputs, state, span, tensors[end], after, ())


def _present(tensors: Tensors) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _flat(adjoint: Adjoint) -> Tensors:
    given, before = adjoint
    return [*given, *(before[n] for n in CARRIED)]


def _copy(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.clone()


def _shorten(held: OrderedDict, size: int) -> None:
    while len(held) > size:
        held.popitem(last=False)
