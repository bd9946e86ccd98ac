"""Causal softmax attention with a key-value cache that obeys the same streaming contract as the memories: RoPE, grouped heads, window."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HopeConfig
from ..ops.check import check_lengths, check_placement, check_state, check_tensor, check_values
from ..state import Counters, State

BLOCK = 512  # queries per masked product: bounds the mask at BLOCK x keys


@dataclass(eq=False)
class AttentionState(State):
    """Keys and values of B sequences: k, v [B, capacity, Hkv, D], input dtype, keys already rotated.

    Row b holds the tokens base[b] .. pos[b]-1 in its slots 0 .. pos[b]-base[b]-1; slots behind them hold no meaning. The buffers are
    append-only: a slot that counts is never written again, a fuller or shorter cache is new storage. So ``snapshot`` copies nothing.
    """

    k: Tensor
    v: Tensor
    base: Counters

    ACTIVATIONS = frozenset({"k", "v"})

    def used(self) -> list[int]:
        return [p - b for p, b in zip(self.pos, self.base)]

    def snapshot(self):
        """Shares the storage. It may be read on from (in grad mode, which appends elsewhere), not advanced beside the original."""
        return replace(self, pos=Counters(self.pos), base=Counters(self.base))

    def merge(self, other, rows: list[bool]):
        """Of two states of one history: the storage of ``other``, the later one, which holds the tokens of both."""
        pos = Counters(o if r else p for p, o, r in zip(self.pos, other.pos, rows))
        return replace(other, pos=pos, base=Counters(other.base))

    def assign(self, new):
        """By reference: a snapshot may share the old storage."""
        self.pos[:], self.base[:], self.k, self.v = new.pos, new.base, new.k, new.v
        return self


class CausalAttention(nn.Module):
    """y = W_o softmax(rope(q) rope(k)^T / sqrt(D)) v over the last ``window`` tokens (all if None), D = d_model / num_heads.

    ``num_kv_heads`` key heads serve num_heads / num_kv_heads query heads each. RoPE in the half-split convention of Llama, at the
    token's position in its own sequence. ``attn(x, state, lengths, update)`` returns ``(y, state)``.
    """

    def __init__(self, config: HopeConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        d = config.d_model
        self.head_dim = d // config.num_heads
        kv = config.num_kv_heads * self.head_dim
        kw = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(d, d, bias=config.attention_bias, **kw)
        self.k_proj = nn.Linear(d, kv, bias=config.attention_bias, **kw)
        self.v_proj = nn.Linear(d, kv, bias=config.attention_bias, **kw)
        self.o_proj = nn.Linear(d, d, bias=False, **kw)
        for module in self.children():
            nn.init.normal_(module.weight, std=d**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def init_state(self, batch: int, device=None, dtype: torch.dtype | None = None) -> AttentionState:
        """State of ``batch`` sequences that have read nothing; its buffers grow as it reads."""
        w = self.k_proj.weight
        empty = torch.zeros(batch, 0, self.config.num_kv_heads, self.head_dim, device=device or w.device, dtype=dtype or w.dtype)
        zero = [0] * batch
        return AttentionState(Counters(zero), self.config, empty, empty.clone(), Counters(zero), owner=self)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, lengths=None, update: bool = True, backend: str | None = None,
        *, check_finite: bool = False,
    ) -> tuple[Tensor, AttentionState]:
        """Reads T tokens per row: x [B, T, d_model] -> y [B, T, d_model]; arguments and errors as in ``SelfModifyingTitans.forward``.

        ``backend`` is accepted for that layer's sake; attention is PyTorch's scaled_dot_product_attention.
        """
        name = "CausalAttention"
        weight = self.k_proj.weight
        check_tensor(name, "x", x, ("B", "T", self.config.d_model), dtype=weight.dtype, device=weight.device)
        lengths = check_lengths(name, lengths, x.shape[0], x.shape[1])
        if check_finite:
            check_values(name, "x", x, lengths)
        given = state
        if state is None:
            state = self.init_state(x.shape[0])
        check_state(name, state, AttentionState, self.config, x.shape[0])
        check_placement(name, state, x.dtype, x.device)
        state.bind(self, name)
        y, new = self.scan(x, state, lengths, update=update)
        if given is None or torch.is_grad_enabled():
            return y, new
        return y, given.assign(new)

    def scan(
        self, x: Tensor, state: AttentionState, lengths: list[int], *, update: bool = True, backend: str | None = None,
        constant_memory: bool = False,
    ) -> tuple[Tensor, AttentionState]:
        """``forward`` without its checks. Without a graph, new keys are appended to the given storage, behind all that counts.

        constant_memory: the graph runs through this call's keys and values; the returned state is detached.
        """
        T = x.shape[1]
        if not any(lengths):
            return torch.zeros_like(x), state
        q, k, v = self._heads(self.q_proj(x)), self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        cos, sin = self._rotation(state.pos, T, x)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        used = state.used()
        graph = torch.is_grad_enabled()
        new = state
        if graph or not update:
            keys, values = _appended(state.k, k, used, lengths), _appended(state.v, v, used, lengths)
            if update and not constant_memory:
                new = replace(state, k=keys, v=values)
        if update and (not graph or constant_memory):
            with torch.no_grad():
                new = self._stored(state, k.detach(), v.detach(), used, lengths)
            if not graph:
                # new storage may start at a later token
                keys, values, used = new.k, new.v, new.used()
        y = self._attend(q, keys, values, used, lengths)
        y = self.o_proj(y.flatten(2))
        if min(lengths, default=T) < T:
            y = torch.where((torch.arange(T, device=x.device) < torch.tensor(lengths, device=x.device).unsqueeze(1)).unsqueeze(-1), y, 0.0)
        if not update:
            return y, state
        return y, replace(new, pos=Counters(p + n for p, n in zip(state.pos, lengths)), base=Counters(new.base))

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, self.head_dim))

    def _rotation(self, pos: list[int], T: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, 1, D/2] (or [1, ...] for rows at one position), computed in fp32 (fp64 for fp64)."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        D = self.head_dim
        rate = self.config.rope_theta ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float64) / D)
        starts = [pos[0]] if len(set(pos)) == 1 else pos
        at = torch.tensor(starts, device=x.device, dtype=torch.float64).unsqueeze(1) + torch.arange(T, device=x.device)
        # angles in fp64: in fp32 they would lose the fraction at positions past a million
        angle = (at.unsqueeze(-1) * rate).unsqueeze(2)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _stored(self, state: AttentionState, k: Tensor, v: Tensor, used: list[int], lengths: list[int]) -> AttentionState:
        """The cache with k, v appended, in the given storage where it has room."""
        need = max((u + n for u, n in zip(used, lengths)), default=0)
        if state.k.is_inference() and not torch.is_inference_mode_enabled():
            state = replace(state, k=state.k.clone(), v=state.v.clone())
        if need > state.k.shape[1]:
            state = self._fitted(state, used, lengths)
            used = state.used()
        rows, slots, tokens = _places(used, lengths, k.device)
        state.k[rows, slots] = k[rows, tokens]
        state.v[rows, slots] = v[rows, tokens]
        return state

    def _fitted(self, state: AttentionState, used: list[int], lengths: list[int]) -> AttentionState:
        """New storage with room for this call and as much again; with a window, without the tokens that nothing can reach any more."""
        drop = [0] * len(used)
        if self.config.window is not None:
            # a learning model may go back by one segment
            keep = self.config.window + self.config.segment
            drop = [max(u - keep, 0) for u in used]
        need = max(u - d + n for u, d, n in zip(used, drop, lengths))
        capacity = max(64, need + (need if self.config.window is None else max(self.config.window, max(lengths))))

        def moved(t: Tensor) -> Tensor:
            fresh = t.new_zeros(t.shape[0], capacity, *t.shape[2:])
            for b, (u, d) in enumerate(zip(used, drop)):
                fresh[b, : u - d] = t[b, d:u]
            return fresh

        return replace(state, k=moved(state.k), v=moved(state.v), base=Counters(b + d for b, d in zip(state.base, drop)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, used: list[int], lengths: list[int]) -> Tensor:
        """q [B, T, H, D] against slots of k, v [B, S, Hkv, D]; query t of row b stands at slot used[b] + t."""
        T, window = q.shape[1], self.config.window
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = self.config.num_kv_heads != self.config.num_heads
        level = len(set(used)) == 1
        if level and used[0] == 0 and T <= k.shape[2] and (window is None or T <= window):
            return F.scaled_dot_product_attention(q, k[:, :, :T], v[:, :, :T], is_causal=True, enable_gqa=grouped).transpose(1, 2)
        start = torch.tensor(used, device=q.device).view(-1, 1, 1)
        # padding looks where the row's last token does: a query that sees nothing would be NaN
        last = torch.tensor([max(u + n - 1, 0) for u, n in zip(used, lengths)], device=q.device).view(-1, 1, 1)
        parts = []
        for a in range(0, T, BLOCK):
            b = min(a + BLOCK, T)
            low = max(0, min(u + min(a, n - 1 if n else 0) for u, n in zip(used, lengths)) - window + 1) if window is not None else 0
            high = min(max(used) + b, k.shape[2])
            place = (start + torch.arange(a, b, device=q.device).view(1, -1, 1)).minimum(last)
            slot = torch.arange(low, high, device=q.device)
            seen = slot <= place
            if window is not None:
                seen = seen & (slot > place - window)
            parts.append(F.scaled_dot_product_attention(
                q[:, :, a:b], k[:, :, low:high], v[:, :, low:high], attn_mask=seen.unsqueeze(1), enable_gqa=grouped))
        return torch.cat(parts, 2).transpose(1, 2)


def _rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on t [B, T, H, D]: pairs (i, i + D/2) turned by the token's angle i."""
    a, b = t.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(t.dtype)


def _places(used: list[int], lengths: list[int], device) -> tuple[Tensor, Tensor, Tensor]:
    """(row, slot, token) of every new token."""
    rows = [b for b, n in enumerate(lengths) for _ in range(n)]
    slots = [u + t for u, n in zip(used, lengths) for t in range(n)]
    tokens = [t for n in lengths for t in range(n)]
    return tuple(torch.tensor(i, dtype=torch.long, device=device) for i in (rows, slots, tokens))


def _appended(old: Tensor, new: Tensor, used: list[int], lengths: list[int]) -> Tensor:
    """Out of place: old's counted slots followed by new's counted tokens, per row; differentiable in both."""
    if len(set(used)) == 1 and len(set(lengths)) == 1:
        return torch.cat([old[:, : used[0]], new[:, : lengths[0]]], 1)
    width = max((u + n for u, n in zip(used, lengths)), default=0)
    padded = F.pad(old[:, :width], (0, 0, 0, 0, 0, max(width - old.shape[1], 0)))
    rows, slots, tokens = _places(used, lengths, old.device)
    return padded.index_put((rows, slots), new[rows, tokens])
