"""ContinuumMemory: the CMS as a layer, with what each sequence has learned in a CMSState. The mathematics is in ``ops/cms``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..config import CMSConfig
from ..ops.check import check_lengths, check_placement, check_state, check_tensor
from ..ops.cms import chunked as ops
from ..state import Counters, State

NAME = "ContinuumMemory"


@dataclass(eq=False)
class CMSState(State):
    """What B sequences have learned in a CMS of K levels; None stands for tensors that no sequence has needed yet.

    weights: per level None (all rows share the layer's) or name -> [B, rows, cols], master dtype; in force where ``own`` is 1.
    grads: per level None (zero) or name -> [B, rows, cols]: gradients since the level's last commit.
    moments: per level None (zero) or name -> [B, rows, cols]: momentum, optimizer="momentum" only.
    own: per level one 0/1 per row: 1 from the row's first refresh of that level on, 0 again after a nested reset.
    inputs, errors: None or [B, C1, d]: the open segment's inputs and delivered dL/dy. Unused by a model that has a loss of its own.
    seen, delivered: per row, tokens of the open segment read with learn=True, and how many of their errors have arrived.
    tainted: per row, 1 if the open segment holds a token read with learn=False.

    The open segment of a row at count ``pos`` is the one that holds token pos - 1; a segment whose gradient has been taken is closed.
    """

    weights: list = field(default_factory=list)
    grads: list = field(default_factory=list)
    moments: list = field(default_factory=list)
    own: list = field(default_factory=list)
    inputs: Tensor | None = None
    errors: Tensor | None = None
    seen: Counters = field(default_factory=Counters)
    delivered: Counters = field(default_factory=Counters)
    tainted: Counters = field(default_factory=Counters)

    ACTIVATIONS = frozenset({"inputs", "errors"})


class ContinuumMemory(nn.Module):
    """K MLPs, each refreshed at its own pace by the gradient of the task's loss (Nested Learning eq 70-74).

        y = MLP_K(... MLP_1(x))                              sequential, nested;   independent: y = sum_l softmax(mix)_l MLP_l(x)
        theta_l <- theta_l - lr_l f(sum of dL_t/dtheta_l)    when C^(l) more tokens have been read, per sequence

    Learning takes two calls per segment of C1 = chunks[0] tokens: ``cms(x, state)`` reads and keeps its inputs, ``cms.refresh(state,
    error)`` delivers dL/dy. Both may be split in any way; with the last error of a segment its gradient is taken and the levels that are
    due commit. A call with learn=True therefore reads at most up to the next multiple of C1.

    Parameters: ``levels.<l>.norm_gain`` [d], ``.up`` [N, d], ``.down`` [d, N]; ``.gate`` [N, d] (swiglu); ``.norm_bias`` [d]
    (layernorm); ``.up_bias``, ``.gate_bias``, ``.down_bias`` (bias=True); ``mix`` [K] (independent).
    """

    def __init__(self, config: CMSConfig, norm_eps: float = ops.NORM_EPS, device=None, dtype=None):
        super().__init__()
        self.config, self.norm_eps = config, norm_eps
        d, n = config.d_model, config.hidden
        shapes = {"norm_gain": (d,), "up": (n, d), "down": (d, n)}
        if config.norm == "layernorm":
            shapes["norm_bias"] = (d,)
        if config.mlp == "swiglu":
            shapes["gate"] = (n, d)
        if config.bias:
            shapes.update({f"{name}_bias": (shapes[name][0],) for name in ops.matrices(config)})

        def empty(shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.levels = nn.ModuleList(nn.ParameterDict({name: empty(s) for name, s in shapes.items()}) for _ in config.chunks)
        self.mix = empty((config.num_levels,)) if config.variant == "independent" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices ~ N(0, 1/fan_in), gains 1, biases and mix 0."""
        for level in self.levels:
            for name, p in level.items():
                if name in ops.matrices(self.config):
                    nn.init.normal_(p, std=p.shape[1] ** -0.5)
                else:
                    nn.init.constant_(p, 1.0 if name == "norm_gain" else 0.0)
        if self.mix is not None:
            nn.init.zeros_(self.mix)

    def extra_repr(self) -> str:
        return str(self.config)

    @property
    def learns(self) -> bool:
        """Whether any level has lr > 0."""
        return bool(ops.learning_levels(self.config))

    def init_state(self, batch: int, device=None, dtype: torch.dtype | None = None) -> CMSState:
        """State of ``batch`` sequences that have read nothing. It holds no tensors yet (they are allocated on first use, where the
        input is and in its dtype), so ``device`` and ``dtype`` change nothing; they are there because every layer takes them."""
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 0:
            raise ValueError(f"{NAME}.init_state: argument batch is {batch!r}, expected an integer >= 0")
        K = self.config.num_levels

        def zeros():
            return Counters([0] * batch)

        return CMSState(
            pos=zeros(), config=self.config, weights=[None] * K, grads=[None] * K, moments=[None] * K, own=[zeros() for _ in range(K)],
            seen=zeros(), delivered=zeros(), tainted=zeros(), owner=self,
        )

    def forward(self, x: Tensor, state: CMSState | None = None, lengths=None, learn: bool = True) -> tuple[Tensor, CMSState]:
        """Reads T tokens per row.

        x: [B, T, d], the layer's dtype.  state: None starts new sequences.  lengths: [B] ints or tensor, tokens of each row that count
        (right padding; a row of length 0 is untouched); outputs of padding are zero.
        learn=True keeps the inputs for ``refresh``: a row reads at most up to the next multiple of chunks[0], and reads on only when
        all errors of the finished segment have been delivered. learn=False keeps nothing, reads any number of tokens, changes no
        weight, and the segments it touches contribute nothing (errors of their other tokens are accepted and ignored, never owed).
        If every lr is 0, learn=True is learn=False.
        Returns y [B, T, d] and the new state: under no_grad or inference_mode the given one, advanced in place; in grad mode one that
        shares no tensor with it, while y carries the graph to x and to the parameters (weights a sequence has refreshed are constants).
        Raises ValueError for wrong shapes, dtypes or lengths, for a state of another configuration or batch, and for reading past
        outstanding errors; TypeError for a non-tensor. After an error the given state is as it was.
        """
        check_tensor(NAME, "x", x, ("B", "T", self.config.d_model), self.levels[0]["up"].dtype, self.levels[0]["up"].device)
        lengths = check_lengths(NAME, lengths, x.shape[0], x.shape[1])
        state = self._admitted(NAME, state, x)
        learn = bool(learn) and self.learns
        self._check_reading(state, lengths, learn)
        base = state.clone() if torch.is_grad_enabled() else state
        y = self._forward(x, self.effective_levels(base), lengths)
        new = self._with_tokens(base, x.detach(), lengths, learn)
        return y, new if torch.is_grad_enabled() else state.assign(new)

    @torch.no_grad()
    def _refreshed(self, state: CMSState, error: Tensor, lengths: list[int]) -> CMSState:
        C1, B = self.config.chunks[0], state.batch
        taken = [n if not t else 0 for n, t in zip(lengths, state.tainted)]
        errors = _written(state.errors, error, state.delivered, taken, [0] * B, C1)
        delivered = Counters(d + n for d, n in zip(state.delivered, lengths))
        rows = [n > 0 and not t and d == C1 for n, t, d in zip(lengths, state.tainted, delivered)]
        new = replace(state, errors=errors, delivered=delivered)
        if not any(rows):
            return new
        new = self.accumulate(new, self._segment_gradients(new, [b for b in range(B) if rows[b]]), rows)
        new = self.commit(new, rows)
        closed = {name: Counters(0 if r else c for r, c in zip(rows, getattr(new, name))) for name in ("seen", "delivered")}
        return replace(new, **closed)

    def refresh(self, state: CMSState, error: Tensor, lengths=None) -> CMSState:
        """Delivers dL/dy, in the order the tokens were read with learn=True, and learns from it when a segment is complete.

        error: [B, T, d], the layer's dtype; lengths: [B], errors of each row that count. A row takes errors of its open segment only,
        so at most one segment is completed by a call. Errors for a segment with learn=False tokens are ignored; if every lr is 0, all.
        With the last error of a segment of C1 tokens its gradient joins the accumulators of all levels, and every level whose period
        divides the row's count commits. Returns the state, detached: in place under no_grad, a new one in grad mode, as in ``forward``.
        Raises ValueError for more errors than tokens read, and as ``forward`` does. Source: Nested Learning eq 71.
        """
        where = f"{NAME}.refresh"
        check_tensor(where, "error", error, ("B", "T", self.config.d_model), self.levels[0]["up"].dtype, self.levels[0]["up"].device)
        lengths = check_lengths(where, lengths, error.shape[0], error.shape[1])
        if state is None:
            raise ValueError(f"{where}: argument state is None, expected the state that read the tokens of these errors")
        state = self._admitted(where, state, error)
        base = state.clone() if torch.is_grad_enabled() else state
        if not self.learns:
            return base
        for b, n in enumerate(lengths):
            owed = state.seen[b] - state.delivered[b]
            if n > owed:
                raise ValueError(f"{where}: argument error has {n} tokens for row {b}, expected at most {owed}: "
                                 "the tokens of its open segment that were read with learn=True and have no error yet")
        new = self._refreshed(base, error.detach(), lengths)
        return new if torch.is_grad_enabled() else state.assign(new)

    def effective_levels(self, state: CMSState, dtype: torch.dtype | None = None) -> list[dict[str, Tensor]]:
        """The levels as ``cms_forward`` takes them, in ``dtype`` (None: that of the parameters).

        A matrix is the parameter [rows, cols] while no row has refreshed its level, then [B, rows, cols]: the row's own constant
        where it has one, the parameter (with its graph) elsewhere.
        """
        result = []
        for level, held, own in zip(self.levels, state.weights, state.own):
            tensors = {name: p if dtype is None else p.to(dtype) for name, p in level.items()}
            if held is not None and any(own):
                for name, w in held.items():
                    w = w.detach().to(tensors[name].dtype)
                    if w.is_inference() and not torch.is_inference_mode_enabled():
                        w = w.clone()  # autograd refuses to save an inference tensor
                    tensors[name] = w if all(own) else torch.where(ops.row_mask(own, w.device), w, tensors[name])
            result.append(tensors)
        return result

    @torch.no_grad()
    def accumulate(self, state: CMSState, level_grads: list, rows: list[bool]) -> CMSState:
        """A state whose accumulators include ``level_grads`` (as from ``cms_gradients``: per level None or name -> [B, rows, cols]) in
        the marked rows. ``state`` is not modified, and unchanged tensors are shared with it. A level with lr = 0 ignores its gradient."""
        grads = list(state.grads)
        for l in ops.learning_levels(self.config) if any(rows) else ():
            if level_grads[l] is not None:
                given = {name: g.detach().to(ops.master_dtype(g.dtype)) for name, g in level_grads[l].items()}
                grads[l] = ops.accumulate(grads[l], given, rows)
        return replace(state, grads=grads)

    @torch.no_grad()
    def commit(self, state: CMSState, rows: list[bool], counts: list[int] | None = None) -> CMSState:
        """A state after the refreshes that are due in the marked rows at ``counts`` (None: ``state.pos``), see ``ops.cms.chunked.commit``.
        ``state`` is not modified, and unchanged tensors are shared with it."""
        counts = state.pos if counts is None else counts
        if not any(rows):
            return state
        names, master = ops.matrices(self.config), ops.master_dtype(self.levels[0]["up"].dtype)
        initial = [{name: level[name].detach().to(master) for name in names} for level in self.levels]
        weights, grads, moments, own = ops.commit(
            self.config, initial, state.weights, state.grads, state.moments, state.own, rows, counts
        )
        return replace(state, weights=weights, grads=grads, moments=moments, own=[Counters(o) for o in own])

    def _forward(self, x: Tensor, levels: list[dict[str, Tensor]], lengths: list[int]) -> Tensor:
        T = x.shape[1]
        if all(n == T for n in lengths):
            return ops.cms_forward(x, levels, self.config, self.mix, self.norm_eps)
        real = (torch.arange(T, device=x.device) < torch.tensor(lengths, device=x.device)[:, None])[..., None]
        # Padding is zeroed before as well: a NaN there would reach shared weights through the backward of the outer loss.
        y = ops.cms_forward(torch.where(real, x, 0), levels, self.config, self.mix, self.norm_eps)
        return torch.where(real, y, 0)

    def _segment_gradients(self, state: CMSState, rows: list[int]) -> list:
        """Gradients of the complete segments of ``rows``, as [B, rows, cols] with zeros in all other rows."""
        levels = self.effective_levels(state)
        picked = [{n: t if t.dim() < 3 else ops.take_rows(t, rows) for n, t in level.items()} for level in levels]
        x, error = ops.take_rows(state.inputs, rows), ops.take_rows(state.errors, rows)
        found = ops.cms_gradients(x, error, picked, self.config, self.mix, self.norm_eps)

        def spread(g: Tensor) -> Tensor:
            return ops.put_rows(g.new_zeros((state.batch, *g.shape[1:])), rows, g)

        return [None if grads is None else {name: spread(g) for name, g in grads.items()} for grads in found]

    def _admitted(self, where: str, state: CMSState | None, x: Tensor) -> CMSState:
        if state is None:
            return self.init_state(x.shape[0])
        check_state(where, state, CMSState, self.config, x.shape[0])
        check_placement(where, state, x.dtype, x.device)
        state.bind(self, where)
        return state

    def _check_reading(self, state: CMSState, lengths: list[int], learn: bool) -> None:
        C1 = self.config.chunks[0]
        for b, n in enumerate(lengths):
            pos, tainted = state.pos[b], state.tainted[b]
            if n == 0:
                continue
            if state.seen[b] == C1 and not tainted:
                raise ValueError(f"{NAME}: row {b} has read the segment that ends at token {pos}, but "
                                 f"{C1 - state.delivered[b]} of its {C1} errors are outstanding; "
                                 "deliver them with refresh(state, error) before reading on")
            left = C1 - pos % C1
            # A segment with learn=False tokens owes no errors, so a call may end it and fill the next one.
            room = left + C1 if tainted and pos % C1 else left
            if learn and n > room:
                raise ValueError(f"{NAME}: argument x has {n} tokens for row {b} at token {pos}, expected at most {room} with learn=True: "
                                 f"the errors of a segment of chunks[0] = {C1} tokens must be delivered with refresh(state, error) before "
                                 "the next segment is read (learn=False reads any number)")

    @torch.no_grad()
    def _with_tokens(self, state: CMSState, x: Tensor, lengths: list[int], learn: bool) -> CMSState:
        """``state`` after reading: counters, and the inputs of open segments in which every token was read with learn=True."""
        C1 = self.config.chunks[0]
        seen, delivered, tainted = list(state.seen), list(state.delivered), list(state.tainted)
        skip, kept, at = [0] * state.batch, [0] * state.batch, [0] * state.batch
        for b, n in enumerate(lengths):
            if n == 0:
                continue
            left = -state.pos[b] % C1  # tokens until the open segment ends; 0 if it has ended
            opens = n > left
            if opens:
                seen[b] = delivered[b] = tainted[b] = 0
            if not learn:
                tainted[b] = 1
                continue
            skip[b] = left if opens else 0
            if not tainted[b]:
                at[b], kept[b] = seen[b], n - skip[b]
            seen[b] += n - skip[b]
        return replace(
            state, pos=Counters(p + n for p, n in zip(state.pos, lengths)), inputs=_written(state.inputs, x, at, kept, skip, C1),
            seen=Counters(seen), delivered=Counters(delivered), tainted=Counters(tainted),
        )


def _written(buffer: Tensor | None, source: Tensor, at: list[int], count: list[int], skip: list[int], slots: int) -> Tensor | None:
    """``buffer`` [B, slots, d] (None: allocated) with buffer[b, at_b : at_b + count_b] = source[b, skip_b : skip_b + count_b].

    Written in place where that is allowed: a value counts only once the counters cover it, so a failure later in the call is harmless.
    """
    if not any(count):
        return buffer
    if buffer is None:
        buffer = source.new_zeros((source.shape[0], slots, source.shape[2]))
    elif buffer.is_inference() and not torch.is_inference_mode_enabled():
        buffer = buffer.clone()
    if len(set(at)) == len(set(count)) == len(set(skip)) == 1:
        buffer[:, at[0] : at[0] + count[0]] = source[:, skip[0] : skip[0] + count[0]]
        return buffer
    rows = [b for b, n in enumerate(count) for _ in range(n)]
    to = [a + i for a, n in zip(at, count) for i in range(n)]
    start = [s + i for s, n in zip(skip, count) for i in range(n)]
    index = torch.tensor([rows, to, start], dtype=torch.long, device=buffer.device)
    buffer[index[0], index[1]] = source[index[0], index[2]]
    return buffer
