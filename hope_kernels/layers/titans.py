"""SelfModifyingTitans: the layer around the memories. Static projections, gates and convolution here; no
update rule."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import BY_ALL, NO_GRADIENT, Request, choose
from ..check import check_lengths, check_state, check_tensor, check_values
from ..config import TitansConfig
from ..identity import checksum
from ..ops.conv.backends import ENTRIES as CONV
from ..ops.linear.backends import resolve as linear_ops
from ..ops.output_gate.backends import ENTRIES as OUTPUT_GATE
from ..ops.shared.across import Across
from ..ops.shared.pullback import Pullback
from ..ops.titans.backends import resolve
from ..ops.titans.inputs import Stats, TokenInputs
from ..ops.titans.scan import Gate
from ..ops.titans.state import FastWeights, Layout, TitansState, init_titans_state
from ..ops.unit.backends import ENTRIES as UNIT
from ..tracing import constant_result
from .autocast import in_own_dtype
from .recording import check_recorded, check_whole
from .titans_pullback import pullback
from .wrapped import is_plain, project
from .zero_gradient import with_zero_gradient


class SelfModifyingTitans(nn.Module):
    """A layer whose memories keep learning while they read (Nested Learning section 8.1, eq 83-93; Titans
    with the static preset).

    Per head, with x' = in_proj(causal_conv(x)), and every memory read as it was at the start of its chunk:

        k = norm(M_k(x'))   v = M_v(x')   q = norm(W_q x')
        eta = eta_scale * sigmoid(M_eta(x') + b)   alpha = sigmoid(M_alpha(x') + b)
        o = M_memory(q)     y = W_o(rmsnorm_per_head(o) * silu(W_g x))
        w <- w (alpha I - eta k k^T) - eta dL(M(k), M(v))/dw       for every memory, once per chunk and token

    Parameters: ``w2`` [H, R, D], ``w1`` [H, Mf, D, N], ``w1s`` [H, Ms, N]: initial fast weights, stacked
    (``memory_init(name)`` gives one memory's views); biases and gates per head. ``layer(x, state, lengths,
    update, backend)`` returns ``(y, state)``.
    """

    across: Across | None = None  # the processes that share the layer, each with some of the heads

    def __init__(self, config: TitansConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        self.layout = Layout.of(config)
        d, H, D = config.d_model, config.num_heads, config.head_dim
        kw: dict[str, Any] = {"device": device, "dtype": dtype}

        def empty(shape: tuple[int, ...] | None) -> nn.Parameter | Any:
            return None if shape is None else nn.Parameter(torch.empty(shape, **kw))

        shapes = self.layout.shapes(H)
        self.w2, self.w1, self.w1s = (empty(s) for s in shapes)
        self.conv = empty((d, config.conv_window)) if config.conv_window is not None else None

        def linear(out: int, wanted: bool) -> nn.Linear | Any:
            return nn.Linear(d, out, bias=False, **kw) if wanted else None

        static = not config.self_modifying
        self.in_proj = linear(d, config.uses_in_proj)
        self.q_proj = linear(d, not config.adaptive_q)
        self.k_proj, self.v_proj, self.eta_proj = linear(d, static), linear(d, static), linear(H, static)
        self.alpha_proj = linear(H, static and config.retention)
        self.beta_proj = linear(H, config.momentum == "learned")
        self.gate_proj, self.out_proj = linear(d, config.gate), linear(d, config.out_proj)
        self.norm_gain = empty((H, D) if config.out_norm else None)
        self.eta_bias = empty((H,))
        self.alpha_bias = empty((H,) if config.retention else None)
        self.beta_bias = empty((H,) if config.momentum == "learned" else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c, D, N = self.config, self.config.head_dim, self.config.hidden
        for p in (self.w2, self.w1, self.w1s):
            if p is not None:
                p.zero_()
        for name in self.layout.names:
            m = self.memory_init(name)
            if c.memory == "mlp":
                m["w2"].normal_(std=D**-0.5)
                if name == "v":
                    m["w1"].normal_(std=N**-0.5)
            elif name in ("k", "v", "q"):
                m["w"].normal_(std=D**-0.5)
        if self.conv is not None and c.conv_window is not None:
            nn.init.uniform_(self.conv, -(c.conv_window**-0.5), c.conv_window**-0.5)
        for module in self.children():
            weight: Any = module.weight
            nn.init.normal_(weight, std=c.d_model**-0.5)
        if c.q_identity:
            nn.init.eye_(self.q_proj.weight)
        if self.norm_gain is not None:
            self.norm_gain.fill_(1)
        self.eta_bias.fill_(c.eta_bias)
        if self.alpha_bias is not None:
            self.alpha_bias.copy_(torch.tensor(initial_alpha_bias(c), dtype=torch.float64, device="cpu"))
        if self.beta_bias is not None:
            self.beta_bias.fill_(2.0)

    def extra_repr(self) -> str:
        return f"memories={self.layout.names}, {self.config}"

    @property
    def parts(self) -> int:
        """Over how many processes the heads are divided."""
        return 1 if self.across is None else self.across.size

    @property
    def w_init(self) -> FastWeights:
        return FastWeights(self.w2, self.w1, self.w1s)

    def memory_init(self, name: str) -> dict[str, Tensor]:
        """Initial fast weights of one memory, as views: w2 [H, N, D], w1 [H, D_out, N] (and w_skip [H, 1,
        D]), or w for linear."""
        return self.layout.views(self.w_init, name)

    def init_state(self, batch: int, device=None, dtype: torch.dtype | None = None) -> TitansState:
        """State of ``batch`` sequences that have read nothing, by default on the layer's device and in its
        dtype."""
        device = self.w2.device if device is None else device
        state = init_titans_state(
            self.config, self.w_init, batch, device, self.w2.dtype if dtype is None else dtype, self.parts
        )
        if self.config.retain_to == "zero":
            check_whole(
                "SelfModifyingTitans.init_state", self, 'and retain_to="zero" starts a state from its values'
            )
        if self.config.retain_to == "zero" and torch.is_grad_enabled():
            # the learned initial memory is where delta starts: it must reach the graph
            expanded = self.w_init.map(lambda t, d: t.to(d.dtype).expand_as(d), state.deviation)
            state.delta2, state.delta1, state.delta1s = expanded
        state.owner, state.fingerprint = self, None if self.config.retain_to == "init" else checksum(self)
        return state

    @in_own_dtype
    def forward(
        self, x: Tensor, state: TitansState | None = None, lengths=None, update: bool = True,
        backend: str | None = None,
        *, check_finite: bool = False, functional: bool = False, constant_memory: bool | Gate = False,
    ) -> tuple[Tensor, TitansState]:
        """Reads T tokens per row and learns them.

        x: [B, T, d_model], the layer's dtype. state: from ``init_state``, an earlier call or a file; None
        starts new sequences. lengths: [B] ints or tensor, tokens of each row that count (right padding);
        padded outputs are zero. update=False: a pure read, the state stays as it is. check_finite: refuse an
        x with NaN or infinities (one sync on a device).
        Returns y [B, T, d_model] and the state after the last token: under no_grad the given state itself,
        advanced in place; in grad mode a new one that carries the graph. An error leaves the given state as
        it was.
        Raises ValueError for wrong shapes, dtypes, lengths, values, a state of another configuration or a
        given one inside an ``autograd.Function`` (reentrant activation checkpointing), TypeError for
        non-tensors.
        functional, constant_memory: for a block, which has checked its arguments; this is then ``scan``.
        """
        if functional:
            assert state is not None and lengths is not None
            return self.scan(x, state, lengths, update=update, backend=backend, constant_memory=constant_memory)
        name = "SelfModifyingTitans"
        check_tensor(name, "x", x, ("B", "T", self.config.d_model), dtype=self.w2.dtype, device=self.w2.device)
        lengths = check_lengths(name, lengths, x.shape[0], x.shape[1])
        if check_finite:
            check_values(name, "x", x, lengths)
        given = state
        check_recorded(name, given)
        if state is None:
            state = self.init_state(x.shape[0])
            state.made_here = not torch.is_grad_enabled()
        else:
            check_state(name, state, TitansState, self.config, x.shape[0])
            state.admit(name, self, x.dtype, x.device)
        in_place = given is not None and update and not torch.is_grad_enabled()
        with state.reading(name, self, in_place or given is None):
            if given is not None and update and not in_place:
                state = given.clone()  # what is returned shares no tensor with what was given
            y, new = self.scan(x, state, lengths, update=update, backend=backend)
            return y, given.assign(new) if given is not None and in_place else new

    def scan(
        self, x: Tensor, state: TitansState, lengths: list[int], *, update: bool = True, backend: str | None = None,
        constant_memory: bool | Gate = False, stats: Stats | None = None,
    ) -> tuple[Tensor, TitansState]:
        """``forward`` without its checks and without touching ``state``: returns y and the new state.

        constant_memory: fast weights and writes are constants of the graph, which then runs from y to x
        through q, convolution and gate only, and the returned state is detached (the inner gradient of a
        learning model). Gradients by parameters are not promised. A ``Gate``, on the chunked backend: so while it
        is closed, and with all gradients while it is open.
        """
        c = self.config
        own = c if self.across is None else part_of(c, self.across.size)
        compute = resolve(own, x.dtype, x.device, backend, constant_memory is True)
        # a backend that builds no graph: where x needs a gradient, ``pullback`` supplies it
        by_formulas = hasattr(compute, "with_pullback") and stats is None and self._is_plain()
        if c.adaptive_q and self.across is not None:
            by_formulas = False  # which take what queries are made of for all of u
        if by_formulas and torch.compiler.is_compiling():
            _prepare()
            return _untraced(
                self, x, state, lengths, update=update, backend=backend, constant_memory=constant_memory
            )
        # nothing around the memories has to build a graph where the formulas know its gradient
        request = Request(c, x.dtype, x.device, NO_GRADIENT if by_formulas else BY_ALL)
        causal_conv, unit, output_gate = surroundings(request, backend)
        ops = linear_ops(request, backend)
        given, wanted = x, by_formulas and torch.is_grad_enabled() and x.requires_grad
        n, real = self._real(lengths, x)
        with torch.no_grad() if by_formulas else contextlib.nullcontext():
            if real is not None:
                x = torch.where(real, x, 0.0)  # a NaN in the padding would reach shared weights through a backward
            conv, across = self.conv, self.across
            if across is not None:
                x, conv = across.enter(x), None if conv is None else across.enter(conv)
            u, tail = (x, None) if conv is None else causal_conv(x, state.conv_tail, conv, n)
            if self.in_proj is not None:
                u = project(self.in_proj, u, ops)
            u, mine = self._shared(u)
            raw = None if self.q_proj is None else self._heads(project(self.q_proj, u, ops))
            inputs = self._inputs(u, raw if raw is None or not c.qk_l2norm else unit(raw), mine, ops, unit)
            if wanted:
                o, new, by_q = compute.with_pullback(own, self.w_init, inputs, state, lengths, update=update)
            else:
                o, new = compute(
                    own, self.w_init, inputs, state, lengths, update=update, constant_memory=constant_memory,
                    stats=stats,
                )
            gate = None if self.gate_proj is None else project(self.gate_proj, x, ops)
            y = output_gate(o, self.norm_gain, gate)
            if self.out_proj is not None:
                y = project(self.out_proj, y, ops)
                y = y if across is None else across.total(y)
            elif across is not None:
                y = across.gathered(y, summed=False)
            if real is not None:
                y = torch.where(real, y, 0.0)
        if wanted:
            y = Pullback.apply(given, y, pullback(self, real, raw, o, gate, by_q))
        if torch.is_grad_enabled() and not constant_memory and not (update and self._needs_all(state.pos, lengths)):
            y = with_zero_gradient(y, self.parameters())
        if not update:
            return y, state
        if by_formulas or not constant_memory:
            return y, replace(new, conv_tail=tail)
        # a tail of its own: the graph may need the tensor that this one is a view of
        return y, replace(new, conv_tail=None if tail is None else tail.clone()).constant()

    def _is_plain(self) -> bool:
        """Whether every projection is what its weight says, so that formulas may take the weight for it."""
        return all([m is None or is_plain(m) for m in self._modules.values()])

    def _needs_all(self, pos: list[int], lengths: list[int]) -> bool:
        """Whether every parameter has a part in y: if any token is read after a chunk of M_memory that this
        call has closed, and the initial weights are not just where an earlier call started from."""
        c = self.config.chunk_memory
        return (
            self.config.retain_to == "init"
            and any([n > 0 and (p + n - 1) // c > p // c for p, n in zip(pos, lengths)])
        )

    def _real(self, lengths: list[int], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """lengths on the device, and which tokens of x [B, T, d] they count, [B, T, 1]; None, None if all."""
        T = x.shape[1]
        if not any([n < T for n in lengths]):
            return None, None
        n = torch.tensor(lengths, dtype=torch.int32, device=x.device)
        return n, (torch.arange(T, device=x.device) < n.unsqueeze(1)).unsqueeze(-1)

    def _heads(self, t: Tensor) -> Tensor:
        """[B, T, d] as [B, T, H, D]."""
        return t.unflatten(-1, (-1, self.config.head_dim))

    def _shared(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Of what comes before the heads: all channels, and those of this process's heads."""
        if self.across is None:
            return u, u
        if self.in_proj is None:
            return u, self.across.own(u)
        mixes = any([m is not None for m in (self.q_proj, self.k_proj, self.beta_proj)])
        return (self.across.gathered(u, summed=True) if mixes else u), u

    def _inputs(
        self, u: Tensor, q: Tensor | None, mine: Tensor | None, ops: Any, unit: Callable[[Tensor], Tensor]
    ) -> TokenInputs:
        """What the memories get of u [B, T, d], of the queries q [B, T, H, D] (None with adaptive_q), and of
        ``mine``, the channels that belong to the heads at hand (None: all of u). ops: of ops/linear. unit: of
        ops/unit."""
        c, heads, mine = self.config, self._heads, u if mine is None else mine
        beta = None
        if c.momentum == "learned":
            beta = ops.gate(project(self.beta_proj, u, ops), self.beta_bias)
        elif c.momentum is not None:
            # batched by vmap where u is
            beta = torch.full_like(mine[..., : c.num_heads // self.parts], float(c.momentum))
        if c.self_modifying:
            return TokenInputs(q, x=heads(mine), beta=beta, eta_bias=self.eta_bias, alpha_bias=self.alpha_bias)
        eta = ops.gate(project(self.eta_proj, u, ops), self.eta_bias, c.eta_activation == "softplus", c.eta_scale)
        alpha = ops.gate(project(self.alpha_proj, u, ops), self.alpha_bias) if c.retention else None
        k, v = heads(project(self.k_proj, u, ops)), heads(project(self.v_proj, u, ops))
        return TokenInputs(q, k=unit(k) if c.qk_l2norm else k, v=v, eta=eta, alpha=alpha, beta=beta)

    @torch.no_grad()
    def diagnostics(self, x: Tensor, state: TitansState | None = None) -> dict:
        """How the memories fare while reading x [B, T, d_model] from ``state`` (not modified): plain numbers.

        max_S and clipped_share over all tokens committed; ``deviation``: per memory |delta| / |w_init|
        (Frobenius, mean over rows and heads); ``half_life``: tokens until a write has decayed to a half, per
        head, at the mean log alpha of the tokens committed (inf without retention; at the gate's bias if x
        closes no chunk).
        """
        if self.across is not None:
            raise ValueError("SelfModifyingTitans.diagnostics: the heads are divided over "
                             f"{self.parts} processes, expected a whole layer: hope_kernels.parallel.whole_model "
                             "has them")
        state = self.init_state(x.shape[0]) if state is None else state
        stats = Stats([], [])
        y, state = self.scan(x, state, [x.shape[1]] * x.shape[0], stats=stats, backend="chunked")
        S = (
            torch.cat([s.flatten() for s in stats.S]) if stats.S
            else torch.zeros(1, dtype=torch.float32, device="cpu")
        )
        deviation = {}
        for name in self.layout.names:
            learned, init = state.memory(name), self.memory_init(name)
            if self.config.retain_to == "zero":
                learned = {k: v - init[k] for k, v in learned.items()}
            top, base = _norm(learned), _norm(init) * x.shape[0] ** 0.5
            deviation[name] = float(top / base.clamp_min(1e-30))
        return {
            "max_S": float(S.max()),
            "clipped_share": float((S > 1).double().mean()),
            "deviation": deviation,
            "half_life": self._half_lives(stats.alpha),
            "finite": bool(torch.isfinite(y).all()),
        }

    def _half_lives(self, alphas: list[Tensor]) -> list[float]:
        H = self.config.num_heads
        if not self.config.retention:
            return [math.inf] * H
        decay = torch.nn.functional.logsigmoid(self.alpha_bias.double())
        if alphas:
            decay = torch.cat(alphas, 1).double().log().mean(1).unflatten(0, (-1, H)).mean(0)
        return [float(h) for h in math.log(0.5) / decay]


def _norm(weights: dict[str, Tensor]) -> Tensor:
    """Frobenius, of all of them together."""
    total: Any = sum(w.double().square().sum() for w in weights.values())
    return total.sqrt()


def surroundings(request: Request, backend: str | None) -> tuple[Callable, Callable, Callable]:
    """What the layer computes around its memories: convolution, unit vectors, output gate."""
    return (
        choose("conv", CONV, request, backend), choose("unit", UNIT, request, backend),
        choose("output_gate", OUTPUT_GATE, request, backend),
    )


_untraced: Any = None  # ``SelfModifyingTitans.scan`` as the compiler runs it without a look inside


@constant_result
def _prepare() -> bool:
    """Makes ``_untraced``, which the compiler asks for while it traces."""
    global _untraced
    if _untraced is None:
        _untraced = torch.compiler.disable(SelfModifyingTitans.scan, reason="a call through ctypes")
    return True


@cache
def part_of(config: TitansConfig, parts: int) -> TitansConfig:
    """What the memories of one of ``parts`` processes are, which share the heads: to them it is a layer of its own."""
    return config.replace(
        d_model=config.d_model // parts, num_heads=config.num_heads // parts, in_proj=config.uses_in_proj
    )


def initial_alpha_bias(config: TitansConfig) -> list[float]:
    """logit of 2^(-1/h_i) per head: half-lives h_i = 16 * 1024^(i/(H-1)) tokens, 512 for a single head."""
    H = config.num_heads
    if config.alpha_bias is not None:
        return [config.alpha_bias] * H
    lives = [512.0] if H == 1 else [16 * 1024 ** (i / (H - 1)) for i in range(H)]
    # logit(2^-u) = -log(2^u - 1)
    return [-math.log(math.expm1(math.log(2) / h)) for h in lives]
