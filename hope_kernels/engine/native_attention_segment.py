"""The attention of a model as csrc/cpu/segment.h is handed it. What is read is put behind what a cache holds, in slots
that no state counts; a gradient looks at all of them again, so they live as long as the reading."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from ..layers.attention import AttentionState
from .native_attention_mixer import Address, AttentionMixer, Caches, after, give_weights


class Attention:
    """The mixers of a reader's model."""

    def __init__(self):
        self._layers: list[Any] = []
        self._calls: list[AttentionMixer] = []

    def prepare(self, to: Any, block: Any, at: Address) -> None:
        """Takes up ``block``, in order; ``to`` is told where its own is by ``placed``."""
        call = AttentionMixer()
        give_weights(call, block, at)
        self._layers.append(block.mixer)
        self._calls.append(call)

    def placed(self, call: Any, blocks: Any) -> Any:
        """What ``begin`` is given for every reading of the blocks of ``call``."""
        calls = (AttentionMixer * len(blocks))(*self._calls)
        for i, block in enumerate(blocks):
            block.attention = ctypes.addressof(calls) + i * ctypes.sizeof(AttentionMixer)
        return calls

    def begin(
        self, calls: Any, call: Any, blocks: Any, mixers: Sequence[Any], lengths: list[int], several: bool
    ) -> UnderWay:
        """Tells ``calls`` what a reading goes on from. several: segments, one after another."""
        return UnderWay(self._layers, calls, call, mixers, lengths)

    def free(self, mixers: Sequence[Any]) -> None:
        """Nobody needs ``mixers``: nothing is ever written again where they are."""


class UnderWay:
    """A reading from ``mixers``, which stay as they are. other: ``SegmentsCall.other``, which it has no use for."""

    other = (ctypes.c_void_p * 0)()

    def __init__(
        self, layers: list[Any], calls: Any, call: Any, mixers: Sequence[AttentionState], lengths: list[int]
    ):
        self._layers, self._lengths, self._caches = layers, lengths, Caches(call.stride, lengths)
        self._states = [self._caches.give(*of) for of in zip(calls, layers, mixers)]
        call.rotations = self._caches.rotations

    def ended(self, read: list[int], segments: int = 1) -> list[AttentionState]:
        """The mixers once ``read`` tokens of every row have been read, in so many segments."""
        for state in self._states if read != self._lengths else ():
            # slots for tokens that were not read are nobody's
            state.filled[:] = [u + r if n else f for u, r, n, f in zip(state.used(), read, self._lengths, state.filled)]
        return [after(layer, state, read) for layer, state in zip(self._layers, self._states)]
