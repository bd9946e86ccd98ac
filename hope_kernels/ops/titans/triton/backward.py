"""One span of a call backwards, in kernels: memory="mlp" without momentum and adaptive_q.

The span is read again, chunk by chunk of the faster clock, with the forward's kernels, and the deviations at
the start of every chunk are kept, and the weights in force, rounded once; k, v, eta and alpha of its tokens are
read again from these. Then the chunks in reverse: the commits that close one, and its reads. What needs no adjoint
of the state is done for all of the span at once.

    per chunk    the forward's scan
    per span     reread, and of each clock: clock, errors
    per commit   sums, gain, hidden, targets, inputs, outputs, clock_adjoint, collect
    per chunk    unit_adjoint, read_adjoint, collect

With constant memories (a model that learns while it reads) nothing depends on anything after it, and a span
is its scans, one read_adjoint and one collect.

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
from .backward_read import collect_kernel, read_adjoint_kernel, reread_kernel, unit_adjoint_kernel
from .backward_tiles import clock_constants, constants, rounds
from .backward_tokens import errors_kernel, gain_kernel, targets_kernel
from .groups import Biases, Clock, ClockTerms, Errors, Place, Slots, Weights
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
    """As ``training.recompute_span``; ``needed`` changes nothing."""
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
        self.narrow = self.dtype if rounds(self.D) else torch.float32
        self.layout, self.clocks = Layout.of(self.config), clocks(self.config)
        self.constants = constants(self.config, self.dtype.itemsize)
        self.commit_constants = {c: clock_constants(self.config, self.dtype.itemsize, c) for c in self.clocks}
        self.small, self.big = self.clocks[0].C, max(self.config.chunk_memory, self.config.chunk_other)
        self.writes = call.update and not call.constant_memory
        self.produces = self.writes and self.config.self_modifying
        self.lo = [p % self.big if n else 0 for p, n in zip(span.pos, span.counts)]
        self.hi = [p + n for p, n in zip(self.lo, span.counts)]
        self.S = triton.cdiv(max(self.hi), self.big) * self.big
        rows = [(slice(b, b + 1), lo, hi) for b, (lo, hi) in enumerate(zip(self.lo, self.hi)) if hi > lo]
        alike = len({r[1:] for r in rows}) == 1 and len(rows) == self.B
        self.rows = [(slice(None), *rows[0][1:])] if alike else rows
        lo = torch.where(span.reads > 0, span.at % self.big, 0)
        self.place = Place(lo, lo + span.reads)
        base = w_init if self.config.retain_to == "init" else FastWeights(None, None, None)
        self.base = [None if t is None else t.detach() for t in base]
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
        i, wide, self.slots, self.bar = self.inputs, (self.H, self.D), {}, {}
        self._held: dict[tuple, Tensor] = {}
        self.read = torch.zeros(2, self.B, self.S, *wide, device=self.device, dtype=self.dtype)
        # of o, k and v, which one kernel reads by memory
        self.okv_bar = torch.zeros(3, self.B, self.S, *wide, dtype=torch.float32, device=self.device)
        self._to_slots(i.q, self.read[0])
        if self.produces:
            self._to_slots(i.x, self.read[1])
        if do is not None:
            self._to_slots(do, self.okv_bar[0])
        # of q and x
        self.read_bar = torch.zeros(
            1 + self.produces, self.B, self.S, *wide, dtype=torch.float32, device=self.device
        )
        self.bar |= dict(zip(("q", "x"), self.read_bar))
        like = {n: getattr(self.state, n) for n in _DELTAS}
        self.deltas_bar = [None if t is None else self._adjoint_of(n, t) for n, t in like.items()]
        self.base_bar = [
            None if t is None or base is None else torch.zeros_like(bar)
            for t, bar, base in zip(like.values(), self.deltas_bar, self.base)
        ]
        if not self.writes:
            return
        for name, short in _PENDING.items():
            pending = getattr(self.state, name)
            if pending is None:
                continue
            given = getattr(i, short)
            found = self._zeros(*pending.shape[2:], dtype=pending.dtype)
            bar = self.okv_bar[("k", "v").index(short) + 1] if short in ("k", "v") else self._zeros(self.H)
            if given is not None:
                self._to_slots(given, found)
            for b, lo, hi in self.rows:
                found[b, :lo] = pending[b, :lo]
                if (error := self.adjoint[name]) is not None:
                    bar[b, hi - hi % self.big : hi] = error[b, : hi % self.big]
            self.slots[short], self.bar[short] = found, bar
        self.slots.setdefault("alpha", self.slots["eta"])
        self.bar.setdefault("alpha", self.bar["eta"])
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
        in_force = self._in_force(starts)
        if self.call.constant_memory and len(starts[1]) == len(steps):
            self._read(in_force, steps.start * self.small, len(steps))
            return self._found()
        if self.produces:
            self._reread(in_force, steps.start * self.small, len(steps))
        commits = {clock: self._before(in_force, clock, steps) for clock in self.clocks} if self.writes else {}
        for step in reversed(steps):
            # a pure read finds the memories as they were
            at = min(step - steps.start, len(starts[1]) - 1)
            deltas, here = ([None if t is None else t[at] for t in of] for of in (starts, in_force))
            end = (step + 1) * self.small
            for clock, before in commits.items():
                if end % clock.C == 0 and any(lo < end <= hi for lo, hi in zip(self.lo, self.hi)):
                    self._commit(deltas, here, clock, end, *before[end])
            self._read(here, step * self.small)
        return self._found()

    def _replay(self, steps: range) -> list[Tensor | None]:
        """The deviations at the start of every chunk, [chunks, B, H, ...]; of a pure read only those at the
        span's."""
        state, count = self.state, len(steps) if self.call.update else 1
        now = [getattr(state, n) for n in _DELTAS]
        starts = [None if t is None else t.new_empty(count, *t.shape) for t in now]
        pairs = [(to, t.detach()) for to, t in zip(starts, now) if to is not None and t is not None]
        if count > 1:  # the scans go on in place
            carried = {n: None if (t := getattr(state, n)) is None else t.detach().clone() for n in CARRIED}
            state = replace(state, **carried)
            pairs = [(to, carried[n]) for n, to in zip(_DELTAS, starts) if to is not None]
        slots = range(steps.start * self.small, steps.stop * self.small, self.small)
        for i, part in zip(range(count), self.span.parts(slots, self.big)):
            torch.ops.aten._foreach_copy_.default([to[i] for to, _ in pairs], [t for _, t in pairs])
            if i + 1 < count:
                here = replace(state, pos=Counters(part.pos), count=part.at).in_place(part.reads)
                titans_triton(self.config, self.w_init, part.take_inputs(self.inputs), here, part.counts)
        return starts

    def _in_force(self, starts: list[Tensor | None]) -> list[Tensor | None]:
        """The weights in force where the deviations are ``starts``, as products take them, and for them in fp32
        where the kernels would spill (``backward_tiles.rounds``); w1s in fp32."""
        found: list[Tensor | None] = []
        for t, base, dtype in zip(starts, self.base, (self.narrow, self.narrow, torch.float32)):
            if t is None or base is None:
                found.append(None if t is None else t.to(dtype))
            else:
                found.append(torch.add(t, base, out=torch.empty_like(t, dtype=dtype)))
        return found

    @staticmethod
    def _weights(deltas: list[Tensor | None]) -> Weights:
        """Without a base."""
        return Weights(*filled([None, None, None, *deltas], deltas[1]))

    def _weights_bar(self) -> Weights:
        return Weights(*filled([*self.base_bar, *self.deltas_bar], self.deltas_bar[1]))

    def _scratch(self, what: str, *shape: int, count: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        """[count B H, ...], the same memory whenever it is asked for again."""
        key = what, count, *shape
        if key not in self._held:
            self._held[key] = torch.empty(count * self.G, *shape, dtype=dtype, device=self.device)
        return self._held[key]

    def _reread(self, in_force: list[Tensor | None], slot: int, chunks: int) -> None:
        c, i = self.constants["reread"], self.inputs
        biases = [aligned(t.detach()) for t in filled((i.eta_bias, i.alpha_bias), self.read)]
        reread_kernel[(self.G, len(self.config.memories) - 1, chunks * (self.small // c["CT"]))](
            x_p=self.read[1], in_force=self._weights(in_force), slots=Slots(**self.slots), sizes_p=self.sizes,
            biases=Biases(*biases), place=self.place, slot=slot, S=self.S, eta_scale=self.config.eta_scale,
            **c,
        )

    def _read(self, in_force: list[Tensor | None], slot: int, chunks: int = 1) -> None:
        """The adjoint of the reads of chunks from ``slot`` on; of several where the memories are constants."""
        made, bar = self.constants, self.bar
        c = made["read_adjoint"] | {"CONSTANT": self.call.constant_memory}
        M = len(self.config.memories) if self.produces else 1
        tiles = self.config.hidden // c["NT"]
        parts = self._scratch("reads", len(self.config.memories), tiles, 2, self.D, self.small, count=chunks)
        at = {"place": self.place, "slot": slot, "S": self.S}
        if self.produces and self.config.qk_l2norm:
            unit_adjoint_kernel[(self.G, self.small // 16)](
                k_p=self.slots["k"], k_bar_p=bar["k"], sizes_p=self.sizes, **at, **made["unit_adjoint"]
            )
        # a layer that makes no k, v, eta, alpha has nothing to hand back to them
        slots_bar, sizes = (self._slots_bar(), self.sizes) if self.produces else (Slots(*[parts] * 4), parts)
        read_adjoint_kernel[(self.G, M, chunks * tiles)](
            read_p=self.read, in_force=self._weights(in_force), weights_bar=self._weights_bar(),
            okv_bar_p=self.okv_bar, slots_bar=slots_bar, sizes_p=sizes, parts_p=parts, **at, **c,
        )
        collect_kernel[(self.G, chunks * (self.small // 16), len(self.read_bar))](
            parts_p=parts, out_p=self.read_bar, **at, **made["collect"]
        )

    def _slots_bar(self) -> Slots:
        return Slots(*(self.bar[n] for n in Slots._fields))

    @property
    def _scale(self) -> float:
        return 1.0 if self.config.objective == "dot" else self.config.grad_scale

    def _before(
        self, in_force: list[Tensor | None], clock: Clock, steps: range
    ) -> dict[int, tuple[ClockTerms, Errors]]:
        """What the commits of a clock need of the forward, by the slots where they are."""
        made, C, D, M = self.commit_constants[clock], clock.C, self.D, len(self.config.memories)
        ends = range((steps.start * self.small // C + 1) * C, steps.stop * self.small + 1, C)
        if not ends:
            return {}
        n, slots = len(ends), Slots(**self.slots)
        new = lambda *shape: torch.empty(n, self.G, *shape, dtype=torch.float32, device=self.device)
        terms = ClockTerms(products=new(C, C), gram=new(C, C), keys=new(C, D), vectors=new(3, C))
        errors = Errors(e=new(M, D, C), target=new(M, D, C), sizes=new(M, 2, C))
        at, c = {"place": self.place, "end": ends[0], "S": self.S}, made["errors"]
        clock_kernel[(self.G, n)](slots=slots, terms=terms, **at, **made["clock"])
        errors_kernel[(self.G, clock.M1 - clock.M0, n * (C // c["CT"]))](
            in_force=self._weights(in_force), slots=slots, errors=errors, first=steps.start,
            grad_scale=self._scale, **at, **c,
        )
        return {
            end: (ClockTerms(*(t[i] for t in terms)), Errors(*(t[i] for t in errors)))
            for i, end in enumerate(ends)
        }

    def _commit(
        self, deltas: list[Tensor | None], here: list[Tensor | None], clock: Clock, end: int, terms: ClockTerms,
        errors: Errors,
    ) -> None:
        """The adjoint of one clock's commit at slot ``end``; here: the weights in force."""
        made, C, D, M = self.commit_constants[clock], clock.C, self.D, len(self.config.memories)
        tiles, memories, new = self.config.hidden // made["inputs"]["NT"], clock.M1 - clock.M0, self._scratch
        factors, sums = new("factors", M, 9, C), new("sums", M, tiles, 6, C)
        u_bar = new("u_bar", M, self.config.hidden, C, dtype=self.narrow)
        outputs_bar = new("outputs_bar", M, 2, D, C)
        parts, keys_bar = new("parts", M, tiles, 2, D, C), new("keys_bar", M, tiles, C, D)
        scale = self._scale
        slots, weights, weights_bar = Slots(**self.slots), self._weights(deltas), self._weights_bar()
        in_force = self._weights(here)
        at = {"place": self.place, "end": end, "S": self.S}
        of_weights = {"in_force": in_force, "weights_bar": weights_bar}
        tile_grid = (self.G, memories, tiles)

        sums_kernel[tile_grid](
            weights=weights, **of_weights, k_p=slots.k, e_p=errors.e, keys_p=terms.keys, u_bar_p=u_bar,
            sums_p=sums, **at, **made["sums"],
        )
        gain_kernel[(self.G, memories)](
            eta_p=slots.eta, sums_p=sums, sizes_p=errors.sizes, gram_p=terms.gram, vectors_p=terms.vectors,
            factors_p=factors, factor=scale, **at, **made["gain"],
        )
        hidden_kernel[tile_grid](
            weights=weights, **of_weights, slots=slots, e_p=errors.e, keys_p=terms.keys, vectors_p=terms.vectors,
            factors_p=factors, u_bar_p=u_bar, parts_p=parts, keys_bar_p=keys_bar, **at, **made["hidden"],
        )
        c = made["targets"]
        targets_kernel[(self.G, memories, C // c["CT"])](
            errors=errors, factors_p=factors, parts_p=parts, outputs_bar_p=outputs_bar, grad_scale=scale,
            place=self.place, end=end, **c,
        )
        inputs_kernel[tile_grid](
            **of_weights, k_p=slots.k, e_p=errors.e, vectors_p=terms.vectors, factors_p=factors,
            u_bar_p=u_bar, outputs_bar_p=outputs_bar, parts_p=parts, **at, **made["inputs"],
        )
        outputs_kernel[tile_grid](
            **of_weights, slots=slots, e_p=errors.e, vectors_p=terms.vectors, factors_p=factors, u_bar_p=u_bar,
            outputs_bar_p=outputs_bar, parts_p=parts, **at, **made["outputs"],
        )
        clock_adjoint_kernel[(self.G,)](
            slots=slots, terms=terms, factors_p=factors, sums_p=sums, keys_bar_p=keys_bar,
            solved_p=new("solved", C, D), products_bar_p=new("products_bar", C, C),
            gram_bar_p=new("gram_bar", C, C), vectors_bar_p=new("vectors_bar", 2, C),
            slots_bar=self._slots_bar(), **at, **made["clock_adjoint"],
        )
        collect_kernel[(self.G, C // 16, 2)](
            parts_p=parts, out_p=self.okv_bar[1:], place=self.place, slot=end - C, S=self.S, **made["collect"]
        )

    # -- what leaves -----------------------------------------------------------------------------------------

    def _found(self) -> tuple[list[Tensor | None], dict[str, Tensor | None]]:
        i, bar = self.inputs, self.bar
        tokens = {"q": bar["q"]}
        biases = [None, None]
        if self.produces:
            tokens["x"] = bar["x"]
            biases = [(bar["eta"] * self.sizes[1]).sum((0, 1)), None]
            if self.config.retention:
                biases[1] = (bar["alpha"] * self.sizes[2]).sum((0, 1))
        elif self.writes:
            tokens |= {n: bar[n] for n in ("k", "v", "eta", "alpha")}
        given = [
            None if n not in tokens or t is None else self._to_tokens(tokens[n], t)
            for n, t in zip(i._fields[:-2], i)
        ]
        bases = [None if bar is None else bar.sum(0) for bar in self.base_bar]
        if self.call.constant_memory:
            return [None, None, None, *given, None, None], dict.fromkeys(CARRIED)
        before = dict.fromkeys(CARRIED) | dict(zip(_DELTAS, self.deltas_bar))
        for name, short in _PENDING.items():
            error, like = self.adjoint[name], getattr(self.state, name)
            if like is None or not self.writes:
                before[name] = error
                continue
            found = torch.zeros_like(like, dtype=torch.float32) if error is None else error.float().clone()
            for b, lo, _ in self.rows:
                found[b].zero_()
                found[b, :lo] = bar[short][b, :lo]
            before[name] = found
        return [*bases, *given, *biases], before
