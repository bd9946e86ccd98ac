"""ContinuumMemory: the CMS as a layer, with what each sequence has learned in a CMSState. The mathematics is
in ``ops/cms``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..check import check_batch, check_lengths, check_mask, check_state, check_tensor
from ..config import CMSConfig
from ..identity import Checksum, checksum
from ..ops.cms import level, low_rank
from ..ops.cms.absorb import absorb, add_gradients
from ..ops.cms.backends import divided, resolve
from ..ops.cms.chain import NORM_EPS, Sink, Work, pull_back, read_level, read_levels
from ..ops.cms.continued import continued
from ..ops.cms.deviations import based, followed
from ..ops.cms.level import Level
from ..ops.cms.matrix import Matrix
from ..ops.cms.pending import pending_tokens
from ..ops.cms.plan import Known, Plan, planned
from ..ops.cms.schedule import learning_levels, matrices
from ..ops.cms.state import CMSState
from ..ops.shared.across import Across
from ..ops.titans.scan import Gate
from ..state import Counters, master_dtype
from . import cms_consolidate
from .autocast import in_own_dtype, without_autocast
from .cms_bytes import state_bytes
from .cms_level import CMSLevel
from .cms_segment import check_reading, with_tokens, written
from .cms_sink import sink
from .cms_weights import effective
from .recording import check_recorded
from .wrapped import tensors_of
from .zero_gradient import with_zero_gradient

NAME = "ContinuumMemory"


class Inner(NamedTuple):
    """One block's part in the pass that learns. anchor: the scalar its gradient is taken to.  sink: where the
    levels' factors go (None without a CMS).  among: the rows of the state's batch that the pass reads; None:
    all.  apart: what it reads are parts of one segment, side by side: the mixers do not see one from another,
    and to the CMS, which reads every token for itself, they are tokens of the one row in ``among``.  gate: where the
    gradient itself is to be differentiated: the graph is that of training, but for this between the memories and
    what is read from them; there is no sink, and the CMS is given as levels."""

    anchor: Tensor
    sink: Sink | None
    among: list[int] | None = None
    apart: bool = False
    gate: Gate | None = None


class ContinuumMemory(nn.Module):
    """K MLPs, each refreshed at its own pace by the gradient of the task's loss (Nested Learning eq 70-74).

        y = MLP_K(... MLP_1(x))                              sequential, nested
        y = sum_l softmax(mix)_l MLP_l(x)                    independent
        theta_l <- theta_l - lr_l f(sum of dL_t/dtheta_l)    when C^(l) more tokens have been read, per sequence

    Learning takes two calls per segment of C1 = chunks[0] tokens: ``cms(x, state)`` reads and keeps its
    inputs, ``cms.refresh(state, error)`` delivers dL/dy. Both may be split in any way; with the last error of
    a segment its gradient is taken and the levels that are due commit. A call with learn=True therefore reads
    at most up to the next multiple of C1.

    Parameters: ``levels.<l>.norm_gain`` [d], ``.up`` [N, d], ``.down`` [d, N]; ``.gate`` [N, d] (gated);
    ``.norm_bias`` [d] (layernorm); ``.post_gain`` [d] (post_norm); ``.up_bias``, ``.gate_bias``, ``.down_bias``
    (bias=True); ``.log_rates``, one a matrix in the order up, gate, down (lr="learned"); ``mix`` [K] (independent).

    ``pending`` (an attribute; None: as the table in ``ops/cms/pending.py`` has it): tokens whose factors a
    row may hold per level before they become weights of its own. Until then rows share one base, and a row
    costs ``pending`` (rows + cols) numbers instead of rows cols.
    """

    across: Across | None = None  # the processes that share the levels, each with some of the hidden units

    def __init__(self, config: CMSConfig, norm_eps: float = NORM_EPS, device=None, dtype=None):
        super().__init__()
        self.config, self.norm_eps, self.pending = config, norm_eps, None
        self._known_sizes: dict[int, tuple[Checksum | None, dict[str, float]]] = {}
        d, n = config.d_model, config.hidden
        shapes = {"norm_gain": (d,), "up": (n, d), "down": (d, n)}
        if config.norm == "layernorm":
            shapes["norm_bias"] = (d,)
        if config.post_norm:
            shapes["post_gain"] = (d,)
        if config.gated:
            shapes["gate"] = (n, d)
        if config.bias:
            shapes.update({f"{name}_bias": (shapes[name][0],) for name in matrices(config)})
        if config.lr == "learned":
            shapes["log_rates"] = (len(matrices(config)),)

        def empty(shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.levels = nn.ModuleList(CMSLevel({name: empty(s) for name, s in shapes.items()}) for _ in config.chunks)
        self.mix = empty((config.num_levels,)) if config.variant == "independent" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices ~ N(0, 1/fan_in), gains 1, biases and mix 0, learned rates the default ones."""
        for l in range(self.config.num_levels):
            for name, p in self._parameters_of(l).items():
                if name in matrices(self.config):
                    nn.init.normal_(p, std=p.shape[1] ** -0.5)
                elif name == "log_rates":
                    rates = list(self.config.matrix_rates(l).values())
                    p.copy_(torch.tensor(rates, dtype=torch.float64, device="cpu").log())
                else:
                    nn.init.constant_(p, 1.0 if name in ("norm_gain", "post_gain") else 0.0)
        if self.mix is not None:
            nn.init.zeros_(self.mix)

    def extra_repr(self) -> str:
        return str(self.config)

    @property
    def learns(self) -> bool:
        """Whether any level has lr > 0."""
        return bool(learning_levels(self.config))

    def init_state(self, batch: int, device=None, dtype: torch.dtype | None = None) -> CMSState:
        """State of ``batch`` sequences that have read nothing. It holds no tensors yet (they are allocated on
        first use, where the input is and in its dtype), so ``device`` and ``dtype`` change nothing; they are
        there because every layer takes them."""
        return CMSState(
            pos=Counters([0] * check_batch(f"{NAME}.init_state", batch)), config=self.config, owner=self,
            parts=self.parts,
        )

    @in_own_dtype
    def forward(
        self, x: Tensor, state: CMSState | None = None, lengths=None, learn: bool = True,
        backend: str | None = None, *, functional: bool = False, inner: Inner | None = None,
    ) -> tuple[Tensor, CMSState]:
        """Reads T tokens per row.

        x: [B, T, d], the layer's dtype.  state: None starts new sequences.  lengths: [B] ints or tensor,
        tokens of each row that count (right padding; a row of length 0 is untouched); outputs of padding are
        zero.
        learn=True keeps the inputs for ``refresh``: a row reads at most up to the next multiple of chunks[0],
        and reads on only when all errors of the finished segment have been delivered. learn=False keeps
        nothing, reads any number of tokens, changes no weight, and the segments it touches contribute nothing
        (errors of their other tokens are accepted and ignored, never owed).
        If every lr is 0, learn=True is learn=False.
        Returns y [B, T, d] and the new state: under no_grad or inference_mode the given one, advanced in
        place; in grad mode one that shares no tensor with it, while y carries the graph to x and to the
        parameters (weights a sequence has refreshed are constants). Raises ValueError for wrong shapes,
        dtypes or lengths, for a state of another configuration or batch, and for reading past outstanding
        errors, and for a given state inside an ``autograd.Function`` (reentrant activation checkpointing);
        TypeError for a non-tensor. After an error the given state is as it was.
        functional: for a block, which has checked its arguments: read at the weights of ``state`` (or at
        levels, as ``effective_levels`` gives them), padding too, and return it as it is. inner: in the pass
        that learns.
        """
        if functional:
            assert state is not None
            return self._read(x, state, backend, inner), state
        check_recorded(NAME, state)
        like = self._like
        check_tensor(NAME, "x", x, ("B", "T", self.config.d_model), like.dtype, like.device)
        lengths = check_lengths(NAME, lengths, x.shape[0], x.shape[1])
        state = self._admitted(NAME, state, x)
        learn, now = bool(learn) and self.learns, self.continued(state)
        check_reading(NAME, self.config.chunks[0], now, lengths, learn)
        with state.reading(NAME, self, not torch.is_grad_enabled()):
            base = self.continued(state.clone() if torch.is_grad_enabled() else state)
            y = self._forward(x, base, lengths, backend)
            new = with_tokens(self.config.chunks[0], base, x.detach(), lengths, learn)
            return y, new if torch.is_grad_enabled() else state.assign(new)

    def refresh(self, state: CMSState, error: Tensor, lengths=None, backend: str | None = None) -> CMSState:
        """Delivers dL/dy, in the order the tokens were read with learn=True, and learns from it when a
        segment is complete.

        error: [B, T, d], the layer's dtype; lengths: [B], errors of each row that count. A row takes errors
        of its open segment only, so at most one segment is completed by a call. Errors for a segment with
        learn=False tokens are ignored; if every lr is 0, all. With the last error of a segment of C1 tokens
        its gradient joins the accumulators of all levels, and every level whose period divides the row's
        count commits. Returns the state, detached: in place under no_grad, a new one in grad mode, as in
        ``forward``. Raises ValueError for more errors than tokens read, and as ``forward`` does; the state is
        then as it was. What stops it later (an interrupt, memory running out) may under no_grad leave some
        levels a step ahead of others: go back to a clone or a file. Source: Nested Learning eq 71.
        """
        like = self._like
        # as in_own_dtype
        real = isinstance(error, Tensor) and error.device.type != "meta"
        if real and torch.is_autocast_enabled(error.device.type):
            with torch.autocast(error.device.type, enabled=False):
                return self.refresh(state, error.to(like.dtype), lengths, backend)
        where = f"{NAME}.refresh"
        check_recorded(where, state)
        check_tensor(where, "error", error, ("B", "T", self.config.d_model), like.dtype, like.device)
        lengths = check_lengths(where, lengths, error.shape[0], error.shape[1])
        if state is None:
            raise ValueError(
                f"{where}: argument state is None, expected the state that read the tokens of these errors"
            )
        state = self._admitted(where, state, error)
        ops = self.ops(error.dtype, error.device, backend, inner=True)
        now = self.continued(state)
        if not self.learns:
            return now.clone() if torch.is_grad_enabled() else state
        for b, n in enumerate(lengths):
            owed = now.seen[b] - now.delivered[b]
            if n > owed:
                raise ValueError(f"{where}: argument error has {n} tokens for row {b}, expected at most {owed}: "
                                 "the tokens of its open segment that were read with learn=True and have no error yet")
        with state.reading(where, self, not torch.is_grad_enabled()):
            base = self.continued(state.clone() if torch.is_grad_enabled() else state)
            new = self._refreshed(base.draft("all"), error.detach(), lengths, ops).finished()
            return new if torch.is_grad_enabled() else state.assign(new)

    def continued(self, state: CMSState) -> CMSState:
        """``state``, which may have other rates or another optimizer, under this layer's configuration: see
        ``ops/cms/continued.py``. Itself where there is no difference; it stays as it is."""
        state = self.followed(state)
        if state.config is self.config or state.config == self.config:
            return state
        return continued(state, self.config, self.start)

    def followed(self, state: CMSState) -> CMSState:
        """``state`` at this layer's matrices as they are now, where it holds deviations from them: see
        ``ops/cms/deviations.py``. Itself where nothing has moved; it stays as it is."""
        if state.base is None:
            return state
        return followed(state, checksum(self), [self._matrices(l) for l in range(self.config.num_levels)])

    def based(self, state: CMSState) -> CMSState:
        """``state``, whose rows hold deviations from this layer's matrices from here on."""
        return based(state, checksum(self), [self._matrices(l) for l in range(self.config.num_levels)])

    def effective_levels(self, state: CMSState, dtype: torch.dtype | None = None) -> list[Level]:
        """The levels as ``cms_forward`` takes them, in ``dtype`` (None: that of the parameters).

        A matrix is the parameter [rows, cols] while no row has refreshed its level, then a ``Matrix``: the
        row's own constants where it has any, the parameter (with its graph) elsewhere; with ``rank`` the
        parameter (with its graph) and the row's own part, a constant.
        """
        return [
            effective(self.config, l, state, self._parameters_of(l), dtype) for l in range(self.config.num_levels)
        ]

    def state_bytes(self, batch: int = 1, segment: int | None = None) -> list[dict[str, int]]:
        """Bytes that ``batch`` sequences need per level once they have all learned, by what they are for:
        ``weights`` (fp32, or fp64), ``copies`` in the input dtype, ``grads`` of levels slower than a segment,
        ``moments`` (Adam's squares among them), ``pending`` factors, ``preconditioners``. segment: tokens
        between two boundaries, ``model.segment`` in a model; None: chunks[0]."""
        return state_bytes(self, batch, self.config.chunks[0] if segment is None else segment)

    def sink(
        self, state: CMSState, rows: list[int], counts: list[int] | None, ops, among: list[int] | None = None,
        tokens: list[int] | None = None, real: Tensor | None = None, scale: Callable[[int], float] | None = None,
    ) -> Sink:
        """What takes the factors of a segment to the draft ``state``: see ``cms_sink.py``."""
        return sink(self, state, rows, counts, ops, among, tokens, real, scale)

    def plans(
        self, state: CMSState, rows: list[int], counts: list[int] | None, tokens: list[int],
        scale: Callable[[int], float] | None, known: dict[int, Known],
    ) -> dict[int, Plan]:
        """What ``rows`` of the draft ``state`` do with a segment of ``tokens`` [B], by level: see ``plan.py``. known:
        earlier ones, by level; at first empty."""
        if not known:
            known.update((l, {}) for l in learning_levels(self.config))
        return {
            l: planned(
                state, self.config, partial(self.start, l), l, rows, counts, tokens, self._sizes(l), scale, plans
            ) for l, plans in known.items()
        }

    @torch.no_grad()
    def accumulate(self, state: CMSState, level_grads: list, rows: list[bool]) -> CMSState:
        """A state whose accumulators include ``level_grads`` (as from ``cms_gradients``: per level None or
        name -> [B, rows, cols]) in the marked rows. ``state`` is not modified, and unchanged tensors are
        shared with it. A level with lr = 0 ignores its gradient. Raises ValueError with ``precondition``,
        which has to know a segment's inputs."""
        if self.config.precondition is not None:
            raise ValueError(f"{NAME}.accumulate: the layer has precondition={self.config.precondition}, expected "
                             "None: gradients do not say which inputs they are of")
        marked = check_mask(f"{NAME}.accumulate", "rows", rows, state.batch)
        new = self.continued(state).draft()
        for l in learning_levels(self.config) if marked else ():
            if level_grads[l] is not None:
                grads = {n: g.detach() for n, g in level_grads[l].items()}
                if self.config.rank is not None:
                    grads = low_rank.projected_gradients(self.config, l, grads)
                add_gradients(new, self.config, l, grads, marked)
        return new.finished()

    @torch.no_grad()
    def commit(self, state: CMSState, rows: list[bool], counts: list[int] | None = None) -> CMSState:
        """A state after the refreshes that are due in the marked rows at ``counts`` (None: ``state.pos``),
        from their accumulators. ``state`` is not modified, and unchanged tensors are shared with it."""
        marked = check_mask(f"{NAME}.commit", "rows", rows, state.batch)
        if not marked:
            return state
        new = self.continued(state).draft()
        ops = level if self.across is None else divided(self.across)
        for l in learning_levels(self.config):
            due_at = state.pos if counts is None else counts
            absorb(new, self.config, self.start(l), l, None, marked, due_at, ops=ops, sizes=self._sizes(l))
        return new.finished()

    @without_autocast
    def detach_level(self, state: CMSState, level: int, row: int = 0) -> dict[str, Tensor]:
        """Takes out of ``state`` what one row has learned in ``level`` (index, level 1 is 0).

        Returns the row's matrices, name -> [rows, cols] in the master dtype. In place, the row then shares
        the layer's weights again, with nothing accumulated. Raises ValueError for a level or row that does
        not exist.
        """
        return cms_consolidate.detach_level(self, state, level, row)

    @without_autocast
    def consolidate(self, state: CMSState, row: int = 0, levels: list[int] | None = None) -> None:
        """Makes what ``row`` has learned in ``levels`` (None: all) the parameters, from which new sequences start.

        Nothing that any row of ``state`` computes changes (but what a nested level returns to): the row
        shares the new parameters, rows that shared the old ones keep them as their own. In place, parameters
        and state; 16-bit parameters round what was learned. Other states belong to the old weights. A
        parametrized level is set through its ``right_inverse``. Raises ValueError for a level or row that
        does not exist, and where adapters or a parametrization stand between the parameters and what was
        learned; nothing is then changed.
        """
        cms_consolidate.consolidate(self, state, row, levels)
        state.adopt(self)

    @property
    def parts(self) -> int:
        """Over how many processes the hidden units are divided."""
        return 1 if self.across is None else self.across.size

    def ops(self, dtype: torch.dtype, device: torch.device, backend: str | None, inner: bool) -> Any:
        """The functions of its levels, as ``ops/cms/backends.py`` resolves them."""
        found = resolve(self.config, dtype, device, backend, inner)
        return found if self.across is None else divided(self.across)

    @property
    def _like(self) -> Tensor:
        """A tensor of the layer's dtype, on its device."""
        return self._parameters_of(0)["up"]

    def _slots(self, l: int) -> int:
        return pending_tokens(self.config, l, self._like.device, self.pending)

    def _matrices(self, l: int) -> dict[str, Tensor]:
        held = self._parameters_of(l)
        return {name: held[name].detach() for name in matrices(self.config)}

    def start(self, l: int) -> dict[str, Tensor]:
        """What a row's weights start from: the matrices, or with ``rank`` zeros in the shape of L."""
        held = self._matrices(l)
        return held if self.config.rank is None else low_rank.nothing(self.config, held)

    @torch.no_grad()
    def rates(self, l: int) -> dict[str, float]:
        """The rates of level ``l`` in force, by the name of the matrix."""
        if self.config.lr != "learned":
            return self.config.matrix_rates(l)
        return dict(zip(matrices(self.config), self._parameters_of(l)["log_rates"].double().exp().tolist()))

    def _sizes(self, l: int) -> dict[str, float] | None:
        """The RMS of each matrix, which relative rates are relative to, times its rate where that is learned; looked
        at again only when the parameters may have changed. None: rates are absolute."""
        return self._measured(l) if self.config.relative else None

    @torch.no_grad()
    def _measured(self, l: int) -> dict[str, float]:
        mark, (known, found) = checksum(self), self._known_sizes.get(l, (None, {}))
        if mark is None or mark is not known:
            means = {n: t.to(master_dtype(t.dtype)).square().mean() for n, t in self._matrices(l).items()}
            if self.across is not None:  # parts of one size
                means = {n: self.across.sum(mean) / self.across.size for n, mean in means.items()}
            found = {n: float(mean) ** 0.5 for n, mean in means.items()}
            if self.config.lr == "learned":
                found = {n: size * own for (n, size), own in zip(found.items(), self.rates(l).values())}
            self._known_sizes[l] = mark, found
        return found

    def _parameters_of(self, l: int) -> dict[str, Tensor]:
        """``levels[l]`` as a plain dict, as whatever parametrizes or wraps it has it. A module's own access
        to its parameters costs microseconds each."""
        return tensors_of(self.levels._modules[str(l)])

    @torch.no_grad()
    def _refreshed(self, state: CMSState, error: Tensor, lengths: list[int], ops) -> CMSState:
        """The draft ``state`` with ``error`` delivered; segments that are complete by it have been learned."""
        C1, B = self.config.chunks[0], state.batch
        taken = [n if not t else 0 for n, t in zip(lengths, state.tainted)]
        errors = written(state.errors, error, state.delivered, taken, [0] * B, C1)
        delivered = Counters([d + n for d, n in zip(state.delivered, lengths)])
        rows = [b for b in range(B) if lengths[b] > 0 and not state.tainted[b] and delivered[b] == C1]
        new = replace(state, errors=errors, delivered=delivered)
        if not rows:
            return new
        x, e, among = new.inputs, errors, None
        assert x is not None and e is not None
        if len(rows) < B:
            x, e, among = x[rows], e[rows], rows
        sink = self.sink(new, rows, new.pos, ops, among)
        pull_back(x, e, self.config, lambda x, anchor: self._levels(x, new, ops, Inner(anchor, sink, among), True))
        closed = {
            n: Counters([0 if b in rows else c for b, c in enumerate(getattr(new, n))])
            for n in ("seen", "delivered")
        }
        return replace(new, **closed)

    def _read(
        self, x: Tensor, state: CMSState | list[Level], backend: str | None, inner: Inner | None = None
    ) -> Tensor:
        """x through all levels, in the pass that learns if there is an ``inner``."""
        if inner is not None and inner.apart:
            one = self._read(x.reshape(1, -1, x.shape[-1]), state, backend, inner._replace(apart=False))
            return one.view(x.shape)
        ops = self.ops(x.dtype, x.device, backend, inner is not None)
        # nothing up to here learns: no graph, no backward
        if inner is not None and not x.requires_grad and not self.learns:
            with torch.no_grad():
                return self._levels(x, state, ops, inner._replace(sink=None))
        return self._levels(x, state, ops, inner)

    def _levels(
        self, x: Tensor, state: CMSState | list[Level], ops, inner: Inner | None = None, constant: bool = False
    ) -> Tensor:
        """Every level through its own call, inside which its weights are taken. constant: without a graph to
        the parameters."""
        anchor, sink, among = inner[:3] if inner is not None else (None, None, None)
        work = Work(self.config, self.norm_eps, ops, sink, anchor)

        def read(l: int, residual: bool) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
            def with_parameters(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
                    level = (
                        state[l] if isinstance(state, list) else effective(self.config, l, state, parameters)
                    )
                if among is not None:
                    level = {n: t.take(among) if isinstance(t, Matrix) else t for n, t in level.items()}
                y = read_level(l, x, level, work, residual)
                if inner is None and torch.is_grad_enabled():  # no row shares a matrix that all have learned
                    learned = [n for n, t in level.items() if isinstance(t, Matrix) and t.rows and all(t.rows)]
                    y = with_zero_gradient(y, [parameters[n] for n in (*learned, "log_rates") if n in parameters])
                return y

            return with_parameters

        modules = self.levels._modules
        return read_levels(
            x, self.config, self.mix, lambda l, x, residual: modules[str(l)](x, read(l, residual)),
            inner is not None
        )

    def _forward(self, x: Tensor, state: CMSState, lengths: list[int], backend: str | None) -> Tensor:
        T = x.shape[1]
        if all(n == T for n in lengths):
            return self._read(x, state, backend)
        count = torch.tensor(lengths, dtype=torch.long, device=x.device)[:, None]
        real = (torch.arange(T, device=x.device) < count)[..., None]
        # Padding is zeroed before as well: a NaN there would reach shared weights through the backward of the
        # outer loss.
        return torch.where(real, self._read(torch.where(real, x, 0), state, backend), 0)

    def _admitted(self, where: str, state: CMSState | None, x: Tensor) -> CMSState:
        if state is None:
            return self.init_state(x.shape[0])
        check_state(where, state, CMSState, self.config, x.shape[0])
        state.admit(where, self, x.dtype, x.device)
        return state
