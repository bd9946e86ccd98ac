"""A block's attention as C++ is handed it where many tokens are read at once (csrc/cpu/attention_mixer.h): its weights,
room in its cache, and the angles of the tokens' places."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layers.attention import AttentionState, CausalAttention
from ..layers.attention_cache import roomy, trimmed
from ..ops.attention.cpp import AttentionCall
from ..ops.shared.cpu_library import POINTER, address, row_array
from ..state import Counters

Address = Callable[[Tensor | None, int], int | None]  # of a tensor of so many numbers, which lives on


class AttentionMixer(ctypes.Structure):
    """``AttentionMixer``."""

    _fields_ = [
        *((n, POINTER) for n in ("gain", "q_proj", "k_proj", "v_proj", "o_proj", "q_bias", "k_bias", "v_bias",
                                 "q_gain", "k_gain", "cos", "sin", "far_cos", "far_sin", "k", "v")),
        ("attention", AttentionCall),
    ]


def give_weights(to: AttentionMixer, block: Any, at: Address) -> None:
    """Tells ``to`` what is the same in all readings of ``block``."""
    mixer, d, D = block.mixer, block.config.d_model, block.mixer.head_dim
    H, kv_heads = mixer.config.heads
    to.gain = at(block.norm.weight, d)
    for name, wide in (("q", H * D), ("k", kv_heads * D), ("v", kv_heads * D)):
        module = getattr(mixer, f"{name}_proj")
        setattr(to, f"{name}_proj", at(module.weight, wide * d))
        setattr(to, f"{name}_bias", at(module.bias, wide))
    to.o_proj = at(mixer.o_proj.weight, d * H * D)
    if mixer.q_norm is not None and mixer.k_norm is not None:
        to.q_gain, to.k_gain = at(mixer.q_norm.weight, D), at(mixer.k_norm.weight, D)
    scale, (window, sinks) = mixer.config.attention_scale, mixer.config.sight
    to.attention = AttentionCall(
        H=H, Hkv=kv_heads, D=D, window=window or 0, sinks=sinks, threads=torch.get_num_threads(),
        scale=D**-0.5 if scale is None else scale,
    )


class Caches:
    """Where the next tokens of every row go, T of them, of which ``lengths`` count."""

    def __init__(self, T: int, lengths: list[int]):
        self.T, self.lengths = T, lengths
        self.rotations = 1
        self._held: list[Any] = []  # whatever the library is handed the address of
        self._turns: dict[tuple, tuple[Tensor, Tensor]] = {}  # cos and sin, by rates, places and the last of these

    def give(self, to: AttentionMixer, mixer: CausalAttention, old: AttentionState) -> AttentionState:
        """Tells ``to`` of ``old``, with room for the tokens: the state that is read from and written into."""
        state, D, B = roomy(old, self.lengths), mixer.head_dim, old.batch
        to.cos, to.sin = self._turn(mixer, state.pos, None)
        to.far_cos = to.far_sin = None
        farthest = mixer.farthest
        if farthest is not None and max(p + n for p, n in zip(state.pos, self.lengths)) > farthest + 1:
            to.far_cos, to.far_sin = self._turn(mixer, state.pos, farthest)
        slots, rows = state.k.shape[1], [row_array(of, B) for of in (state.used(), list(state.base))]
        to.k, to.v = (self.at(t, B * slots * to.attention.Hkv * D) for t in (state.k, state.v))
        to.attention.B, to.attention.slots = B, slots
        to.attention.used, to.attention.base = map(ctypes.addressof, rows)
        self._held.append(rows)
        return state

    def at(self, t: Tensor | None, count: int) -> int | None:
        """``address`` of ``t``, which lives on with this."""
        self._held.append(t)
        return address(t, count)

    def _turn(self, mixer: CausalAttention, pos: list[int], most: int | None) -> tuple[int | None, int | None]:
        """cos and sin of every token's angles."""
        key = (tuple(mixer.rates.tolist()), tuple(pos), most)
        if key not in self._turns:
            self._turns[key] = mixer.rotation(pos, self.T, mixer.k_proj.weight, most)
        cos, sin = self._turns[key]
        self.rotations = cos.shape[0]
        count = self.rotations * self.T * mixer.head_dim // 2
        return self.at(cos, count), self.at(sin, count)


def after(mixer: CausalAttention, state: AttentionState, read: list[int]) -> AttentionState:
    """``state`` once ``read`` more tokens are in its cache."""
    pos = Counters([p + n for p, n in zip(state.pos, read)])
    return trimmed(replace(state, pos=pos, base=Counters(state.base)), mixer.keep, mixer.sinks)
