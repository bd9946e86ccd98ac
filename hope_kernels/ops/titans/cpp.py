"""backend="cpp": csrc/cpu/titans.cpp, one call into a C++ library for all chunks of all rows and heads.
x86-64 CPUs, fp32.

Gradients here are those of reads alone, by their queries (with adaptive_q by x, through M_q), with fast weights and
writes constants of the graph (``constant_memory``: what a learning model takes of its memories); those of training are
in cpp_training.py.
Without the library this backend says so and the chunked one does the work.
Results are bit-identical for any split of a sequence, any company in the batch and any number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backend import BY_ALL, Request
from ...config import TitansConfig
from ..shared.activations import ACTIVATION_CODES
from ..shared.cpu_library import NO_GRAPH, address, check_outcome, has_autograd, library, row_array
from ..shared.pullback import Pullback
from ..unit.cpp import unit, unit_backward
from .state import FastWeights, Layout, TitansState

_WEIGHTS = ("delta2", "delta1", "delta1s", "s2", "s1", "s1s")
_PENDING = ("pending_k", "pending_v", "pending_eta", "pending_alpha", "pending_beta")
_WRITTEN = _WEIGHTS + _PENDING
_INPUTS = ("q", "x", "k", "v", "eta", "alpha", "beta", "eta_bias", "alpha_bias")
_POINTERS = ("base2", "base1", "base1s", *_WEIGHTS, *_INPUTS, *_PENDING, "pos", "len", "o", "kept2", "kept1")
_SPANS = ("spans2", "spans1", "spans1s")
_MADE = ("made_k", "made_v", "made_eta", "made_alpha", "made_size")
_QUERIES = ("kept_q2", "kept_q1", "made_q")


class Spans(NamedTuple):
    """What a call keeps for its gradient. kept: deviations at every multiple of ``size`` tokens, counted from the
    start of a row's open chunk, but the first: [B, H, spans, ...] each.  made: what the memories made of each token,
    k and v [B, T, H, D], eta, alpha and |k| [B, T, H]; None where they are given."""

    size: int
    kept: tuple[Tensor | None, ...]
    made: tuple[Tensor | None, ...]


class Kept(NamedTuple):
    """What the gradient of reads takes. w2 [B, H, chunks, N, D] (D for N where linear), w1 [B, H, chunks, D, N]: those
    of M_memory in every chunk of its clock that a call reads; q2, q1: those of M_q in every chunk of the others, and
    made_q [B, T, H, D], what it makes of x before that is normalised. None where there is none."""

    w2: Tensor
    w1: Tensor | None
    q2: Tensor | None = None
    q1: Tensor | None = None
    made_q: Tensor | None = None


class TitansCall(ctypes.Structure):
    """``TitansCall`` of csrc/cpu/call.h."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("B", "T", "H", "D", "N", "Mf", "Ms", "chunk_memory", "chunk_other",
                "kept", "threads")]
        + [(n, ctypes.c_int32) for n in ("activation", "self_modifying", "objective_dot", "dgd", "retention",
                "own_values", "target_norm",
                                         "step_clip", "scalar_skip", "qk_l2norm", "softplus", "update")]
        + [("grad_scale", ctypes.c_float), ("eta_scale", ctypes.c_float)]
        + [(n, ctypes.c_void_p) for n in _POINTERS] + [("span", ctypes.c_int64), ("spans", ctypes.c_int64)]
        + [(n, ctypes.c_void_p) for n in _SPANS + _MADE] + [("kept_q", ctypes.c_int64)]
        + [(n, ctypes.c_void_p) for n in _QUERIES]
    )


class _ReadBackward(ctypes.Structure):
    """``TitansReadBackward`` of csrc/cpu/call.h."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("B", "T", "H", "D", "N", "chunk", "kept", "threads")]
        + [("activation", ctypes.c_int32)]
        + [(n, ctypes.c_void_p) for n in ("kept2", "kept1", "q", "grad", "pos", "len", "dq")]
    )


def unserved(request: Request) -> str | None:
    """Why the backend cannot serve a layer, or None."""
    config, dtype, device, gradient = request
    if device.type != "cpu" or dtype != torch.float32:
        return f"serves float32 on the CPU, not {dtype} on {device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "serves float32, which projections under autocast are not"
    if gradient == BY_ALL:
        if not has_autograd():
            return NO_GRAPH
        if config.memory != "mlp":
            return f'trains memory="mlp", not "{config.memory}"'
        if config.momentum is not None or config.adaptive_q:
            return f"trains memories without {'adaptive_q' if config.momentum is None else 'momentum'}"
    if config.head_dim % 8 or config.hidden % 8:
        widths = f"{config.head_dim} and {config.hidden}"
        return f"serves head widths and hidden widths that are multiples of 8, not {widths}"
    return None


def titans_cpp(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, lengths: list[int],
    *, update: bool = True, constant_memory: bool = False, stats=None,
) -> tuple[Tensor, TitansState]:
    """As ``scan.titans_chunk``, under no_grad or with ``constant_memory``. Raises ValueError for ``stats``."""
    if stats is not None:
        raise ValueError("titans: backend 'cpp' collects no statistics; the chunked backend does")
    by = inputs.x if config.adaptive_q else inputs.q
    if not (torch.is_grad_enabled() and by.requires_grad):
        with torch.no_grad():
            new = advanced(config, state, lengths) if update else state
            return _scan(config, w_init, inputs, new, state.pos, lengths, update), new
    o, new, gradient = titans_cpp_gradient(config, w_init, inputs, state, lengths, update=update)
    return Pullback.apply(by, o, gradient), new


@torch.no_grad()
def titans_cpp_gradient(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, lengths: list[int], *,
    update: bool = True
) -> tuple[Tensor, TitansState, Callable[[Tensor], Tensor]]:
    """o and the new state, without a graph, and what turns dL/do [B, T, H, D] into dL/dq, fast weights and
    writes being constants:

        dq = do + w2^T (sigma'(w2 q) * (w1^T do))    at the weights of M_memory that each chunk was read with
        dq = w2^T do                                 where it is linear

    with adaptive_q into dL/dx, by the same formula for M_q.
    """
    new = advanced(config, state, lengths) if update else state
    # without an update the whole call reads with the same weights
    pos, longest = list(state.pos) if update else [0] * len(lengths), max([1, *lengths])
    clocks = (config.chunk_memory, config.chunk_other) if update else (longest, longest)
    first = inputs.x if config.adaptive_q else inputs.q
    kept = _kept(config, new, first, pos, clocks, lengths)
    o = _scan(config, w_init, inputs, new, state.pos, lengths, update, kept)
    given, lengths = first.detach().contiguous(), list(lengths)

    def by_given(grad: Tensor) -> Tensor:
        if kept.made_q is None:
            return _read_backward(config, given, grad, (kept.w2, kept.w1), pos, clocks[0], lengths)
        q = unit(kept.made_q) if config.qk_l2norm else kept.made_q
        grad = _read_backward(config, q, grad, (kept.w2, kept.w1), pos, clocks[0], lengths)
        grad = unit_backward(grad, kept.made_q) if config.qk_l2norm else grad
        assert kept.q2 is not None
        return _read_backward(config, given, grad, (kept.q2, kept.q1), pos, clocks[1], lengths)

    return o, new, by_given


@torch.no_grad()
def titans_cpp_(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, lengths: list[int]
) -> Tensor:
    """o. The tensors of ``state``, the caller's own and contiguous, are advanced in place; its counters
    are not."""
    return _scan(config, w_init, inputs, state, list(state.pos), lengths, True)


# what a layer that takes its own gradient by formulas calls instead
titans_cpp.with_pullback = titans_cpp_gradient
# what a caller whose state nobody else has calls instead: without the copies
titans_cpp.in_place = titans_cpp_


def _kept(
    config: TitansConfig, state: TitansState, like: Tensor, pos: list[int], clocks: tuple[int, int], lengths: list[int]
) -> Kept:
    """Room for what the gradient by ``like``, q or x, takes."""
    D, N, mlp = config.head_dim, config.hidden, config.memory == "mlp"

    def weights(chunk: int) -> tuple[Tensor, Tensor | None]:
        count = max(((p % chunk + n - 1) // chunk + 1 for p, n in zip(pos, lengths)), default=0)
        lead, make = (*state.delta2.shape[:2], count), state.delta2.new_empty
        return make(*lead, N if mlp else D, D), make(*lead, D, N) if mlp else None

    if not config.adaptive_q:
        return Kept(*weights(clocks[0]))
    # ``unit`` sees the tokens that do not count, too
    made = (torch.empty_like if min(lengths, default=0) == like.shape[1] else torch.zeros_like)(like.detach())
    return Kept(*weights(clocks[0]), *weights(clocks[1]), made)


def _scan(
    config: TitansConfig, w_init: FastWeights, inputs, new: TitansState, pos: list[int], lengths: list[int],
    update: bool, kept: Kept | None = None, spans: Spans | None = None,
) -> Tensor:
    """o [B, T, H, D]; advances the tensors of ``new``, a state whose ``pos`` is that after the call, and
    fills ``kept`` and ``spans``."""
    first = inputs.x if inputs.x is not None else inputs.k
    o = (first.new_empty if min(lengths, default=first.shape[1]) == first.shape[1] else first.new_zeros)(first.shape)
    call, alive = titans_call(config, w_init, inputs, new, pos, lengths, update, o, kept, spans)
    check_outcome(library().hope_titans_scan(ctypes.byref(call)), "titans")
    del alive
    return o


def titans_call(
    config: TitansConfig, w_init: FastWeights, inputs, new: TitansState, pos: list[int], lengths: list[int],
    update: bool, o: Tensor | None = None, kept: Kept | None = None, spans: Spans | None = None,
) -> tuple[TitansCall, list[Any]]:
    """What the library is handed, and what has to stay alive while it works."""
    first = inputs.x if inputs.x is not None else inputs.k
    (B, T, H, _), started = first.shape, config.retain_to == "init"
    given = dict(zip(("base2", "base1", "base1s"), w_init)) if started else {}
    given |= {n: getattr(inputs, n) for n in _INPUTS}
    tensors = {n: t.to(torch.float32).contiguous() for n, t in given.items() if t is not None}
    for n in _WRITTEN:
        t = getattr(new, n)
        if t is not None:  # without an update of any strides: nothing is written
            tensors[n] = t if update else t.detach().contiguous()
    tensors |= {} if o is None else {"o": o}
    tensors |= {} if kept is None else dict(zip(("kept2", "kept1", *_QUERIES), kept))
    tensors |= {} if spans is None else dict(zip(_SPANS + _MADE, spans.kept + spans.made))
    chunks, chunks_q = (0 if kept is None or t is None else t.shape[2] for t in (kept and kept.w2, kept and kept.q2))
    stops = 0 if spans is None or spans.kept[0] is None else spans.kept[0].shape[2]
    counts, call = _counts(config, B, T, H), TitansCall.from_buffer_copy(_configured(config))
    times = {"kept2": chunks, "kept1": chunks, "kept_q2": chunks_q, "kept_q1": chunks_q, **dict.fromkeys(_SPANS, stops)}
    for n, t in tensors.items():
        setattr(call, n, address(t, counts[n] * times.get(n, 1), n))
    before, reads = row_array(pos, B), row_array(lengths, B)
    call.B, call.T, call.H, call.kept, call.kept_q, call.spans = B, T, H, chunks, chunks_q, stops
    call.threads, call.update, call.span = torch.get_num_threads(), update, 0 if spans is None else spans.size
    call.pos, call.len = ctypes.addressof(before), ctypes.addressof(reads)
    return call, [tensors, before, reads]


@lru_cache(maxsize=256)
def _counts(config: TitansConfig, B: int, T: int, H: int) -> dict[str, int]:
    """The numbers of each tensor of a call; of one of the chunks or spans that are kept."""
    D = config.head_dim
    head2, head1, head1s = (prod(shape or (0,)) for shape in Layout.of(config).shapes())  # of one head
    one = (config.hidden if config.memory == "mlp" else D) * D  # of one memory's matrix
    tokens, pending = B * T * H, B * max(config.chunk_memory, config.chunk_other) * H
    counts = dict.fromkeys(("q", "x", "k", "v", "o", "made_q", "made_k", "made_v"), tokens * D)
    counts |= dict.fromkeys(("eta", "alpha", "beta", "made_eta", "made_alpha", "made_size"), tokens)
    counts |= {"eta_bias": H, "alpha_bias": H, "pending_k": pending * D, "pending_v": pending * D}
    counts |= dict.fromkeys(("pending_eta", "pending_alpha", "pending_beta"), pending)
    counts |= dict.fromkeys(("kept2", "kept1", "kept_q2", "kept_q1"), B * H * one)
    for stem, rows in (("base", H), ("delta", B * H), ("s", B * H), ("spans", B * H)):
        counts |= {f"{stem}2": rows * head2, f"{stem}1": rows * head1, f"{stem}1s": rows * head1s}
    return counts


@lru_cache(maxsize=256)
def _configured(config: TitansConfig) -> TitansCall:
    return TitansCall(**settings(config))


def settings(config: TitansConfig) -> dict[str, Any]:
    """The fields of a ``TitansCall`` that every call of a layer has."""
    layout = Layout.of(config)
    return {
        "D": layout.D, "N": layout.N if layout.mlp else 0, "Mf": len(layout.full), "Ms": len(layout.scalars),
        "scalar_skip": layout.skip, "chunk_memory": config.chunk_memory,
        "chunk_other": config.chunk_other, "activation": ACTIVATION_CODES[config.activation],
        "self_modifying": config.self_modifying, "objective_dot": config.objective == "dot",
        "softplus": config.eta_activation == "softplus", "grad_scale": config.grad_scale,
        "eta_scale": config.eta_scale,
    } | {n: getattr(config, n) for n in ("dgd", "retention", "own_values", "target_norm", "step_clip", "qk_l2norm")}


def _read_backward(
    config: TitansConfig, q: Tensor, grad: Tensor, kept: tuple[Tensor, Tensor | None], pos: list[int], chunk: int,
    lengths: list[int]
) -> Tensor:
    """dL/dq [B, T, H, D] from dL/do, of a memory that was read at q; row b's tokens share weights up to the
    multiples of ``chunk``, counted from pos[b]."""
    B, T, H, D = q.shape
    grad, dq = grad.contiguous(), (torch.empty_like if min(lengths, default=T) == T else torch.zeros_like)(q)
    before, reads = row_array(pos, B), row_array(lengths, B)
    chunks, N = kept[0].shape[2], config.hidden if config.memory == "mlp" else 0
    weights, tokens = B * H * chunks * (N or D) * D, B * T * H * D
    call = _ReadBackward(
        B, T, H, D, N, chunk, chunks, torch.get_num_threads(), ACTIVATION_CODES[config.activation],
        address(kept[0], weights, "kept2"),
        address(kept[1], weights, "kept1"), address(q, tokens, "q"), address(grad, tokens, "grad"),
        ctypes.addressof(before), ctypes.addressof(reads), address(dq, tokens, "dq"),
    )
    check_outcome(library().hope_titans_read_backward(ctypes.byref(call)), "titans")
    return dq


def advanced(config: TitansConfig, state: TitansState, lengths: list[int]) -> TitansState:
    """A state for the library to write into: copies of what this call will change, the rest shared with
    ``state``."""
    if state.made_here:
        return state.advanced(lengths)
    small = min(config.chunk_memory, config.chunk_other)
    commits = any(p // small != (p + n) // small for p, n in zip(state.pos, lengths))
    parts = {}
    for name in _WRITTEN:
        t = getattr(state, name)
        if t is not None:
            # a state made in grad mode may begin as a view of the layer's own weights
            written = commits or name.startswith("pending") or t.requires_grad
            parts[name] = t.clone(memory_format=torch.contiguous_format) if written else t.detach().contiguous()
    return state.advanced(lengths, **parts)
