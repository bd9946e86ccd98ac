"""One token a row through a whole model in one call of C++ (csrc/cpu/token.cpp), for the decoder on a CPU.

A call of PyTorch takes longer than the work of a step has to: here a step is handed nothing but addresses, which
are looked up once and hold until something else has changed a tensor of the state or a weight.
"""

from __future__ import annotations

import ctypes
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from ..config import HopeConfig
from ..identity import weighted_sum
from ..layers.attention import AttentionState
from ..model_state import ModelState
from ..ops.cms.level import Level
from ..ops.cms.matrix import Matrix
from ..ops.shared import cpu_library
from ..ops.shared.cpu_library import POINTER, REAL, SIZE, Function, address
from ..ops.titans.cpp import TitansCall, settings
from ..ops.titans.state import Layout, TitansState
from ..state import State
from .native_cache import Angles, AttentionBlock, Cache
from .native_level import KINDS, LevelLowRank, LevelVectors, low_rank_of, mixes, shares, vectors_of
from .native_mixer import GATES, MEMORY, SQUARE, constant_momentum
from .native_served import unserved

__all__ = ["NativeStep", "Strips", "dense", "floats", "size_of", "strips_of", "unserved", "window"]

NOT_FINITE = 3  # csrc/cpu/token.cpp
_version = attrgetter("_version")
_STATE = MEMORY[:-1]  # but for the tail of the convolution


class _Level(ctypes.Structure):
    _fields_ = [("kind", SIZE), ("N", SIZE), ("vectors", LevelVectors),
                *((n, POINTER) for n in ("up", "gate", "down")), ("low", LevelLowRank), ("share", REAL)]


class _Memories(ctypes.Structure):
    _fields_ = [
        *((n, POINTER) for n in ("conv", "tail", *SQUARE, *GATES, "beta_bias")), ("beta", ctypes.c_float),
        ("out_gain", POINTER), ("post_gain", POINTER), ("titans", TitansCall), ("packed", POINTER), ("count", POINTER),
    ]


class _Block(ctypes.Structure):
    _fields_ = [
        ("gain", POINTER), ("memories", ctypes.POINTER(_Memories)), ("attention", ctypes.POINTER(AttentionBlock)),
        ("levels", SIZE), ("level", ctypes.POINTER(_Level)), ("mixture", SIZE),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        *((n, SIZE) for n in ("B", "d", "W", "vocab", "blocks", "threads")), ("finite", ctypes.c_int32),
        ("eps", REAL), ("scale", REAL), *((n, POINTER) for n in ("ids", "embed", "gain", "head")),
        ("block", ctypes.POINTER(_Block)), ("logits", POINTER), ("work", POINTER),
    ]


_pack = Function("hope_token_pack", "Decoder", POINTER)
_step = Function("hope_token_step", "Decoder", POINTER)
_strips = Function("hope_token_strips", "Decoder", SIZE, SIZE, POINTER, POINTER)


class Strip(NamedTuple):
    """Of a matrix: the matrix, its version and the sum of its bytes when they were packed, the strips."""

    of: Tensor
    version: int
    sum: Tensor
    strips: Tensor


class Strips(dict[int, Strip]):
    """Of a model's matrices, by address."""


_living: WeakKeyDictionary[Any, ref[Strips]] = WeakKeyDictionary()  # by model


def strips_of(model: Any) -> Strips:
    """What a new decoder of ``model`` has in common with those that are still there: strips of matrices whose bytes are
    the same, which is looked at, as not every edit moves a version."""
    known = _living.get(model)
    strips, fresh = known and known(), Strips()
    for at, strip in (strips or {}).items():
        if strip.version == strip.of._version and torch.equal(strip.sum, weighted_sum(strip.of)):
            fresh[at] = strip
    if strips is not None and len(fresh) == len(strips):
        return strips
    _living[model] = ref(fresh)
    return fresh


def dense(model: Any, levels: list[list[Level] | None]) -> bool:
    """Whether no matrix of ``levels``, as ``model.levels`` has them, has factors that wait to be folded into it."""
    whole = [of or () for block, of in zip(model.blocks, levels) if of is None or block.cms.config.rank is None]
    return all(not isinstance(m, Matrix) or m.left is None for of in whole for level in of for m in level.values())


class NativeStep:
    """What a step of ``model`` reads and writes. levels: the CMS weights in force, as ``model.levels`` has them."""

    def __init__(
        self, model: Any, state: ModelState, levels: list[list[Level] | None], tokens: Tensor, strips: Strips
    ):
        """tokens: [B, 1] int64, where every step finds its tokens. strips: of earlier steps; some may join. Raises
        ValueError for tensors that the library cannot read."""
        self._strips = strips
        config, B, d, V = model.config, state.batch, model.config.d_model, model.config.vocab_size
        self.mark = state.fingerprint  # of the model's weights as they are now
        self._held: list[Any] = [tokens, levels]  # whatever the library is handed the address of
        self._pos = (ctypes.c_int64 * B)(*state.pos)
        self._ones = (ctypes.c_int64 * B)(*[1] * B)
        self._threads = torch.get_num_threads()  # that the work space is for
        self._mixers = list(state.mixers)
        self._seen: list[tuple[State, str]] = []  # whose, and as what: the tensors that a step writes
        self._caches: list[Cache] = []
        self._angles: dict[tuple, Angles] = {}
        blocks = (_Block * len(model.blocks))()
        for to, block, mixer, of in zip(blocks, model.blocks, state.mixers, levels):
            to.gain = self._at(block.norm.weight, d)
            if isinstance(mixer, TitansState):
                self._memories(to, block, mixer, B)
            else:
                self._attention(to, block, mixer)
            self._levels(to, block, of, B)
        head = model.embed.weight if model.head is None else model.head.weight
        self._call = _Call(
            B=B, d=d, W=window(config), vocab=V, blocks=len(blocks), threads=self._threads, eps=config.norm_eps,
            scale=getattr(model.embed, "scale", 1.0), ids=tokens.data_ptr(), embed=self._at(model.embed.weight, V * d),
            gain=self._at(model.norm.weight, d), head=self._matrix(head, V, d),
            block=ctypes.cast(blocks, ctypes.POINTER(_Block)),
        )
        self._shape, self._blocks = (B, 1, V), blocks
        self._call.logits = self._new(B * V).data_ptr()
        self._owners, self._names = (list(of) for of in zip(*self._seen))
        self._look()
        self._call.work = self._new(floats("hope_token_work", self._call)).data_ptr()
        _pack(ctypes.addressof(self._call))

    def current(self, state: ModelState) -> bool:
        """Whether nothing but this has changed what was packed, since."""
        same = self.mark is not None and self.mark is state.fingerprint and all(map(is_, state.mixers, self._mixers))
        return same and all(map(is_, map(getattr, self._owners, self._names), self._written)) and (
            [*map(_version, self._written)] == self._versions
        )

    def ready(self, state: ModelState, finite: bool) -> Tensor:
        """The logits [B, 1, vocab_size], which ``step`` will make of the tokens. finite: it reads nothing where they
        are not."""
        logits = self._logits = torch.empty(self._shape, dtype=torch.float32, device="cpu")
        self._pos[:] = state.pos
        self._call.logits, self._call.finite = logits.data_ptr(), finite
        self._call.threads = min(self._threads, torch.get_num_threads())
        return logits

    def step(self) -> bool:
        """Reads the tokens, and advances the memories' tensors in place, or nothing where logits are not finite:
        whether it has. Then ``ended`` is to be told so."""
        for cache in self._caches:
            cache.claim()
        outcome = _step.bound()(ctypes.addressof(self._call))
        if outcome != NOT_FINITE:
            cpu_library.check_outcome(outcome, "Decoder")
        return outcome == 0

    def ended(self, read: bool) -> None:
        """May be told again."""
        grown = [cache.settle() if read else cache.undo() for cache in self._caches]
        if not read:
            return
        if any(grown):
            self._look()
        # a graph that has kept one of these tensors must find out
        torch.autograd.graph.increment_version(self._written)
        self._versions = [version + 1 for version in self._versions]

    def _look(self) -> None:
        self._written = [*map(getattr, self._owners, self._names)]
        self._versions = [*map(_version, self._written)]

    def _new(self, floats: int) -> Tensor:
        t = torch.empty(floats, dtype=torch.float32, device="cpu")
        self._held.append(t)
        return t

    def _at(self, t: Tensor | None, count: int) -> int | None:
        self._held.append(t)
        return address(t, count)

    def _memories(self, block: _Block, of: Any, state: TitansState, B: int) -> None:
        mixer, to = of.mixer, _Memories()
        c, H, D, d = mixer.config, mixer.config.num_heads, mixer.config.head_dim, mixer.config.d_model
        block.memories = ctypes.pointer(to)
        self._held.append(to)
        for name in SQUARE + GATES:
            module: Any = getattr(mixer, name)
            setattr(to, name, None if module is None else self._matrix(module.weight, d if name in SQUARE else H, d))
        to.beta_bias, to.beta = self._at(mixer.beta_bias, H), constant_momentum(c)
        W = c.conv_window or 1
        to.out_gain, to.conv = self._at(mixer.norm_gain, d), self._at(mixer.conv, W * d)
        to.post_gain = self._post_gain(of)
        to.tail = self._at(state.conv_tail, B * (W - 1) * d)
        shapes = Layout.of(c).shapes(B, H)
        slots = B * max(c.chunk_memory, c.chunk_other) * H
        counts = 2 * [size_of(s) for s in shapes] + [slots * D, slots * D, slots, slots, slots]
        where: dict[str, Any] = {}
        for name, count in zip(_STATE, counts):
            t = getattr(state, name)
            where[name] = self._at(t, count)
            if t is not None:
                self._seen.append((state, name))
        if state.count is not None:
            to.count = address(state.count, B, "count", torch.int64)
            self._seen.append((state, "count"))
        if state.conv_tail is not None:
            self._seen.append((state, "conv_tail"))
        if c.retain_to == "init":
            for name, t, count in zip(("base2", "base1", "base1s"), mixer.w_init, counts):
                where[name] = self._at(t, count // B if B else 0)
        where |= {"eta_bias": self._at(mixer.eta_bias, H), "alpha_bias": self._at(mixer.alpha_bias, H)}
        to.titans = TitansCall(
            B=B, T=1, H=H, threads=1, update=1, **settings(c), **where, pos=ctypes.addressof(self._pos),
            len=ctypes.addressof(self._ones),
        )
        to.packed = self._new(floats("hope_token_packed", to.titans)).data_ptr()

    def _attention(self, block: _Block, of: Any, state: AttentionState) -> None:
        layer, to = of.mixer, AttentionBlock()
        block.attention = ctypes.pointer(to)
        self._held.append(to)
        d, D, (H, kv_heads) = layer.config.d_model, layer.head_dim, layer.config.heads
        for name, rows in (("q_proj", H * D), ("k_proj", kv_heads * D), ("v_proj", kv_heads * D)):
            module = getattr(layer, name)
            setattr(to, name, self._matrix(module.weight, rows, d))
            setattr(to, f"{name[0]}_bias", self._at(module.bias, rows))
        to.o_proj = self._matrix(layer.o_proj.weight, d, H * D)
        if layer.q_norm is not None:
            to.q_gain, to.k_gain = self._at(layer.q_norm.weight, D), self._at(layer.k_norm.weight, D)
        to.post_gain = self._post_gain(of)
        angles = self._angles.setdefault(Angles.key(layer), Angles(layer))
        self._caches.append(Cache(to, layer, state, angles))
        self._seen += [(state, "k"), (state, "v")]

    def _post_gain(self, block: Any) -> int | None:
        return None if block.post_norm is None else self._at(block.post_norm.weight, block.config.d_model)

    def _levels(self, to: _Block, block: Any, levels: list[Level] | None, B: int) -> None:
        found = (_Level * len(levels or ()))()
        to.mixture = mixes(block.cms)
        for l, (level, at, share) in enumerate(zip(levels or (), found, shares(block.cms))):
            c, d = block.cms.config, block.cms.config.d_model
            at.kind, at.N, at.share = KINDS[c.mlp], c.hidden, share
            at.vectors = vectors_of(level, c, self._at)
            like = Matrix.of(level["up"]).shared
            at.low = low = low_rank_of(c, l, like, lambda S: self._matrix(S, *S.shape))
            for name in c.matrices:
                W, (rows, K) = Matrix.of(level[name]), (d, at.N) if name == "down" else (at.N, d)
                setattr(at, name, self._rows(W, rows, K, B))
                if low.rank:
                    setattr(at.low, name, self._learned(W, rows, low.rank, B))
        self._held.append(found)
        to.levels, to.level = len(found), ctypes.cast(found, ctypes.POINTER(_Level))

    def _rows(self, found: Matrix, rows: int, K: int, B: int) -> int:
        """The addresses of every row's own matrix."""
        mine = found.rows or (False,) * B
        shared = None if found.shared is None or all(mine) else self._matrix(found.shared, rows, K)
        return self._addresses([
            shared if found.own is None or not m else self._packed(found.own[b], rows, K).data_ptr()
            for b, m in enumerate(mine)
        ])

    def _learned(self, found: Matrix, rows: int, rank: int, B: int) -> int:
        """The addresses of every row's L [rows, rank], for ``found`` = shared + L S; None where it is zero."""
        if found.left is None:
            return self._addresses([None] * B)
        held = [L if bool(L.any()) else None for L in found.left.mT.contiguous()]
        return self._addresses([None if L is None else self._packed(L, rows, rank).data_ptr() for L in held])

    def _addresses(self, found: list[int | None]) -> int:
        addresses = (ctypes.c_void_p * len(found))(*found)
        self._held.append(addresses)
        return ctypes.addressof(addresses)

    def _matrix(self, W: Tensor, rows: int, K: int) -> int:
        """Strips of a matrix of the model."""
        known = self._strips.get(W.data_ptr())
        same = known is not None and known.of.data_ptr() == W.data_ptr() and known.of.shape == W.shape
        if known is None or not same or known.version != W._version:
            known = Strip(W, W._version, weighted_sum(W), self._packed(W, rows, K))
            self._strips[W.data_ptr()] = known
        self._held.append(known)
        return known.strips.data_ptr()

    def _packed(self, W: Tensor, rows: int, K: int) -> Tensor:
        to = self._new(-(-rows // 8) * 8 * K)
        _strips(rows, K, address(W, rows * K), to.data_ptr())
        return to


def window(config: HopeConfig) -> int:
    """Of the memories' convolution; 0 where there is none."""
    return 0 if config.titans is None else config.titans.conv_window or 0


def floats(name: str, call: ctypes.Structure) -> int:
    """What the library's function ``name`` says of a buffer's size. Raises ValueError."""
    function = getattr(cpu_library.library(), name)
    function.restype = SIZE
    found = function(ctypes.byref(call))
    if found < 0:
        cpu_library.check_outcome(2, "Decoder")
    return found


def size_of(shape: tuple[int, ...] | None) -> int:
    n = 1
    for extent in shape or (0,):
        n *= extent
    return n

