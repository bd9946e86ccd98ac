"""A block's attention in a decoder's step in C++ (csrc/cpu/token_attention.h): room in its cache for the token, and the
angles of its position."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..layers.attention import AttentionState, CausalAttention
from ..layers.attention_cache import renewed
from ..ops.attention.cpp import AttentionCall
from ..ops.shared.cpu_library import POINTER, SIZE, address

AHEAD = 128  # positions whose angles are made at once


class AttentionBlock(ctypes.Structure):
    """``TokenAttention`` of csrc/cpu/token.h."""

    _fields_ = [
        ("call", AttentionCall),
        *((n, POINTER) for n in (
            "k", "v", "q_proj", "k_proj", "v_proj", "o_proj", "q_bias", "k_bias", "v_bias", "q_gain", "k_gain",
            "post_gain", "cos", "sin", "far_cos", "far_sin",
        )),
        ("ahead", SIZE),
    ]


class Angles:
    """cos and sin of every row's next ``AHEAD`` positions as ``layer`` makes them, and those that see its sinks."""

    def __init__(self, layer: CausalAttention):
        self._layer, self._start, self._ahead = layer, [-AHEAD], 0
        self._tables: list[Tensor] = []

    @staticmethod
    def key(layer: CausalAttention) -> tuple:
        """Layers of one key have the same angles."""
        return layer.farthest, layer.rates.dtype, *layer.rates.tolist()

    def at(self, pos: list[int]) -> tuple[list[int], int]:
        """Addresses of cos, sin and, with sinks, far_cos and far_sin of row 0, and how far apart rows are."""
        t = pos[0] - self._start[0]
        if not 0 <= t < AHEAD or pos != [s + t for s in self._start]:
            self._make(pos)
            t = 0
        step = 4 * t * self._tables[0].shape[-1]
        return [table.data_ptr() + step for table in self._tables], self._ahead

    def _make(self, pos: list[int]) -> None:
        layer = self._layer
        with torch.inference_mode(False):
            tables = [*layer.rotation(pos, AHEAD, layer.k_proj.weight)]
            if layer.farthest is not None:
                tables += layer.rotation(pos, AHEAD, layer.k_proj.weight, layer.farthest)
        self._start, self._tables = list(pos), tables
        self._ahead = 0 if tables[0].shape[0] == 1 else AHEAD * tables[0].shape[-1]


class Cache:
    """The keys and values of ``state``, to which a step appends a token of every row: what ``to`` says of them."""

    def __init__(self, to: AttentionBlock, layer: CausalAttention, state: AttentionState, angles: Angles):
        self.state, self._to, self._layer, self._angles = state, to, layer, angles
        B, (H, kv_heads), (window, sinks) = state.batch, layer.config.heads, layer.config.sight
        scale = layer.config.attention_scale
        rows = [(ctypes.c_int64 * B)() for _ in range(3)]
        self._used, self._base, ones = rows
        ones[:] = [1] * B
        to.call = AttentionCall(
            B=B, T=1, H=H, Hkv=kv_heads, D=layer.head_dim, window=window or 0, sinks=sinks,
            scale=layer.head_dim**-0.5 if scale is None else scale,
            **dict(zip(("used", "base", "len"), map(ctypes.addressof, rows))),
        )
        self._ones, self._len = [1] * B, ones
        self._at: Tensor | None = None  # the keys that ``to`` points to
        self._new: AttentionState | None = None  # larger storage, which the state gets with the token
        self._claimed = False
        self._point(state)

    def claim(self) -> None:
        """The slots after those that count are the next token's: in the storage as it is, where it has room and no
        other state has written there, else in new storage."""
        state, used = self.state, self.state.used()
        if max(used) < state.k.shape[1] and used == state.filled:
            self._claimed, now = True, state
            state.filled[:] = [u + 1 for u in used]
        else:
            with torch.inference_mode(False):
                token = state.k.new_zeros(state.batch, 1, *state.k.shape[2:])
                now = self._new = renewed(state, token, token, self._ones, self._layer.keep, self._layer.sinks)
            used = now.used()
        if now.k is not self._at:
            self._point(now)
        self._used[:], self._base[:], to = used, now.base, self._to
        tables, to.ahead = self._angles.at(state.pos)
        to.cos, to.sin = tables[:2]
        if len(tables) > 2:
            to.far_cos, to.far_sin = tables[2:]

    def settle(self) -> bool:
        """The token has been read: whether the state has other tensors now. Its ``pos`` is for the caller to move."""
        state, new = self.state, self._new
        if new is not None:
            state.k, state.v, state.filled, state.base[:] = new.k, new.v, new.filled, new.base
        self._claimed, self._new = False, None
        return new is not None

    def undo(self) -> None:
        """It has not."""
        if self._claimed:
            self.state.filled[:] = self.state.used()
        self._claimed, self._new = False, None

    def _point(self, state: AttentionState) -> None:
        (B, slots, *_), to = state.k.shape, self._to
        count = B * slots * to.call.Hkv * to.call.D
        to.k, to.v, to.call.slots = address(state.k, count), address(state.v, count), slots
        self._at = state.k
