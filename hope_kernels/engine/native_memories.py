"""The memories of a model as csrc/cpu/segment.h is handed them, and the states that its readings write."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.shared.cpu_library import POINTER, address, row_array
from ..ops.titans.cpp import TitansCall, settings
from ..ops.titans.state import Layout, TitansState, moved
from ..state import Counters
from .native import size_of
from .native_attention_mixer import Address
from .native_mixer import GATES, MEMORY, SQUARE, constant_momentum


class Memory(ctypes.Structure):
    """``SegmentMemory``."""

    _fields_ = [(n, POINTER) for n in MEMORY]


class Memories:
    """The mixers of a reader's model. Tensors that its readings have written are written again by later ones."""

    def __init__(self):
        self._made: dict[int, tuple[list[TitansState], list[Memory]]] = {}  # mixers after readings: by their id
        self._free: list[list[TitansState]] = []  # of these, those that nobody needs any more

    def prepare(self, to: Any, block: Any, at: Address) -> None:
        """Tells ``to``, a ``SegmentBlock``, what is the same in all readings of ``block``."""
        mixer, c, d = block.mixer, block.mixer.config, block.config.d_model
        for name in SQUARE + GATES:
            module = getattr(mixer, name)
            count = d * d if name in SQUARE else c.num_heads * d
            setattr(to, name, None if module is None else at(module.weight, count))
        to.beta_bias = at(mixer.beta_bias, c.num_heads)
        to.beta = constant_momentum(c)
        to.gain, to.out_gain = at(block.norm.weight, d), at(mixer.norm_gain, d)
        to.conv = at(mixer.conv, (c.conv_window or 1) * d)
        where: dict[str, Any] = {"eta_bias": at(mixer.eta_bias, c.num_heads),
                                 "alpha_bias": at(mixer.alpha_bias, c.num_heads)}
        if c.retain_to == "init":
            shapes = Layout.of(c).shapes(c.num_heads)
            for name, t, shape in zip(("base2", "base1", "base1s"), mixer.w_init, shapes):
                where[name] = at(t, size_of(shape))
        to.titans = TitansCall(H=c.num_heads, update=1, **settings(c), **where)

    def placed(self, call: Any, blocks: Any) -> list[Any]:
        """What ``begin`` is given for every reading of the blocks of ``call``."""
        places = [row_array([0] * call.B, call.B) for _ in blocks]
        for block, pos in zip(blocks, places):
            t = block.titans
            t.B, t.T, t.threads, t.len, t.pos = call.B, call.T, call.threads, call.len, ctypes.addressof(pos)
        return places

    def begin(
        self, places: list[Any], call: Any, blocks: Any, mixers: Sequence[Any], lengths: list[int], several: bool
    ) -> UnderWay:
        """Tells ``blocks`` what a reading goes on from. several: segments, one after another."""
        return UnderWay(self, places, blocks, mixers, several)

    def like(self, mixers: Sequence[TitansState]) -> tuple[list[TitansState], list[Memory]]:
        """States as ``mixers``, whose tensors are to be written, and where these lie."""
        if self._free and self._free[-1][0].batch == mixers[0].batch:
            free = self._free.pop()
            return free, self._made[id(free)][1]
        # normal tensors under inference mode too: they may be written outside it
        with torch.inference_mode(False):
            empty = [{n: _empty(getattr(m, n)) for n in (*MEMORY, "count")} for m in mixers]
            made = [replace(m, **tensors) for m, tensors in zip(mixers, empty)]
        self._made[id(made)] = made, [addresses(m)[0] for m in made]
        return self._made[id(made)]

    def made(self, mixers: Sequence[Any]) -> list[Memory] | None:
        """Where the tensors of ``mixers`` lie, if this has made them."""
        known = self._made.get(id(mixers))
        return None if known is None else known[1]

    def free(self, mixers: Sequence[Any]) -> None:
        """Nobody needs ``mixers``, if a reading has made them."""
        known = self._made.get(id(mixers))
        if known is not None:
            self._free.append(known[0])


class UnderWay:
    """A reading from ``mixers``, which stay as they are. other: ``SegmentsCall.other``."""

    def __init__(
        self, owner: Memories, places: list[Any], blocks: Any, mixers: Sequence[TitansState], several: bool
    ):
        self._owner, self._mixers = owner, mixers
        self._after, to = owner.like(mixers)
        self._spare, others = owner.like(mixers) if several else ([], to)  # of one segment never written
        self.other = (Memory * len(others))(*others)
        known, self._held = owner.made(mixers), []
        if known is None:
            self._held = [addresses(m) for m in mixers]  # tensors that may have been made for the library to read
            known = [at for at, _ in self._held]
        for block, pos, old, at, new in zip(blocks, places, mixers, known, to):
            pos[:], block.before, block.after = old.pos, at, new

    def ended(self, read: list[int], segments: int = 1) -> list[TitansState]:
        """The mixers once ``read`` tokens of every row have been read, in so many segments."""
        found, spare = (self._after, self._spare) if segments % 2 else (self._spare, self._after)
        self._owner.free(spare)
        for old, new in zip(self._mixers, found):
            new.pos = Counters([p + n for p, n in zip(old.pos, read)])
            torch.add(old.count, moved(read, old.count.device), out=new.count)
        return found


def addresses(state: TitansState) -> tuple[Memory, list[Tensor | None]]:
    """Of what a mixer has; and the tensors that lie there. Raises ValueError for what the library cannot read."""
    c, B = state.config, state.batch
    slots = B * max(c.chunk_memory, c.chunk_other) * c.num_heads
    counts = 2 * [size_of(s) for s in Layout.of(c).shapes(B, c.num_heads)]
    counts += [slots * c.head_dim, slots * c.head_dim, slots, slots, slots, B * ((c.conv_window or 1) - 1) * c.d_model]
    held = [None if t is None else t.detach().contiguous() for t in (getattr(state, n) for n in MEMORY)]
    return Memory(*(address(t, count) for t, count in zip(held, counts))), held


def _empty(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
