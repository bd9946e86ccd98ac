"""The self-modifying memory over a whole call, chunk by chunk, in plain PyTorch: any device, differentiable
through the writes.

    reads    every memory is read as it was at the start of its current chunk (Nested Learning eq 90, floor index)
    writes   commit.write commits a chunk when its last token has been read (eq 86-93 in closed form)

Rows of a batch may stand at different positions and read different numbers of tokens. All rows are laid on
one axis of slots, slot 0 being the start of each row's open chunk of the longer clock, so that one loop over
slots meets every row's chunk boundaries together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import TitansConfig
from ...state import master_dtype
from ..linear.forward import gate
from ..unit.forward import l2norm
from .commit import shared_terms, write
from .evaluate import read
from .inputs import Stats, TokenInputs
from .slots import Slots
from .state import FastWeights, Layout, MaybeTensor, TitansState, on_device


class Gate:
    """Between fast weights and what is read from them, where a gradient is differentiated again: closed, fast
    weights are constants of the first derivative; the second one goes through."""

    def __init__(self):
        self.shut = False

    @contextmanager
    def closed(self) -> Iterator[None]:
        self.shut = True
        try:
            yield
        finally:
            self.shut = False

    def __call__(self, weights: FastWeights) -> FastWeights:
        return FastWeights(*(None if t is None else _Gated.apply(t, self) for t in weights))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, gate):
        ctx.gate = gate
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return None if ctx.gate.shut else grad, None


class Tokens(NamedTuple):
    """The write's inputs for a range of slots: k, v [G, n, D] in master dtype, eta, alpha, beta [G, n];
    alpha, beta may be None."""

    k: MaybeTensor
    v: MaybeTensor
    eta: MaybeTensor
    alpha: MaybeTensor
    beta: MaybeTensor

    def slots(self, a: int, b: int) -> Tokens:
        return Tokens(*(None if t is None else t[:, a:b] for t in self))


def _join(parts: list[Tokens]) -> Tokens:
    if len(parts) == 1:
        return parts[0]
    return Tokens(*(None if ts[0] is None else torch.cat(ts, 1) for ts in zip(*parts)))


def _where(mask: Tensor, new, old):
    """Rows [G] where ``mask`` holds from ``new``, the others from ``old``; works on any tuple of tensors and
    None."""
    return type(new)(
        *(None if n is None else torch.where(mask.view(-1, *[1] * (n.dim() - 1)), n, o) for n, o in zip(new, old))
    )


def eta_gate(raw: Tensor, bias: Tensor | float, config: TitansConfig) -> Tensor:
    return gate(raw, bias, config.eta_activation == "softplus", config.eta_scale)


@dataclass
class _Group:
    """Memories that share a clock."""

    layout: Layout
    chunk: int
    base: FastWeights  # w_base [H, ...] in the master dtype; zeros are left out (retain_to="zero"): None members
    delta: FastWeights
    s: FastWeights | None
    w: FastWeights  # chunk-start weights, [G, ...]
    fresh: bool = False  # delta, s and w are this call's own buffers, to be written over where no graph needs them


def titans_chunk(
    config: TitansConfig, w_init: FastWeights, inputs: TokenInputs, state: TitansState, lengths: list[int],
    *, update: bool = True, constant_memory: bool | Gate = False, stats: Stats | None = None,
) -> tuple[Tensor, TitansState]:
    """Reads and writes T tokens per row: (o [B, T, H, D], the new state); ``state`` itself is not modified.

    w_init [H, ...]: stacked initial fast weights. lengths: tokens of each row that count. ``update=False``
    reads everything with the memories as they are and returns ``state``. ``constant_memory`` keeps the graph
    through q only: writes and fast weights are constants; a ``Gate``: while it is closed. ``stats`` collects what
    every commit did. Slots of o past a row's length hold no meaning.
    """
    return _Scan(config, w_init, inputs, state, lengths, constant_memory, stats).run(update)


class _Scan:
    def __init__(self, config, w_init, inputs, state, lengths, constant_memory, stats):
        first = inputs.x if inputs.x is not None else inputs.k
        self.config, self.inputs, self.state, self.stats = config, inputs, state, stats
        self.B, self.T, self.H, _ = first.shape
        self.dtype, self.master = first.dtype, master_dtype(first.dtype)
        self.layout = Layout.of(config)
        self.gate = constant_memory if isinstance(constant_memory, Gate) else None
        self.writing = torch.no_grad if constant_memory is True else nullcontext
        self.small, self.big = sorted((config.chunk_memory, config.chunk_other))
        self.rows = Slots(state.pos, lengths, self.big, self.T, first.device)
        self.in_place = not torch.is_grad_enabled()
        with self.writing():
            self._open_groups(w_init)

    # -- memories --------------------------------------------------------------------------------------------

    def _open_groups(self, w_init: FastWeights) -> None:
        c = self.config
        if c.chunk_memory == c.chunk_other or not c.self_modifying:
            spans = [(self.layout, c.chunk_memory)]
            pick = [lambda w: w]
        else:
            spans = [(Layout.of(c, c.memories[:1]), c.chunk_memory), (Layout.of(c, c.memories[1:]), c.chunk_other)]
            pick = [lambda w: self.layout.split(w)[0], lambda w: self.layout.split(w)[1]]
        base = w_init.map(lambda t: t.to(self.master)) if c.retain_to == "init" else FastWeights(None, None, None)
        flat = self.state.deviation.map(lambda t: t.flatten(0, 1))
        s = None if self.state.momentum is None else self.state.momentum.map(lambda t: t.flatten(0, 1))
        self.groups = []
        for (layout, chunk), take in zip(spans, pick):
            part = take(base) if c.retain_to == "init" else base
            delta = take(flat)
            self.groups.append(
                _Group(layout, chunk, part, delta, None if s is None else take(s), self._weights(part, delta))
            )
        self.changed = False
        self.memory_layout, self.other_layout = Layout.of(c, c.memories[:1]), Layout.of(c, c.memories[1:])
        self.biases: list[MaybeTensor] = [None if b is None else b.to(self.master).repeat(self.B).unsqueeze(1)
                       for b in (self.inputs.eta_bias, self.inputs.alpha_bias)]
        self._split_weights()

    def _weights(self, base: FastWeights, delta: FastWeights, out: FastWeights | None = None) -> FastWeights:
        """w_base + delta, [G, ...], in the buffers ``out`` if given."""
        if base.w2 is None:
            return delta
        found = []
        for d, b, o in zip(delta, base, out or (None,) * 3):
            if d is None:
                found.append(None)
            elif self.B == 1:
                found.append(torch.add(d, b, out=o))
            else:
                shape = (self.B, self.H, *d.shape[1:])
                found.append(torch.add(d.view(shape), b, out=None if o is None else o.view(shape)).flatten(0, 1))
        return FastWeights(*found)

    def _split_weights(self) -> None:
        """The weights in force: M_memory's, and those of the memories that x' is read with."""
        one = self.groups[0]
        if len(self.groups) > 1:
            self.memory_w, self.other_w = one.w, self.groups[1].w
        elif len(one.layout.names) > 1:
            self.memory_w, self.other_w = one.layout.split(one.w)
        else:
            self.memory_w = one.w  # x' is read with static projections

    # -- one range of slots ----------------------------------------------------------------------------------

    def _produce(self, x: Tensor | None, given: Tokens | None, beta: Tensor | None) -> tuple[Tokens, MaybeTensor]:
        """k, v, eta, alpha of new slots at the current weights (and the adaptive q, else None)."""
        if x is None:
            assert given is not None
            return given._replace(beta=beta), None
        c = self.config
        out = read(x.to(self.master).mT, self.other_w, self.other_layout, c.activation, self.dtype)
        k, v = out.full[:, 0].mT, out.full[:, 1].mT
        q = out.full[:, 2].mT if c.adaptive_q else None
        if c.qk_l2norm:
            k, q = l2norm(k), None if q is None else l2norm(q)
        eta = eta_gate(out.scalar[:, 0], self.biases[0], c)
        alpha = torch.sigmoid(out.scalar[:, 1] + self.biases[1]) if c.retention else None
        return Tokens(self._rounded(k), self._rounded(v), eta, alpha, beta), q

    def _rounded(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).to(self.master)

    def _gated(self, weights: FastWeights) -> FastWeights:
        return weights if self.gate is None else self.gate(weights)

    def _read_memory(self, q: Tensor) -> Tensor:
        return read(
            self._rounded(q).mT, self._gated(self.memory_w), self.memory_layout, self.config.activation, self.dtype
        ).full[:, 0].mT

    def _adaptive_q(self, x: Tensor) -> Tensor:
        """q = norm(M_q(x)), under grad while every other production is a constant."""
        q = read(
            x.to(self.master).mT, self._gated(self.other_w), self.other_layout, self.config.activation, self.dtype
        ).full[:, 2].mT
        return l2norm(q) if self.config.qk_l2norm else q

    # -- the loop --------------------------------------------------------------------------------------------

    def run(self, update: bool) -> tuple[Tensor, TitansState]:
        rows, i = self.rows, self.inputs
        if rows.last == rows.first:
            return self._empty(), self.state
        q, x = self.rows.to_slots(i.q), self.rows.to_slots(i.x)
        if not update:
            q = self._adaptive_q(x) if q is None else q
            return self._to_tokens(self._read_memory(q)), self.state
        with self.writing():
            given = None
            if x is None:
                k, v, eta, alpha = (self.rows.to_slots(t, self.master) for t in (i.k, i.v, i.eta, i.alpha))
                given = Tokens(k, v, eta, alpha, None)
            beta = self.rows.to_slots(i.beta, self.master)
            pieces = self._pending_pieces()
        outputs, pending = [], None
        slot = rows.first
        while slot < rows.last:
            end = min((slot // self.small + 1) * self.small, rows.last)
            a, b = slot - rows.first, end - rows.first
            with self.writing():
                tokens, q_t = self._produce(
                    None if x is None else x[:, a:b], None if given is None else given.slots(a, b),
                    None if beta is None else beta[:, a:b]
                )
                if slot < self.big:
                    tokens = self._keep_pending(tokens, slot, end)
            if q is not None:
                q_t = q[:, a:b]
            elif x is not None and (self.writing is torch.no_grad or self.gate is not None):
                q_t = self._adaptive_q(x[:, a:b])
            outputs.append(self._read_memory(q_t))
            pieces.append(tokens)
            with self.writing():
                for group in self.groups:
                    if end % group.chunk == 0:
                        self._commit(group, _last_slots(pieces, group.chunk), end)
                if end % self.big == 0 or end == rows.last:
                    pending = self._close(pieces, (end - 1) // self.big, pending)
                    pieces = []
            slot = end
        o = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        assert pending is not None
        return self._to_tokens(o), self._new_state(pending)

    def _to_tokens(self, o: Tensor) -> Tensor:
        """[G, slots, D] -> [B, T, H, D] in the input dtype."""
        return self.rows.to_tokens(o.to(self.dtype))

    def _empty(self) -> Tensor:
        like = self.inputs.x if self.inputs.x is not None else self.inputs.k
        return torch.zeros_like(like)

    def _pending(self) -> Tokens:
        s = self.state
        k, v = (t.transpose(1, 2).flatten(0, 1).to(self.master) for t in (s.pending_k, s.pending_v))
        eta, alpha, beta = (None if t is None else t.transpose(1, 2).flatten(0, 1)
                            for t in (s.pending_eta, s.pending_alpha, s.pending_beta))
        return Tokens(k, v, eta, alpha, beta)

    def _pending_pieces(self) -> list[Tokens]:
        """Tokens read earlier in the open chunk, up to the first new slot."""
        self.old = self._pending()
        return [self.old.slots(0, self.rows.first)] if self.rows.first else []

    def _keep_pending(self, new: Tokens, a: int, b: int) -> Tokens:
        """In a ragged first chunk, slots that a row had read before this call keep their stored tokens."""
        if self.rows.aligned or max(self.rows.phase) <= a:
            return new
        phase = torch.tensor(
            self.rows.phase, dtype=torch.long, device=self.rows.device
        ).repeat_interleave(self.H).unsqueeze(1)
        stored = torch.arange(a, min(b, self.big), device=self.rows.device) < phase
        picked = []
        for n, o in zip(new, self.old.slots(a, b)):
            picked.append(
                None if n is None else torch.where(stored.view(*stored.shape, *[1] * (n.dim() - 2)), o, n)
            )
        return Tokens(*picked)

    def _commit(self, group: _Group, tokens: Tokens, boundary: int) -> None:
        flags = self.rows.commits(boundary)
        if not any(flags):
            return
        shared = shared_terms(self.config, tokens.k, tokens.eta, tokens.alpha, tokens.beta)
        over = self.in_place and group.fresh and all(flags)
        clips = None if self.stats is None else self.stats.S
        delta, s = write(
            self.config, group.layout, group.w, group.delta, group.s, shared, tokens.v, self.dtype, clips,
            in_place=over
        )
        if self.stats is not None and tokens.alpha is not None:
            self.stats.alpha.append(tokens.alpha)
        if not all(flags):
            mask = self.rows.mask(flags, self.H)
            delta = _where(mask, delta, group.delta)
            s = None if s is None else _where(mask, s, group.s)
        group.delta, group.s = delta, s
        group.w = self._weights(
            group.base, delta, group.w if self.in_place and self.config.retain_to == "init" else None
        )
        group.fresh = self.changed = True
        self._split_weights()

    def _close(self, pieces: list[Tokens], chunk: int, pending: Tokens | None) -> Tokens:
        """Pending tokens of the rows whose last token lies in the long chunk number ``chunk``; other rows
        keep theirs."""
        fill = [e - chunk * self.big for e in self.rows.ends()]
        here = [0 < f <= self.big and n > 0 for f, n in zip(fill, self.rows.lengths)]
        before = self.old if pending is None else pending
        if not any(here):
            return before
        fill = on_device([f % self.big if h else 0 for f, h in zip(fill, here)], self.rows.device)
        kept = (torch.arange(self.big, device=self.rows.device) < fill.unsqueeze(1)).repeat_interleave(self.H, 0)
        content = _join(pieces)
        short = self.big - content.k.shape[1]

        def padded(t: Tensor | None) -> MaybeTensor:
            if t is None:
                return None
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, short)) if short else t
            return torch.where(kept.view(*kept.shape, *[1] * (t.dim() - 2)), t, 0.0)

        content = Tokens(*(padded(t) for t in content))
        return content if all(here) else _where(self.rows.mask(here, self.H), content, before)

    def _new_state(self, pending: Tokens) -> TitansState:
        def batched(t: Tensor | None) -> MaybeTensor:
            return None if t is None else t.unflatten(0, (self.B, self.H)).transpose(1, 2)

        old = self.state
        new = old.advanced(
            self.rows.lengths,
            pending_k=batched(pending.k).to(self.dtype), pending_v=batched(pending.v).to(self.dtype),
            pending_eta=batched(pending.eta),
            pending_alpha=batched(pending.alpha), pending_beta=batched(pending.beta),
        )
        if self.changed:
            for prefix, weights in (("delta", [g.delta for g in self.groups]), ("s", [g.s for g in self.groups])):
                if weights[0] is None:
                    continue
                for name, parts in zip(("2", "1", "1s"), self._merged(weights)):
                    setattr(new, prefix + name, None if parts is None else parts.unflatten(0, (self.B, self.H)))
        return new

    def _merged(self, weights: list[FastWeights]) -> list[Tensor | None]:
        """The groups' weights back in one stack: w2 along its rows, w1 and w1s along their memories."""
        merged = []
        for parts in zip(*weights):
            parts = [p for p in parts if p is not None]
            merged.append(None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        return merged


def _last_slots(pieces: list[Tokens], count: int) -> Tokens:
    """The last ``count`` slots of consecutive pieces."""
    taken, have = [], 0
    for piece in reversed(pieces):
        taken.append(piece)
        have += piece.k.shape[1]
        if have >= count:
            break
    joined = _join(taken[::-1])
    return joined if have == count else joined.slots(have - count, have)
