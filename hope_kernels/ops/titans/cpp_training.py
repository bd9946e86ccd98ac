"""Training on backend="cpp": csrc/cpu/titans_backward.cpp behind an autograd function.

The forward is the one that serves no_grad, with the deviations at the start of every span kept beside it. A span is
one chunk, of the slower clock, where all of them fit into ``KEPT_BYTES``; else more, up to ``CHUNKS_A_SPAN`` of the
faster clock. Spans count from the start of each row's open chunk. The backward is one call: every thread takes a
(row, head) through its spans from the last one, replays each from its state, and differentiates its chunks in reverse
(BACKWARD.md derives how).

    memory   tokens / span x state, beside inputs and outputs (plain autograd: every activation and every
             chunk's state)
             and what the memories made of every token
    work     the forward's writes twice where a span has several chunks, and the backward

Gradients have the same bits for any span, any number of threads and any company in the batch.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import TitansConfig
from ...state import Counters
from ..shared.cpu_library import address, check_outcome, library
from . import cpp
from .inputs import TokenInputs
from .state import FastWeights, TitansState

CHUNKS_A_SPAN, KEPT_BYTES = 8, 2**25  # beyond that every call would ask the system for fresh pages
CARRIED = ("delta2", "delta1", "delta1s", "pending_k", "pending_v", "pending_eta", "pending_alpha")
_NAMES = FastWeights._fields + TokenInputs._fields + CARRIED
_ADJOINTS = (
    "o", "delta2", "delta1", "delta1s", "base2", "base1", "base1s", "pending_k", "pending_v", "pending_eta",
    "pending_alpha", "q", "x", "k", "v", "eta", "alpha", "eta_bias", "alpha_bias",
)


class _Backward(ctypes.Structure):
    """``TitansBackward`` of csrc/cpu/call.h."""

    _fields_ = [("call", cpp.TitansCall)] + [(n, ctypes.c_void_p) for n in _ADJOINTS]


class Call(NamedTuple):
    """What a call is, beside its tensors. state: counters only, of its own."""

    config: TitansConfig
    state: TitansState
    lengths: list[int]
    update: bool


def titans_cpp_training(
    config: TitansConfig, w_init: FastWeights, inputs: TokenInputs, state: TitansState, lengths: list[int],
    *, update: bool = True, constant_memory: bool = False, stats=None,
) -> tuple[Tensor, TitansState]:
    """As ``scan.titans_chunk`` under grad: o and the new state carry the graph to whatever required a gradient.

    Raises ValueError for ``stats``. Gradients of gradients are not there, and say so when they are asked for.
    """
    carried = [getattr(state, n) for n in CARRIED]
    tensors = [*w_init, *inputs, *carried]
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if stats is not None or constant_memory or not graph:
        options: dict[str, Any] = {"update": update, "constant_memory": constant_memory, "stats": stats}
        return cpp.titans_cpp(config, w_init, inputs, state, lengths, **options)
    # the caller may advance its state in place before the backward
    bare = replace(
        state, pos=Counters(state.pos), count=state.count.clone(), conv_tail=None, **dict.fromkeys(CARRIED)
    )
    o, *new = _Training.apply(Call(config, bare, list(lengths), update), *tensors)
    if not update:
        return o, state
    return o, state.advanced(lengths, **dict(zip(CARRIED, new)))


def span_of(call: Call, state_bytes: int) -> int:
    """Tokens between the states that are kept, of ``state_bytes`` for all rows together."""
    small, big = sorted((call.config.chunk_memory, call.config.chunk_other))
    most = max(1, CHUNKS_A_SPAN * small // big)
    chunks = max((p % big + n for p, n in zip(call.state.pos, call.lengths)), default=0) // big
    return big * min(most, max(1, -(-chunks * state_bytes // KEPT_BYTES)))


class _Training(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, *tensors: Tensor | None):
        given = dict(zip(_NAMES, tensors))
        w_init, inputs = FastWeights(*tensors[:3]), TokenInputs(*tensors[3:-len(CARRIED)])
        state = replace(call.state, **{n: _plain(given[n]) for n in CARRIED})
        new = cpp.advanced(call.config, state, call.lengths) if call.update else state
        spans = _spans(call, new, inputs)
        o = cpp._scan(call.config, w_init, inputs, new, call.state.pos, call.lengths, call.update, spans=spans)
        ctx.call, ctx.span = call, spans.size
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *spans.kept, *spans.made)
        if not call.update:
            return o, *[None] * len(CARRIED)
        # what this call did not write is the caller's own: an output of the graph is a tensor of its own
        found = [(getattr(new, n), given[n]) for n in CARRIED]
        return o, *(t.view_as(t) if t is not None and t is was else t for t, was in found)

    @staticmethod
    def backward(ctx, do: Tensor | None, *dnew: Tensor | None):
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = _gradients(ctx, saved, do, dnew)
        if not torch.is_grad_enabled():
            return None, *found
        alive = [g for g in found if g is not None]
        sources = [t for t in (do, *dnew, *saved) if t is not None and t.requires_grad]
        marked = iter(_Once.apply(len(alive), *alive, *sources))
        return None, *(None if g is None else next(marked) for g in found)


class _Once(torch.autograd.Function):
    """The first ``count`` tensors, gradients that depend on the others: this cannot be differentiated."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor):
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        raise RuntimeError(
            "titans: backend 'cpp' has no gradient of its gradient; the chunked backend can be differentiated twice"
        )


def _gradients(
    ctx, saved: tuple[Tensor | None, ...], do: Tensor | None, dnew: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """By everything but the call that ``_Training.forward`` was given."""
    call, tensors, kept = ctx.call, saved[:len(_NAMES)], tuple(saved[len(_NAMES):])
    given = dict(zip(_NAMES, tensors))
    inputs = TokenInputs(*tensors[3:-len(CARRIED)])
    state = replace(call.state, **{n: _plain(given[n]) for n in CARRIED})
    adjoint = _adjoints(call, given, do, dict(zip(CARRIED, dnew)))
    spans = cpp.Spans(ctx.span, kept[:3], kept[3:])
    made, alive = cpp.titans_call(
        call.config, FastWeights(*tensors[:3]), inputs, state, call.state.pos, call.lengths, call.update,
        spans=spans)
    back = _Backward(call=made, **{n: address(t, t.numel(), n) for n, t in adjoint.items() if t is not None})
    check_outcome(library().hope_titans_backward(ctypes.byref(back)), "titans")
    del alive
    # of every row for itself so far
    for name in ("base2", "base1", "base1s", "eta_bias", "alpha_bias"):
        adjoint[name] = None if (each := adjoint[name]) is None else each.sum(0)
    named = zip(_NAMES, (
        "base2", "base1", "base1s", "q", "x", "k", "v", "eta", "alpha", "beta", "eta_bias", "alpha_bias", *CARRIED
    ))
    return [
        None if not wanted or (g := adjoint.get(by)) is None or (t := given[name]) is None else g.to(t.dtype)
        for (name, by), wanted in zip(named, ctx.needs_input_grad[1:])
    ]


def _plain(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _spans(call: Call, new: TitansState, inputs: TokenInputs) -> cpp.Spans:
    """Room for what a call keeps."""
    config, pos = call.config, call.state.pos
    state_bytes = sum(t.nbytes for t in new.deviation if t is not None)
    size, big = span_of(call, state_bytes), max(config.chunk_memory, config.chunk_other)
    last = [(p % big + n - 1) // size for p, n in zip(pos, call.lengths) if n]
    count = max(last, default=0) if call.update else 0
    kept = tuple(None if t is None else t.new_empty(*t.shape[:2], count, *t.shape[2:]) for t in new.deviation)
    if inputs.x is None or not call.update:
        return cpp.Spans(size, kept, (None,) * 5)
    token, every = inputs.x.shape, inputs.x.shape[:-1]
    shapes = (token, token, every, every if config.retention else None, every)
    return cpp.Spans(size, kept, tuple(None if s is None else new.delta2.new_empty(s) for s in shapes))


def _adjoints(
    call: Call, given: dict[str, Tensor | None], do: Tensor | None, dnew: dict[str, Tensor | None]
) -> dict[str, Tensor | None]:
    """By the names of ``_ADJOINTS``: what the library reads and writes."""
    first = given["x"] if given["x"] is not None else given["k"]
    assert first is not None
    B, H = first.shape[0], first.shape[2]
    whole = min(call.lengths, default=first.shape[1]) == first.shape[1]
    found: dict[str, Tensor | None] = {"o": (torch.zeros_like(first) if do is None else do).float().contiguous()}
    for name in CARRIED:
        like, error = given[name], dnew[name]
        if like is not None:
            like = like.detach()
            fresh = torch.zeros_like(like, memory_format=torch.contiguous_format)
            found[name] = fresh if error is None else fresh.copy_(error)
    if call.config.retain_to == "init":
        for by, name in zip(("base2", "base1", "base1s"), CARRIED):
            found[by] = None if (t := found.get(name)) is None else torch.zeros_like(t)
    for name in ("q", "x", "k", "v", "eta", "alpha"):
        if (t := given[name]) is not None:
            make = torch.empty_like if whole and (call.update or name == "q") else torch.zeros_like
            found[name] = make(t.detach(), memory_format=torch.contiguous_format)
    for name in ("eta_bias", "alpha_bias"):
        if given[name] is not None:
            found[name] = first.new_zeros(B, H)
    return {n: found.get(n) for n in _ADJOINTS}
