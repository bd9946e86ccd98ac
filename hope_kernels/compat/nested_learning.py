"""The class ``SelfModifyingTitans`` of the PyPI package nested-learning 0.2.0, on the closed-form chunk
updates of this package.

    from hope_kernels.compat.nested_learning import SelfModifyingTitans, SelfModifyingTitansConfig

Same configuration, methods, state fields and state_dict keys; code and checkpoints of that package run by
changing the import. Its per-call semantics are kept too: every call pads the convolution with zeros, counts
chunks from its own first token and flushes the open chunk at its end, so here one call and two calls differ.
``hope_kernels.SelfModifyingTitans`` is the layer whose calls may be split anywhere.

Writes: w <- w (alpha I - eta k k^T) - eta g for w2 and w_skip, w1 <- alpha w1 - eta g, g the gradient of
|M(k) - M(v)|^2 (or -M(k).M(v)) at the chunk's start, or its momentum m <- momentum m + g. Source: Nested
Learning eq 83-93.

In bf16 and fp16, and under autocast, a call computes in fp32 and rounds its outputs and the state once, at
its end; the package rounds every token's step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..check import check_tensor
from ..config import TitansConfig
from ..layers.wrapped import effective_weight, is_hooked, placement, write_weight
from ..ops.titans.commit import products, shared_terms, write
from ..ops.titans.evaluate import read
from ..ops.titans.state import FastWeights, Layout
from ..state import master_dtype

NAMES = ("k", "v", "q", "eta", "alpha", "memory")


@dataclass(frozen=True)
class SelfModifyingTitansConfig:
    """Fields, defaults and ranges of the package's class; ValueError outside them. Sizes may be floats and
    are truncated."""

    dim: int
    eta_scale: float = 1e-3
    chunk_size_other: int = 1
    chunk_size_memory: int | None = None
    objective: str = "l2"
    stopgrad_vhat: bool = True
    use_rank1_precond: bool = True
    use_alpha: bool = True
    momentum: float = 0.0
    qk_l2_norm: bool = True
    adaptive_q: bool = False
    use_skip: bool = True
    local_conv_window: int | None = 4
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.chunk_size_memory is None:
            object.__setattr__(self, "chunk_size_memory", int(self.chunk_size_other))
        for name in ("dim", "eta_scale", "chunk_size_other", "chunk_size_memory", "local_conv_window"):
            value = getattr(self, name)
            if value is not None and (int(value) if name == "local_conv_window" else value) <= 0:
                raise ValueError(f"SelfModifyingTitansConfig: {name} is {value!r}, expected a positive number")
        if self.objective not in ("l2", "dot"):
            raise ValueError(f"SelfModifyingTitansConfig: objective is {self.objective!r}, expected 'l2' or 'dot'")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(
                f"SelfModifyingTitansConfig: momentum is {self.momentum!r}, expected a float in [0, 1)"
            )

    def engine(self) -> TitansConfig:
        """The same rule in this package's terms; chunks are counted by the class here."""
        return TitansConfig.preset(
            "nested_learning", d_model=self.dim, objective=self.objective, dgd=bool(self.use_rank1_precond),
            retention=bool(self.use_alpha),
            momentum=float(self.momentum) or None, qk_l2norm=bool(self.qk_l2_norm),
            adaptive_q=bool(self.adaptive_q),
            scalar_skip=bool(self.use_skip) and self.dim > 1, eta_scale=float(self.eta_scale), conv_window=None,
        )


@dataclass
class ResidualMLPMemoryState:
    """One memory: w1 [out, N], w2 [N, dim], w_skip [1, dim] or None, and their momentum (None before its
    first use); with a leading batch dimension once a batch has been read."""

    w1: Tensor
    w2: Tensor
    w_skip: Tensor | None = None
    m_w1: Tensor | None = None
    m_w2: Tensor | None = None
    m_w_skip: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> ResidualMLPMemoryState:
        rest = (self.w_skip, self.m_w1, self.m_w2, self.m_w_skip)
        return ResidualMLPMemoryState(fn(self.w1), fn(self.w2), *(None if t is None else fn(t) for t in rest))

    def clone(self) -> ResidualMLPMemoryState:
        return self.map(lambda t: t.detach().clone())


@dataclass
class SelfModifyingTitansState:
    """Fast weights of all memories of a context."""

    k: ResidualMLPMemoryState
    v: ResidualMLPMemoryState
    q: ResidualMLPMemoryState
    eta: ResidualMLPMemoryState
    alpha: ResidualMLPMemoryState
    memory: ResidualMLPMemoryState

    def clone(self) -> SelfModifyingTitansState:
        return SelfModifyingTitansState(**{name: getattr(self, name).clone() for name in NAMES})


class ResidualMLPMemory(nn.Module):
    """Initial weights of one memory: M(z) = skip(z) + w1 gelu(w2 z)."""

    def __init__(self, dim: int, out: int, use_skip: bool):
        super().__init__()
        self.dim = dim
        self.w2 = nn.Linear(dim, dim, bias=False)
        self.w1 = nn.Linear(dim, out, bias=False)
        self.w_skip = nn.Linear(dim, out, bias=False) if use_skip and out != dim else None

    def forward(self, x: Tensor) -> Tensor:
        return _evaluate(x, *self.weights())

    def weights(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """w1, w2 and w_skip, as adapters and parametrizations of the Linears have them."""
        w1, w2 = effective_weight(self.w1, self.dim), effective_weight(self.w2, self.dim)
        return w1, w2, None if self.w_skip is None else effective_weight(self.w_skip, self.dim)


def _evaluate(x: Tensor, w1: Tensor, w2: Tensor, w_skip: Tensor | None) -> Tensor:
    """x [B, T, dim]; weights with or without a batch dimension."""
    out = F.gelu(x @ w2.mT) @ w1.mT
    if w_skip is not None:
        return out + x @ w_skip.mT
    return out + x if out.shape[-1] == x.shape[-1] else out


class SelfModifyingTitans(nn.Module):
    """The package's layer; see the module's docstring for what is kept of it."""

    m_k: ResidualMLPMemory
    m_v: ResidualMLPMemory
    m_q: ResidualMLPMemory
    m_eta: ResidualMLPMemory
    m_alpha: ResidualMLPMemory
    m_memory: ResidualMLPMemory

    def __init__(self, config: SelfModifyingTitansConfig):
        super().__init__()
        self.config = config
        d, window = config.dim, config.local_conv_window
        self.local_conv = None if window is None else nn.Conv1d(d, d, int(window), groups=d, bias=False)
        self.w_q = nn.Linear(d, d, bias=False)
        for name in NAMES:
            setattr(self, f"m_{name}", ResidualMLPMemory(d, 1 if name in ("eta", "alpha") else d, config.use_skip))

    def init_fast_state(self) -> SelfModifyingTitansState:
        """A new context: the initial weights, unbatched."""
        def start(m: ResidualMLPMemory) -> ResidualMLPMemoryState:
            return ResidualMLPMemoryState(*m.weights()).clone()

        return SelfModifyingTitansState(**{name: start(getattr(self, f"m_{name}")) for name in NAMES})

    def forward(self, x: Tensor) -> Tensor:
        """Reads x [B, T, dim] with the initial weights; differentiable, nothing is written. Without a
        convolution x is [..., dim]."""
        if self.local_conv is not None:
            self._check(x)
        x = self._convolved(x)
        return self.m_memory(self._unit(self.m_q(x) if self.config.adaptive_q else self.w_q(x)))

    def forward_with_state(self, x: Tensor, state: SelfModifyingTitansState) -> Tensor:
        """Reads x [B, T, dim] with the state's weights. Gradients reach x and, straight through the state,
        the initial weights."""
        self._check(x)
        state = self._batched(state, x.shape[0])
        x = self._convolved(x)

        def through(name: str, z: Tensor) -> Tensor:
            fast, meta = getattr(state, name), getattr(self, f"m_{name}")

            def joined(part: str) -> Tensor:
                weight = effective_weight(getattr(meta, part), meta.dim)
                return getattr(fast, part) + (weight - weight.detach())

            w1, w2 = joined("w1"), joined("w2")
            return _evaluate(z, w1, w2, None if fast.w_skip is None else joined("w_skip"))

        return through("memory", self._unit(through("q", x) if self.config.adaptive_q else self.w_q(x)))

    @torch.no_grad()
    def forward_with_updates(
        self, x: Tensor, state: SelfModifyingTitansState, *, chunk_size_other: int | None = None,
        chunk_size_memory: int | None = None,
    ) -> tuple[Tensor, SelfModifyingTitansState]:
        """Reads and writes x [B, T, dim]: (outputs, state). A batched state is advanced in place; an
        unbatched one is expanded first.

        Chunk sizes override the configuration's and need not divide each other. Raises ValueError for shapes,
        dtypes and sizes.
        """
        self._check(x, None if torch.is_autocast_enabled(x.device.type) else placement(self.w_q).dtype)
        other = int(self.config.chunk_size_other if chunk_size_other is None else chunk_size_other)
        chunk_size_memory = self.config.chunk_size_memory if chunk_size_memory is None else chunk_size_memory
        assert chunk_size_memory is not None
        memory = int(chunk_size_memory)
        if other <= 0 or memory <= 0:
            raise ValueError(
                f"forward_with_updates: chunk sizes are {other} and {memory}, expected positive integers"
            )
        state = self._batched(state, x.shape[0])
        x = self._convolved(x)
        q = None if self.config.adaptive_q else self._unit(self.w_q(x))
        with torch.autocast(x.device.type, enabled=False):
            return _Call(self, x, q, state, other, memory).run(), state

    @torch.no_grad()
    def apply_updates_inplace(
        self, x: Tensor, *, chunk_size_other: int | None = None, chunk_size_memory: int | None = None
    ) -> None:
        """Reads x from the initial weights and makes what was learned, averaged over the batch, the new
        initial weights. Raises ValueError, and changes none, where adapters or a parametrization stand
        between a Linear's parameters and its weight."""
        _, state = self.forward_with_updates(
            x, self.init_fast_state(), chunk_size_other=chunk_size_other, chunk_size_memory=chunk_size_memory
        )
        found = []
        for name in NAMES:
            if name == "q" and not self.config.adaptive_q or name == "alpha" and not self.config.use_alpha:
                continue
            meta, fast = getattr(self, f"m_{name}"), getattr(state, name)
            for part in ("w1", "w2", "w_skip"):
                if getattr(fast, part) is not None:
                    found.append((f"m_{name}.{part}", getattr(meta, part), getattr(fast, part).mean(0)))
        for keep in (False, True):  # all are asked before the first one is changed
            for where, linear, value in found:
                if is_hooked(linear):
                    raise ValueError(
                        f"apply_updates_inplace: {where} has hooks, expected a Linear that is its weight"
                    )
                write_weight(f"apply_updates_inplace: {where}", linear, "weight", value, keep)

    def _check(self, x: Tensor, dtype: torch.dtype | None = None) -> None:
        check_tensor("SelfModifyingTitans", "x", x, ("B", "T", self.config.dim), dtype)

    def _convolved(self, x: Tensor) -> Tensor:
        if self.local_conv is None:
            return x
        return self.local_conv(F.pad(x.mT, (self.local_conv.kernel_size[0] - 1, 0))).mT

    def _unit(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1, eps=self.config.eps) if self.config.qk_l2_norm else z

    def _batched(self, state: SelfModifyingTitansState, batch: int) -> SelfModifyingTitansState:
        for name in NAMES:
            given, own = getattr(state, name).w_skip is not None, getattr(self, f"m_{name}").w_skip is not None
            if given != own:
                raise ValueError(f"SelfModifyingTitans: state.{name}.w_skip is {'given' if given else 'None'}, "
                                 f"but the layer's m_{name} has {'one' if own else 'none'}")
        if state.k.w1.dim() == 2:
            return SelfModifyingTitansState(**{
                name: getattr(state, name).map(lambda t: t.detach().expand(batch, *t.shape).clone())
                for name in NAMES
            })
        if state.k.w1.dim() != 3:
            raise ValueError(f"SelfModifyingTitans: argument state has weights of {state.k.w1.dim()} dimensions, "
                             "expected 2 or 3")
        if state.k.w1.shape[0] != batch:
            raise ValueError(
                f"SelfModifyingTitans: argument state has {state.k.w1.shape[0]} rows, expected {batch}"
            )
        return state


def _layout(config: TitansConfig, names: tuple[str, ...], dim: int) -> Layout:
    """dim 1: eta and alpha have as many outputs as inputs, so like all other memories they skip by the identity."""
    layout = Layout.of(config, names)
    return layout if dim > 1 else replace(layout, full=names, scalars=())


class _Group:
    """Memories that share a clock, stacked in the master dtype for the length of a call."""

    def __init__(
        self, config: TitansConfig, layout: Layout, state: SelfModifyingTitansState, chunk: int, dtype: torch.dtype
    ):
        self.config, self.layout, self.state, self.chunk, self.dtype = config, layout, state, chunk, dtype
        self.w = self._stack("")
        self.s = None if config.momentum is None else self._stack("m_")
        self.waiting: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def _stack(self, prefix: str) -> FastWeights:
        """A copy: the stack may be written over, the state's tensors may not."""
        def part(name: str, weight: str) -> Tensor:
            memory = getattr(self.state, name)
            found = getattr(memory, prefix + weight)
            return (torch.zeros_like(getattr(memory, weight)) if found is None else found).to(self.dtype)

        skips = [part(n, "w_skip") for n in self.layout.scalars] if self.layout.skip else []
        w2 = torch.cat([part(n, "w2") for n in self.layout.names] + skips, 1)
        w1 = torch.stack([part(n, "w1") for n in self.layout.full], 1)
        w1s = torch.cat([part(n, "w1") for n in self.layout.scalars], 1) if self.layout.scalars else None
        return FastWeights(w2, w1, w1s)

    def unstack(self) -> None:
        """The stacked weights back into the state's fields, in the state's dtype."""
        for prefix, stacked in (("", self.w), ("m_", self.s)):
            if stacked is None:
                continue
            for name in self.layout.names:
                memory = getattr(self.state, name)
                for part, value in self.layout.views(stacked, name).items():
                    setattr(memory, prefix + part, value.to(getattr(memory, part).dtype, copy=True))

    def commit(self, constant_targets: bool) -> None:
        def joined(parts: list[Tensor]) -> Tensor:
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

        waiting, self.waiting, momentum = self.waiting, [], self.config.momentum
        k, v, eta = joined([p[0] for p in waiting]), joined([p[1] for p in waiting]), joined([p[2] for p in waiting])
        alphas = [p[3] for p in waiting if p[3] is not None]
        alpha = joined(alphas) if alphas else None
        beta = torch.full_like(eta, momentum) if isinstance(momentum, float) else None
        if not constant_targets:
            return self._commit_both_sides(k, v, eta, alpha, beta)
        shared = shared_terms(self.config, k, eta, alpha, beta, eta_outside=True)
        self.w, self.s = write(
            self.config, self.layout, self.w, self.w, self.s, shared, v, self.dtype, in_place=True
        )

    def _commit_both_sides(
        self, k: Tensor, v: Tensor, eta: Tensor, alpha: Tensor | None, beta: Tensor | None
    ) -> None:
        """The write whose gradient passes through the target M(v) too. k, v [B, C, dim]; eta, alpha, beta [B, C].

        A token's gradient is e a(k)^T + f a(v)^T at w1 and d k^T + h v^T at w2 and w_skip: 2C outer products
        under C decays. arrival[t,s]: the share of token s's gradient, times its step, that is in the weights
        after token t. The keys k and v of those products meet the later tokens' erasure as

            Yg = diag(arrival[C,.]) Y - W^T X      W[t,s] = arrival[t-1,s] k_t.y_s   for s < t,  y = k or v
        """
        C, l2 = k.shape[1], self.config.objective == "l2"
        gamma = products(torch.ones_like(eta) if alpha is None else alpha)
        arrival, decay_chunk, y = gamma[:, :, 1:] * eta.unsqueeze(1), gamma[:, C:, :1], torch.cat([k, v], 1)
        if beta is not None:
            B = products(beta)
            beta_chunk, beta_after = B[:, C:, :1], B[:, C, 1:].repeat(1, 2).unsqueeze(1)
            arrival = gamma[:, :, 1:] @ (B[:, 1:] * eta.unsqueeze(-1))
            arrival, c = arrival[:, :, 1:], arrival[:, :, :1]
        step = arrival[:, C:].repeat(1, 1, 2)
        y_g = step.mT * y
        if self.config.dgd:
            earlier = torch.ones(C, C, dtype=k.dtype, device=k.device).tril(-1).unsqueeze(1)
            gram = (k @ y.mT).unflatten(-1, (2, C)) * earlier
            L = gamma[:, :C, 1:] * gram[:, :, 0] * eta.unsqueeze(1)
            steps = (eta * gamma[:, C, 1:]).unsqueeze(-1) * k
            X = torch.linalg.solve_triangular(L.mT, steps, upper=True, unitriangular=True)
            y_g = y_g - (gram * arrival[:, :C].unsqueeze(2)).flatten(2).mT @ X
        for name in self.layout.names:
            w = self.layout.views(self.w, name)
            s = {} if self.s is None else self.layout.views(self.s, name)
            z = w["w2"] @ y.mT
            a = F.gelu(z)
            at_k, at_v = _evaluate(y, w["w1"], w["w2"], w.get("w_skip")).mT.chunk(2, -1)
            e = 2 * torch.cat([at_k - at_v, at_v - at_k], -1) if l2 else -torch.cat([at_v, at_k], -1)
            h = torch.ops.aten.gelu_backward(w["w1"].mT @ e, z)
            for part, grad, inputs in (("w2", h, y), ("w_skip", e, y), ("w1", e, a.mT)):
                if part not in w:
                    continue
                erased = self.config.dgd and part != "w1"
                new = decay_chunk * w[part] - grad @ (step.mT * inputs if part == "w1" else y_g)
                if erased:
                    new -= w[part] @ k.mT @ (gamma[:, :C, :1] * X)
                if s:
                    new -= c[:, C:] * s[part]
                    if erased:
                        new += s[part] @ k.mT @ (c[:, :C] * X)
                    s[part].copy_(beta_chunk * s[part] + (grad * beta_after) @ inputs)
                w[part].copy_(new)


class _Call:
    """One forward_with_updates over the convolved x [B, T, dim] and the static q [B, T, dim], or None with
    adaptive_q."""

    def __init__(
        self, layer: SelfModifyingTitans, x: Tensor, q: Tensor | None, state: SelfModifyingTitansState,
        other: int, memory: int
    ):
        self.layer, self.config, self.out_dtype = layer, layer.config.engine(), x.dtype if q is None else q.dtype
        dtype = master_dtype(state.memory.w1.dtype)
        self.x, self.q = x.to(dtype), None if q is None else q.to(dtype)
        names = self.config.memories
        whole, *self.layouts = (
            _layout(self.config, part, layer.config.dim) for part in (names, names[:1], names[1:])
        )
        spans = [(whole, other)] if other == memory else [(self.layouts[0], memory), (self.layouts[1], other)]
        self.groups = [_Group(self.config, layout, state, chunk, dtype) for layout, chunk in spans]

    def _weights(self) -> tuple[FastWeights, FastWeights]:
        first = self.groups[0]
        return (first.w, self.groups[1].w) if len(self.groups) > 1 else first.layout.split(first.w)

    def _read(self, a: int, b: int) -> Tensor:
        """Reads tokens a..b-1 with the weights in force and queues what they will write; returns o [B, b-a,
        dim]."""
        c, layer, x = self.config, self.layer, self.x[:, a:b]
        memory_w, other_w = self._weights()
        out = read(x.mT, other_w, self.layouts[1], c.activation, x.dtype)
        full = out.full
        assert full is not None
        k, v = layer._unit(full[:, 0].mT), full[:, 1].mT
        q = layer._unit(full[:, 2].mT) if self.q is None else self.q[:, a:b]
        # with dim 1, eta and alpha are the last of the memories with D outputs
        scalar = full[:, 3 if self.q is None else 2 :, 0] if out.scalar is None else out.scalar
        eta = F.softplus(scalar[:, 0]) * c.eta_scale
        alpha = torch.sigmoid(scalar[:, 1]) if c.retention else None
        for group in self.groups:
            group.waiting.append((k, v, eta, alpha))
        read_out = read(q.mT, memory_w, self.layouts[0], c.activation, x.dtype).full
        assert read_out is not None
        return read_out[:, 0].mT

    def run(self) -> Tensor:
        T, at, outputs = self.x.shape[1], 0, []
        while at < T:
            end = min([T] + [(at // g.chunk + 1) * g.chunk for g in self.groups])
            outputs.append(self._read(at, end))
            for group in self.groups:
                if end % group.chunk == 0 or end == T:
                    group.commit(self.layer.config.stopgrad_vhat)
            at = end
        for group in self.groups:
            group.unstack()
        return torch.cat(outputs, 1).to(self.out_dtype)
