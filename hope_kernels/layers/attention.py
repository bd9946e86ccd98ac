"""Causal softmax attention with a key-value cache that obeys the same streaming contract as the memories:
RoPE, grouped heads, norms of queries and keys, a window, and sinks beside it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backend import Request, gradient
from ..check import check_batch, check_counters, check_lengths, check_part, check_state, check_tensor, check_values
from ..config import HopeConfig
from ..ops.attention import backends as attention
from ..ops.linear import backends as linear
from ..ops.shared.across import Across
from ..state import Counters, State, master_dtype
from .attention_cache import appended, mask_before, stored, trimmed
from .autocast import in_own_dtype
from .recording import check_recorded
from .rope import rope_rates, rotate
from .wrapped import normed, placement, project
from .zero_gradient import with_zero_gradient


@dataclass(eq=False)
class AttentionState(State):
    """Keys and values of B sequences: k, v [B, capacity, Hkv, D], input dtype, keys already rotated.

    Row b holds the first S tokens (S: ``config.sinks``) and the tokens S + base[b] .. pos[b]-1 in its slots 0
    .. pos[b]-base[b]-1: base[b] tokens between them have been dropped. Slots after them hold no meaning. The
    buffers are append-only: a slot that any state counts is never written again, a fuller or shorter cache is
    new storage. So ``snapshot`` and ``detach`` copy nothing, and both sides may be read on, in any mode:
    ``filled[b]``, the slots of row b ever written, is one list for all states on a storage, and a state that
    does not end there appends to new storage. ``clone`` and ``select`` copy.

    lost[b]: tokens of row b, of those after the first S, that a narrower window had passed when a wider one took
    its place (``continued``): none of them is seen again.
    """

    k: Tensor
    v: Tensor
    base: Counters
    lost: Counters = field(default_factory=lambda: Counters([]), kw_only=True)
    filled: list[int] = field(default_factory=list, repr=False, kw_only=True)  # empty: the slots that count

    INPUT_DTYPE = frozenset({"k", "v"})

    def __post_init__(self) -> None:
        if not self.filled:
            self.filled = self.used()
        if len(self.lost) != len(self.pos):  # new, or from a file written before there was one
            self.lost = Counters([0] * len(self.pos))

    def _fields(self):
        # filled says nothing about the sequences: no file, cast or row selection knows it
        return [(n, v) for n, v in super()._fields() if n != "filled"]

    def _mapped(self, tensor, counters):
        return super()._mapped(tensor, counters)._on_storage_of(self)

    def to(self, device=None, dtype: torch.dtype | None = None):
        return super().to(device, dtype)._on_storage_of(self)

    def _on_storage_of(self, source: AttentionState):
        """Made from ``source``: shares its ``filled`` exactly where it shares the storage."""
        if self.k.numel() == 0 or self.k.data_ptr() != source.k.data_ptr():
            self.filled = self.used()
        return self

    def input_dtype(self) -> torch.dtype | None:
        return self.k.dtype if isinstance(self.k, Tensor) else None

    def _check(
        self, where: str, dtype: torch.dtype | None, device: torch.device, values: bool,
        rows: list[int] | None = None
    ) -> None:
        """rows: those whose counters mean something; None: all."""
        c, slots = self.config, self.k.shape[1] if isinstance(self.k, Tensor) and self.k.dim() > 1 else 0
        for name in ("k", "v"):
            shape = (self.batch, slots, c.heads[1] // self.parts, c.head_width)
            check_part(where, name, getattr(self, name), shape, dtype, device)
        if torch.compiler.is_compiling():
            return
        check_counters(where, "pos", self.pos, self.batch, 0)
        check_counters(where, "base", self.base, self.batch, 0)
        check_counters(where, "lost", self.lost, self.batch, 0)
        window, sinks = c.sight
        for b in range(self.batch) if rows is None else rows:
            pos, used, lost = self.pos[b], self.pos[b] - self.base[b], self.lost[b]
            if lost > self.base[b]:
                raise ValueError(f"{where}: state.lost says that row {b} sees none of {lost} tokens again, and "
                                 f"state.base that it has dropped {self.base[b]}")
            least = pos - lost if window is None else min(pos - lost, window + sinks)
            if not least <= used <= slots:
                raise ValueError(f"{where}: state.base says that row {b}, which has read {pos} tokens, keeps {used} of "
                                 f"them in {slots} slots; expected at least {least}, and slots for all")
            if not used <= self.filled[b] <= slots:
                raise ValueError(
                    f"{where}: state.filled is {self.filled} with {slots} slots, of which row {b} uses {used}"
                )

    def used(self) -> list[int]:
        """Slots that count, per row."""
        return [p - b for p, b in zip(self.pos, self.base)]

    def diverged(self, lengths: list[int]) -> bool:
        """Whether another state has written a slot that ``lengths`` more tokens would take."""
        return any(n and u != f for n, u, f in zip(lengths, self.used(), self.filled))

    def detach(self):
        return self.constant()  # independent all the same: a slot that counts is never written

    def snapshot(self):
        """The state as it is now, in O(B): it shares the storage; either side may be read on."""
        return replace(self, pos=Counters(self.pos), base=Counters(self.base), lost=Counters(self.lost))

    def holds(self, earlier: AttentionState, seen: list[int]) -> bool:
        """Whether the storage has all that ``earlier``, ``seen`` tokens ago, needs, in rows where ``seen`` is
        positive."""
        window, sinks = self.config.sight
        for b, pos in enumerate(earlier.pos):
            least = pos - self.lost[b] if window is None else min(pos - self.lost[b], window + sinks)
            if seen[b] > 0 and (earlier.lost[b] != self.lost[b] or pos - self.base[b] < least):
                return False
        return True

    def unreachable(self) -> list[int]:
        """Tokens of each row, of those after the sinks, that no later token sees, even if a wider window comes."""
        window, sinks = self.config.sight
        if window is None:
            return list(self.lost)
        return [max(p - window - sinks, lost) for p, lost in zip(self.pos, self.lost)]

    def continued(self, config: HopeConfig, unreachable: list[int]) -> AttentionState:
        """The same sequences under ``config``, which may have another window; shares storage where it can.

        A narrower window sees less. A wider one sees, from here on, what the narrower one would still have:
        its cache may hold more, by how the calls were split, and what is seen must not depend on that. So
        the first ``unreachable`` tokens after the sinks leave the storage (of the sequences as they are now: a
        snapshot stands before them). Raises ValueError for other sinks where a window has dropped tokens: the
        first of a sequence cannot be kept afterwards.
        """
        new, (before, sinks), (after, other) = replace(self.snapshot(), config=config), self.config.sight, config.sight
        if sinks != other and any(unreachable):
            raise ValueError(f"AttentionState: sinks is {other} and was {sinks} when tokens left the window, expected "
                             "the same")
        if before is None or after is not None and after <= before:
            return new
        lost = [min(u, max(p - sinks, 0)) for u, p in zip(unreachable, self.pos)]
        gone = [max(n - b, 0) for n, b in zip(lost, self.base)]
        new.lost = Counters(lost)
        if not any(gone):
            return new
        new.base = Counters([b + g for b, g in zip(self.base, gone)])
        used, slots = new.used(), self.k.shape[1]
        width = max(used)
        first = torch.tensor(gone, dtype=torch.long, device=self.k.device).unsqueeze(1)
        slot = torch.arange(width, device=self.k.device)
        index = torch.where(slot < sinks, slot, first + slot).clamp(max=slots - 1)[..., None, None]
        counted = mask_before(used, width, self.k.device)

        def moved(t: Tensor) -> Tensor:
            return torch.where(counted, t.gather(1, index.expand(-1, -1, *t.shape[2:])), 0.0)

        return replace(new, k=moved(self.k), v=moved(self.v), filled=[])

    def compact(self):
        """The same sequences in storage of exactly the slots that count (zero after a shorter row): what a
        file needs."""
        used = self.used()
        width = max([0, *used])
        counted = mask_before(used, width, self.k.device)

        def cut(t: Tensor) -> Tensor:
            return torch.where(counted, t[:, :width], 0.0)

        return replace(self.snapshot(), k=cut(self.k), v=cut(self.v), filled=[])

    @classmethod
    def _alike(cls, states: list[AttentionState]) -> list[AttentionState]:
        """In storage as wide as the widest."""
        width = max(s.k.shape[1] for s in states)

        def padded(t: Tensor) -> Tensor:
            return F.pad(t, (0, 0, 0, 0, 0, width - t.shape[1]))

        return [replace(s, k=padded(s.k), v=padded(s.v), filled=[]) for s in states]

    def _tidied(self):
        self.filled = self.used()
        return self

    def _lean(self):
        return self.compact()

    def merge(self, other, rows: list[bool]):
        mine, theirs = self._alike([self, other])
        return State.merge(mine, theirs, rows)

    def caught_up(self, later, rows: list[bool]):
        """On the storage of ``later``, which holds the tokens of both."""
        pos = Counters([o if r else p for p, o, r in zip(self.pos, later.pos, rows)])
        return replace(later, pos=pos, base=Counters(later.base), lost=Counters(later.lost))

    def _take(self, new: State):
        """By reference: a snapshot may share the old storage."""
        assert isinstance(new, AttentionState)
        self.pos[:], self.base[:], self.k, self.v, self.filled = new.pos, new.base, new.k, new.v, new.filled
        self.lost, self.config = new.lost, new.config
        return self


class CausalAttention(nn.Module):
    """y = W_o softmax(rope(q) rope(k)^T / sqrt(D)) v over the last ``window`` tokens (all if None) and the
    first ``sinks`` tokens of the sequence; D is the width of a head.

    ``num_kv_heads`` key heads serve num_heads / num_kv_heads query heads each; ``qk_norm`` norms every head
    of q and k before RoPE. RoPE in the half-split convention of Llama, at the token's position in its own
    sequence; a sink is seen from no farther than position sinks + window - 1, as if what has left the window
    had never been (``docs/llama.md`` has the figures). ``attn(x, state, lengths, update)`` returns ``(y,
    state)``. config: of one block (``HopeConfig.blocks``). Raises ValueError for that of several.
    """

    across: Across | None = None  # the processes that share the layer, each with some of the heads

    def __init__(self, config: HopeConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        d = config.d_model
        heads, kv_heads = config.heads
        self.head_dim = config.head_width
        self.window, self.sinks = config.sight
        # no buffer: a cast of the module must not round them
        self.rates = rope_rates(config)
        wide, kv = heads * self.head_dim, kv_heads * self.head_dim
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(d, wide, bias=config.attention_bias, **kw)
        self.k_proj = nn.Linear(d, kv, bias=config.attention_bias, **kw)
        self.v_proj = nn.Linear(d, kv, bias=config.attention_bias, **kw)
        self.o_proj = nn.Linear(wide, d, bias=False, **kw)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps, **kw)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps, **kw)
        for module in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def parts(self) -> int:
        """Over how many processes the heads are divided."""
        return 1 if self.across is None else self.across.size

    def init_state(self, batch: int, device=None, dtype: torch.dtype | None = None) -> AttentionState:
        """State of ``batch`` sequences that have read nothing; its buffers grow as it reads. Raises ValueError."""
        check_batch("CausalAttention.init_state", batch)
        w, kv_heads = placement(self.k_proj), self.config.heads[1] // self.parts
        empty = torch.zeros(batch, 0, kv_heads, self.head_dim, device=device or w.device, dtype=dtype or w.dtype)
        zero = [0] * batch
        return AttentionState(
            Counters(zero), self.config, empty, empty.clone(), Counters(zero), owner=self, parts=self.parts
        )

    @in_own_dtype
    def forward(
        self, x: Tensor, state: AttentionState | None = None, lengths=None, update: bool = True,
        backend: str | None = None,
        *, check_finite: bool = False, functional: bool = False, constant_memory: Any = False,
    ) -> tuple[Tensor, AttentionState]:
        """Reads T tokens per row and caches their keys and values.

        x: [B, T, d_model], the layer's dtype. state: from ``init_state``, an earlier call or a file; None
        starts new sequences. lengths: [B] ints or tensor, tokens of each row that count (right padding);
        padded outputs are zero. update=False: a pure read, the state stays as it is. check_finite: refuse an
        x with NaN or infinities (one sync on a device). backend: None takes the best one; attention is C++ in fp32
        on the CPU without a graph, else PyTorch's scaled_dot_product_attention.
        Returns y [B, T, d_model] and the state after the last token: under no_grad the given state itself,
        advanced in place; in grad mode a new one that carries the graph. An error leaves the given state as it was.
        Raises ValueError for wrong shapes, dtypes, lengths, values, a state of another configuration or a
        given one inside an ``autograd.Function`` (reentrant activation checkpointing), TypeError for
        non-tensors.
        functional, constant_memory: for a block, which has checked its arguments; this is then ``scan``.
        """
        if functional:
            assert state is not None and lengths is not None
            return self.scan(x, state, lengths, update=update, backend=backend, constant_memory=constant_memory)
        name = "CausalAttention"
        weight = placement(self.k_proj)
        check_tensor(name, "x", x, ("B", "T", self.config.d_model), dtype=weight.dtype, device=weight.device)
        lengths = check_lengths(name, lengths, x.shape[0], x.shape[1])
        if check_finite:
            check_values(name, "x", x, lengths)
        given = state
        check_recorded(name, given)
        if state is None:
            state = self.init_state(x.shape[0])
        else:
            check_state(name, state, AttentionState, self.config, x.shape[0])
            state.admit(name, self, x.dtype, x.device)
        in_place = given is not None and update and not torch.is_grad_enabled()
        with state.reading(name, self, in_place or given is None):
            if state.config is not self.config and state.config != self.config:
                state = state.continued(self.config, state.unreachable())
            y, new = self.scan(x, state, lengths, update=update, backend=backend)
            if given is not None and not update:
                return y, given
            return y, given.assign(new) if given is not None and in_place else new

    def scan(
        self, x: Tensor, state: AttentionState, lengths: list[int], *, update: bool = True,
        backend: str | None = None, constant_memory: Any = False,
    ) -> tuple[Tensor, AttentionState]:
        """``forward`` without its checks. Without a graph, new keys are appended to the given storage, after
        all that counts.

        constant_memory: the graph runs through this call's keys and values; those from before are constants
        if ``state`` is detached, and the returned state is detached. A ``Gate`` (``ops/titans/scan.py``): as False,
        since there are no fast weights.
        """
        T, constant_memory = x.shape[1], constant_memory is True
        if not any(lengths):
            y = torch.zeros_like(x)
            if torch.is_grad_enabled() and not constant_memory:
                y = with_zero_gradient(y, [x, *self.parameters()])
            return y, state.snapshot() if update else state
        valid = mask_before(lengths, T, x.device).squeeze(-1) if min(lengths) < T else None
        if valid is not None:
            # a NaN in the padding would reach the weights' gradients, as 0 * NaN
            x = torch.where(valid, x, 0.0)
        across = self.across
        x = x if across is None else across.enter(x)
        request = Request(self.config, x.dtype, x.device, gradient(False))
        ops, attend = linear.resolve(request, backend), attention.resolve(request, backend).attend
        q, k, v = [self._heads(project(m, x, ops)) for m in (self.q_proj, self.k_proj, self.v_proj)]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normed(self.q_norm, q, ops), self._normed(self.k_norm, k, ops)
        far, farthest = None, self.farthest
        if farthest is not None and max(p + n for p, n in zip(state.pos, lengths)) > farthest + 1:
            far = rotate(q, *self.rotation(state.pos, T, x, farthest))
        cos, sin = self.rotation(state.pos, T, x)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        used, graph = state.used(), torch.is_grad_enabled()
        new = state
        # a replay (constant_memory from a snapshot) stores nothing: its state is what the graph holds anyway
        stores = update and (not graph or constant_memory) and not (constant_memory and state.diverged(lengths))
        if stores:
            with torch.no_grad():
                new = stored(state, k.detach(), v.detach(), lengths, self.keep, self.sinks)
        if stores and not graph and new.base == state.base:
            keys, values = new.k, new.v
        else:
            keys, values = appended(state.k, k, used, lengths), appended(state.v, v, used, lengths)
        pos = Counters([p + n for p, n in zip(state.pos, lengths)])
        if update and not stores:
            kept = (keys.detach(), values.detach()) if constant_memory else (keys, values)
            # full: backward needs keys and values as they are, after a shorter row too
            full = [keys.shape[1]] * len(pos)
            new = replace(state, pos=pos, k=kept[0], v=kept[1], base=Counters(state.base), filled=full)
            new = trimmed(new, self.keep, self.sinks)
        y = project(self.o_proj, attend(self.config, q, keys, values, used, lengths, state.base, far).flatten(2), ops)
        y = y if across is None else across.total(y)
        if valid is not None:
            y = torch.where(valid, y, 0.0)
        return y, replace(new, pos=pos, base=Counters(new.base)) if update else state

    def _normed(self, norm: nn.Module, t: Tensor, ops: ModuleType) -> Tensor:
        """``norm`` of every head, whose gain all heads of all processes have in common."""
        if self.across is None:
            return norm(t) if self.head_dim % 8 else normed(norm, t, ops)
        gain: Any = norm.weight
        return F.rms_norm(t, (self.head_dim,), self.across.enter(gain), self.config.norm_eps)

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, self.head_dim))

    def rotation(self, pos: list[int], T: int, x: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, 1, D/2] (or [1, ...] for rows at one position), in fp32 (fp64 for fp64). most:
        the position of all tokens after it too."""
        dtype = master_dtype(x.dtype)
        starts = [pos[0]] if len(set(pos)) == 1 else pos
        at = torch.tensor(starts, dtype=torch.long, device=x.device).unsqueeze(1) + torch.arange(T, device=x.device)
        if most is not None:
            at = at.clamp(max=most)
        # angles in fp64 unless asked otherwise: in fp32 they would lose the fraction at positions past a million
        rates = self.rates.to(x.device, non_blocking=True)
        angle = (at.to(rates.dtype).unsqueeze(-1) * rates).unsqueeze(2)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    @property
    def keep(self) -> int | None:
        """Tokens a row may still need: sinks, window, and one segment, by which a learning model may go back.
        None: all."""
        return None if self.window is None else self.sinks + self.window + self.config.segment

    @property
    def farthest(self) -> int | None:
        """The position from which all later queries see the sinks. None: there are no sinks."""
        return self.sinks + self.window - 1 if self.sinks and self.window is not None else None
