"""One span of a call backwards, in kernels: memory="mlp" without momentum and adaptive_q.

The span is read again, chunk by chunk of the faster clock, with the forward's kernels, and the deviations at
the start of every chunk are kept; k, v, eta and alpha of its tokens are read again from them. Then the chunks
in reverse: the commits that close one, and its reads.

    per commit   clock, errors, sums, steps, hidden, targets, inputs, outputs, values, clock_adjoint, collect (twice)
    per chunk    unit_adjoint, read_adjoint, collect (twice)

Adjoints of deviations and of the shared base are fp32 buffers laid out like the state, advanced in place;
every sum has one order, that of slots, memories and tiles. BACKWARD.md has the equations and what is where.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from ....config import TitansConfig
from ....state import Counters
from ...shared.triton_build import aligned, filled
from ..inputs import TokenInputs
from ..state import FastWeights, Layout, TitansState
from .backward_clock import clock_adjoint_kernel, clock_kernel
from .backward_commit import inputs_kernel, outputs_kernel
from .backward_hidden import hidden_kernel, sums_kernel
from .backward_read import (
    collect_kernel,
    read_adjoint_kernel,
    reread_kernel,
    unit_adjoint_kernel,
    values_kernel,
)
from .backward_tiles import constants, group_constants
from .backward_tokens import errors_kernel, steps_kernel, targets_kernel
from .operator import titans_triton
from .spans import CARRIED, Call, Span
from .tiles import clocks

_DELTAS = CARRIED[:3]
_PENDING = {"pending_k": "k", "pending_v": "v", "pending_eta": "eta", "pending_alpha": "alpha"}


def serves(config: TitansConfig) -> bool:
    """Whether these kernels can differentiate a configuration that the forward's kernels serve."""
    return config.memory == "mlp" and config.momentum is None and not config.adaptive_q


def span_adjoint(
    call: Call, w_init: FastWeights, inputs: TokenInputs, state: TitansState, span: Span, do: Tensor | None,
    adjoint: dict[str, Tensor | None], needed: tuple[bool, ...],
) -> tuple[list[Tensor | None], dict[str, Tensor | None]]:
    """As ``triton_training.recompute_span``; ``needed`` changes nothing."""
    with torch.cuda.device_of(state.delta2):
        return _Span(call, w_init, inputs, state, span, do, adjoint).run()


class _Span:
    def __init__(self, call, w_init, inputs, state, span, do, adjoint):
        # w_init as the forward had it
        self.call, self.config, self.state, self.span, self.w_init = call, call.config, state, span, w_init
        self.inputs, self.adjoint = inputs, adjoint
        first = inputs.x if inputs.x is not None else inputs.k
        self.B, self.H, self.D = first.shape[0], *first.shape[2:]
        self.G, self.device, self.dtype = self.B * self.H, first.device, first.dtype
        self.layout = Layout.of(self.config)
        self.small, self.big = clocks(self.config)[0].C, max(self.config.chunk_memory, self.config.chunk_other)
        self.writes = call.update and not call.constant_memory
        self.produces = self.writes and self.config.self_modifying
        self.lo = [p % self.big if n else 0 for p, n in zip(span.pos, span.counts)]
        self.hi = [p + n for p, n in zip(self.lo, span.counts)]
        self.S = triton.cdiv(max(self.hi), self.big) * self.big
        rows = [(slice(b, b + 1), lo, hi) for b, (lo, hi) in enumerate(zip(self.lo, self.hi)) if hi > lo]
        alike = len({r[1:] for r in rows}) == 1 and len(rows) == self.B
        self.rows = [(slice(None), *rows[0][1:])] if alike else rows
        lo = torch.where(span.reads > 0, span.at % self.big, 0)
        self.place = (lo, lo + span.reads)
        base = w_init if self.config.retain_to == "init" else FastWeights(None, None, None)
        self.base = [None if t is None else aligned(t.detach().float()) for t in base]
        self._lay_out(do)

    # -- slots -----------------------------------------------------------------------------------------------

    def _zeros(self, *shape, dtype=torch.float32) -> Tensor:
        return torch.zeros(self.B, self.S, *shape, device=self.device, dtype=dtype)

    def _to_slots(self, t: Tensor, into: Tensor) -> None:
        for b, lo, hi in self.rows:
            into[b, lo:hi] = t[b, : hi - lo]

    def _to_tokens(self, t: Tensor, like: Tensor) -> Tensor:
        found = torch.zeros_like(like, dtype=t.dtype)
        for b, lo, hi in self.rows:
            found[b, : hi - lo] = t[b, lo:hi]
        return found

    def _lay_out(self, do: Tensor | None) -> None:
        """Tokens and their adjoints in slots; deviations' and bases' adjoints. Scalars are absent from some
        layers: then None."""
        i, wide, self.slots, self.back = self.inputs, (self.H, self.D), {}, {}
        self.read = torch.zeros(2, self.B, self.S, *wide, device=self.device, dtype=self.dtype)
        self.errors = torch.zeros(3, self.B, self.S, *wide, dtype=torch.float32, device=self.device)
        self._to_slots(i.q, self.read[0])
        if self.produces:
            self._to_slots(i.x, self.read[1])
        if do is not None:
            self._to_slots(do, self.errors[0])
        self.back |= {n: self._zeros(*wide) for n in ("q", *(("x",) if self.produces else ()))}
        like = {n: getattr(self.state, n) for n in _DELTAS}
        self.adj = [None if t is None else self._adjoint_of(n, t) for n, t in like.items()]
        self.grad = [
            None if t is None or b is None else torch.zeros_like(a) for t, a,
            b in zip(like.values(), self.adj, self.base)
        ]
        if not self.writes:
            return
        for name, short in _PENDING.items():
            pending = getattr(self.state, name)
            if pending is None:
                continue
            given = getattr(i, short)
            found = self._zeros(*pending.shape[2:], dtype=pending.dtype)
            back = self.errors[("k", "v").index(short) + 1] if short in ("k", "v") else self._zeros(self.H)
            if given is not None:
                self._to_slots(given, found)
            for b, lo, hi in self.rows:
                found[b, :lo] = pending[b, :lo]
                if (error := self.adjoint[name]) is not None:
                    back[b, hi - hi % self.big : hi] = error[b, : hi % self.big]
            self.slots[short], self.back[short] = found, back
        self.slots.setdefault("alpha", self.slots["eta"])
        self.back.setdefault("alpha", self.back["eta"])
        self.sizes = torch.zeros(3, self.B, self.S, self.H, dtype=torch.float32, device=self.device)

    def _adjoint_of(self, name: str, like: Tensor) -> Tensor:
        error = self.adjoint[name]
        return (
            torch.zeros_like(like, memory_format=torch.contiguous_format) if error is None
            else aligned(error.clone())
        )

    # -- the span again, and in reverse ----------------------------------------------------------------------

    def run(self) -> tuple[list[Tensor | None], dict[str, Tensor | None]]:
        steps = range(min(lo for _, lo, _ in self.rows) // self.small, triton.cdiv(max(self.hi), self.small))
        starts = self._replay(steps)
        for step, deltas in reversed(list(zip(steps, starts))):
            end = (step + 1) * self.small
            if self.writes:
                for M0, M1, C in clocks(self.config):
                    if end % C == 0 and any(lo < end <= hi for lo, hi in zip(self.lo, self.hi)):
                        self._commit(deltas, M0, M1, C, end)
            self._read(deltas, step * self.small)
        return self._found()

    def _replay(self, steps: range) -> list[list[Tensor | None]]:
        """The deviations at the start of every chunk; on the way, the tokens that the memories made."""
        state, starts = self.state, []
        parts = self.span.parts(range(steps.start * self.small, steps.stop * self.small, self.small), self.big)
        for step, part in zip(steps, parts):
            starts.append([None if (t := getattr(state, n)) is None else aligned(t.detach()) for n in _DELTAS])
            if self.produces:
                self._reread(starts[-1], step * self.small)
            if self.call.update and step + 1 < steps.stop:
                _, state = titans_triton(
                    self.config, self.w_init, part.take_inputs(self.inputs),
                    replace(state, pos=Counters(part.pos), count=part.at), part.counts, reads=part.reads)
        return starts

    def _weights(self, deltas: list[Tensor | None]) -> list[Tensor]:
        """base2, base1, base1s, delta2, delta1, delta1s."""
        return filled([*self.base, *deltas], deltas[1])

    def _adjoints(self) -> list[Tensor]:
        return filled([*self.adj, *self.grad], self.adj[1])

    def _scratch(self, *shape) -> Tensor:
        return torch.empty(self.G, *shape, dtype=torch.float32, device=self.device)

    def _reread(self, deltas: list[Tensor | None], slot: int) -> None:
        c, i, s = constants(self.config, self.dtype.itemsize)["reread"], self.inputs, self.slots
        biases = [aligned(t.detach()) for t in filled((i.eta_bias, i.alpha_bias), self.read)]
        reread_kernel[(self.G, len(self.config.memories) - 1, triton.cdiv(self.small, c["CT"]))](
            self.read[1], *self._weights(deltas), s["k"], s["v"], s["eta"], s["alpha"], self.sizes, *biases,
            *self.place, slot, self.S, self.config.eta_scale, **c)

    def _read(self, deltas: list[Tensor | None], slot: int) -> None:
        made, s, back = constants(self.config, self.dtype.itemsize), self.slots, self.back
        c, total, M = made["read_adjoint"], made["collect"], len(self.config.memories) if self.produces else 1
        parts = self._scratch(len(self.config.memories), self.config.hidden // c["NT"], 2, self.D, self.small)
        if self.produces and self.config.qk_l2norm:
            unit_adjoint_kernel[(self.G, self.small // 16)](
                s["k"], back["k"], self.sizes, *self.place, slot, self.S, **made["unit_adjoint"])
        gates = [back["eta"], back["alpha"], self.sizes] if self.produces else [parts] * 3
        read_adjoint_kernel[(self.G, M, self.config.hidden // c["NT"])](
            self.read, *self._weights(deltas), *self._adjoints(), self.errors, *gates, parts, *self.place,
            slot, self.S, **c)
        for name, M0, M1 in (("q", 0, 1), ("x", 1, M)):
            if M1 > M0:
                collect_kernel[(self.G, self.small // 16)](
                    parts, back[name], *self.place, slot, self.S, 0, M0=M0, M1=M1, **total
                )

    def _commit(self, deltas: list[Tensor | None], M0: int, M1: int, C: int, end: int) -> None:
        made = group_constants(self.config, self.dtype.itemsize, M0, M1, C)
        s, back, D, M = self.slots, self.back, self.D, len(self.config.memories)
        NT = made["inputs"]["NT"]
        tiles, per_token = self.config.hidden // NT, (self.G, M1 - M0)
        products, gram, products_bar, gram_bar = (self._scratch(C, C) for _ in range(4))
        keys, solved, vectors, vectors_bar = self._scratch(
            C, D
        ), self._scratch(C, D), self._scratch(3, C), self._scratch(2, C)
        e, target, sizes, steps = self._scratch(
            M, D, C
        ), self._scratch(M, D, C), self._scratch(M, 2, C), self._scratch(M, 9, C)
        sums, parts, outputs_bar = self._scratch(M, tiles, 6, C), self._scratch(
            M, tiles, 2, D, C
        ), self._scratch(M, 2, D, C)
        keys_bar, u_bar = self._scratch(M, tiles, C, D), self._scratch(M, self.config.hidden, C)
        dot = self.config.objective == "dot"
        scale = 1.0 if dot else self.config.grad_scale
        at, weights, adjoints = (end, self.S), self._weights(deltas), self._adjoints()
        place, own = self.place, (*per_token, tiles)

        clock_kernel[(self.G,)](
            s["k"], s["eta"], s["alpha"], *place, products, gram, keys, vectors, *at, **made["clock"]
        )
        c = made["errors"]
        errors_kernel[(*per_token, C // c["CT"])](
            *weights, s["k"], s["v"], *place, e, target, sizes, *at, scale, **c
        )
        sums_kernel[own](*weights, *adjoints[:3], s["k"], *place, e, keys, u_bar, sums, *at, **made["sums"])
        steps_kernel[per_token](s["eta"], *place, sums, sizes, gram, vectors, steps, *at, scale, **made["steps"])
        hidden_kernel[own](
            *weights, *adjoints[:3], s["k"], s["eta"], *place, e, keys, vectors, steps, u_bar, parts,
            keys_bar, *at, **made["hidden"])
        c = made["targets"]
        targets_kernel[(*per_token, C // c["CT"])](
            *place, e, target, sizes, steps, parts, outputs_bar, end, scale, **c
        )
        inputs_kernel[own](
            *weights, *adjoints, s["k"], *place, e, vectors, steps, u_bar, outputs_bar, parts, *at,
            **made["inputs"])
        if full := min(M1, len(self.layout.full)) - M0:
            base2, base1, _, delta2, delta1, _ = weights
            outputs_kernel[(self.G, full, tiles)](
                base2, base1, delta2, delta1, adjoints[1], adjoints[4], s["k"], *place, e, vectors, steps,
                u_bar, outputs_bar, *at,
                **made["outputs"])
        values_kernel[own](*weights, *adjoints, s["v"], *place, outputs_bar, parts, *at, **made["values"])
        clock_adjoint_kernel[(self.G,)](
            s["k"], s["eta"], *place, products, gram, keys, vectors, steps, sums, keys_bar, solved,
            products_bar, gram_bar, vectors_bar,
            back["k"], back["eta"], back["alpha"], *at, **made["clock_adjoint"])
        for half, name in enumerate(("k", "v")):
            collect_kernel[(self.G, C // 16)](parts, back[name], *place, end - C, self.S, half, **made["collect"])

    # -- what leaves -----------------------------------------------------------------------------------------

    def _found(self) -> tuple[list[Tensor | None], dict[str, Tensor | None]]:
        i, back = self.inputs, self.back
        tokens = {"q": back["q"]}
        biases = [None, None]
        if self.produces:
            tokens["x"] = back["x"]
            biases = [(back["eta"] * self.sizes[1]).sum((0, 1)), None]
            if self.config.retention:
                biases[1] = (back["alpha"] * self.sizes[2]).sum((0, 1))
        elif self.writes:
            tokens |= {n: back[n] for n in ("k", "v", "eta", "alpha")}
        given = [
            None if n not in tokens or t is None else self._to_tokens(tokens[n], t) for n,
            t in zip(i._fields[:-2], i)
        ]
        bases = [None if g is None else g.sum(0) for g in self.grad]
        if self.call.constant_memory:
            return [None, None, None, *given, None, None], dict.fromkeys(CARRIED)
        before = dict.fromkeys(CARRIED) | dict(zip(_DELTAS, self.adj))
        for name, short in _PENDING.items():
            error, like = self.adjoint[name], getattr(self.state, name)
            if like is None or not self.writes:
                before[name] = error
                continue
            found = torch.zeros_like(like, dtype=torch.float32) if error is None else error.float().clone()
            for b, lo, _ in self.rows:
                found[b] = 0.0
                found[b, :lo] = back[short][b, :lo]
            before[name] = found
        return [*bases, *given, *biases], before
