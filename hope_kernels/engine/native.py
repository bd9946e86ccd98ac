"""One token a row through a whole model in one call of C++ (csrc/cpu/token.cpp), for the decoder on a CPU.

A call of PyTorch takes longer than the work of a step has to: here a step is handed nothing but addresses, which
are looked up once and hold until something else has changed a tensor of the state or a weight.
"""

from __future__ import annotations

import ctypes
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import NO_GRADIENT, Request
from ..config import CMSConfig, HopeConfig
from ..layers.block import HopeBlock
from ..layers.cms import ContinuumMemory
from ..layers.cms_level import CMSLevel
from ..layers.titans import SelfModifyingTitans
from ..layers.wrapped import is_hooked, is_plain
from ..model_state import ModelState
from ..ops.cms import cpp as cms_cpp
from ..ops.cms.level import Level
from ..ops.cms.matrix import Matrix
from ..ops.shared import cpu_library
from ..ops.shared.cpu_library import POINTER, SIZE, Function, address
from ..ops.titans import cpp as titans_cpp
from ..ops.titans.cpp import TitansCall, settings
from ..ops.titans.state import Layout, TitansState
from .protocol import Model

NOT_FINITE = 3  # csrc/cpu/token.cpp
_version = attrgetter("_version")
_STATE = ("delta2", "delta1", "delta1s", "pending_k", "pending_v", "pending_eta", "pending_alpha")
_PLAIN = (nn.Embedding, nn.RMSNorm, nn.Linear, nn.ModuleList, nn.ModuleDict, HopeBlock, ContinuumMemory, CMSLevel,
          SelfModifyingTitans)


class _Level(ctypes.Structure):
    _fields_ = [("N", SIZE), *((n, POINTER) for n in ("gain", "up", "down"))]


class _Block(ctypes.Structure):
    _fields_ = [
        *((n, POINTER) for n in ("gain", "conv", "tail", "in_proj", "q_proj", "gate_proj", "out_proj", "out_gain")),
        ("titans", TitansCall), ("packed", POINTER), ("levels", SIZE), ("level", ctypes.POINTER(_Level)),
        ("count", POINTER),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        *((n, SIZE) for n in ("B", "d", "W", "vocab", "blocks", "threads")), ("finite", ctypes.c_int32),
        ("eps", ctypes.c_float), *((n, POINTER) for n in ("ids", "embed", "gain", "head")),
        ("block", ctypes.POINTER(_Block)), ("logits", POINTER), ("work", POINTER),
    ]


_pack = Function("hope_token_pack", "Decoder", POINTER)
_step = Function("hope_token_step", "Decoder", POINTER)
_strips = Function("hope_token_strips", "Decoder", SIZE, SIZE, POINTER, POINTER)

Strips = dict[int, tuple[Tensor, int, Tensor]]  # of a model's matrices, by address: whose, its version, the strips


def unserved_step(model: Model, backend: str | None) -> str | None:
    """Why a step of ``model`` is not one call of C++, or None."""
    titans = model.config.titans
    if titans is None or not titans.self_modifying or titans.scalar_skip or titans.momentum is not None:
        return "serves self-modifying memories without scalar_skip and momentum"
    return unserved(model, backend)


def unserved(model: Model, backend: str | None) -> str | None:
    """Why segments of ``model`` are not read in C++, or None."""
    if backend not in (None, "cpp"):
        return f"backend is {backend!r}"
    config, like = model.config, getattr(model.embed, "weight", None)
    if not isinstance(like, Tensor) or model.parallel is not None:
        return "its weights are not its own"
    if not model.plain:
        return "the model is another class, or hooked"
    return (
        cpu_library.unavailable() or _config_unserved(config) or _placement_unserved(config, like)
        or _modules_unserved(model)
    )


def dense(levels: list[list[Level] | None]) -> bool:
    """Whether every matrix of ``levels`` is written out, with no factors that wait."""
    matrices = [m for of in levels for level in of or () for m in level.values()]
    return all(not isinstance(m, Matrix) or m.left is None for m in matrices)


def _config_unserved(config: HopeConfig) -> str | None:
    if config.mixer == "attention":
        return "serves memories"
    if config.post_norm or config.embed_scale != 1 or config.d_model % 8:
        return "serves plain blocks, embeddings without a scale, and widths that are multiples of 8"
    for cms in config.block_cms:
        if cms is not None and (reason := _cms_unserved(cms)):
            return reason
    return None


def _cms_unserved(cms: CMSConfig) -> str | None:
    if cms.variant == "independent" or cms.norm != "rmsnorm" or cms.bias or cms.rank is not None:
        return "serves CMS levels one behind another, with rmsnorm and full rank, without biases"
    return None


def _placement_unserved(config: HopeConfig, like: Tensor) -> str | None:
    assert config.titans is not None
    reason = titans_cpp.unserved(Request(config.titans, like.dtype, like.device, NO_GRADIENT))
    for cms in config.block_cms:
        reason = reason or (None if cms is None else cms_cpp.unserved(cms, like.dtype, like.device))
    return reason


def _modules_unserved(model: Any) -> str | None:
    for name, module in model.named_modules():
        if module is model:
            continue
        if type(module) not in _PLAIN or is_hooked(module) or type(module) is nn.Linear and not is_plain(module):
            return f"{name}, a {type(module).__name__}, is wrapped, hooked or another module"
        if isinstance(module, nn.RMSNorm) and (module.weight is None or module.eps != model.config.norm_eps):
            return f"{name} is another norm than the configuration's"
        if isinstance(module, ContinuumMemory) and module.norm_eps != model.config.norm_eps:
            return f"{name} has other norms than the configuration's"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return f"{name} changes its weights as it is read"
        for p in module._parameters.values():
            if p is not None and not _plain(p):
                return f"{name} has a weight that is no plain tensor of fp32"
    return None


def _plain(p: Tensor) -> bool:
    return type(p.data) is Tensor and p.dtype == torch.float32 and p.is_contiguous() and not p.is_inference()


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
        self._seen: list[tuple[TitansState, str, Tensor]] = []  # whose, and as what: the tensors that a step writes
        blocks = (_Block * len(model.blocks))()
        for i, (block, mixer, of) in enumerate(zip(model.blocks, state.mixers, levels)):
            assert isinstance(mixer, TitansState)
            self._fill(blocks[i], block, mixer, of, B)
        head = model.embed.weight if model.head is None else model.head.weight
        self._call = _Call(
            B=B, d=d, W=config.titans.conv_window or 0, vocab=V, blocks=len(blocks), threads=self._threads,
            eps=config.norm_eps, ids=tokens.data_ptr(), embed=self._at(model.embed.weight, V * d),
            gain=self._at(model.norm.weight, d), head=self._matrix(head, V, d),
            block=ctypes.cast(blocks, ctypes.POINTER(_Block)),
        )
        self._shape, self._blocks = (B, 1, V), blocks
        self._call.logits = self._new(B * V).data_ptr()
        self._owners, self._names, self._written = (list(of) for of in zip(*self._seen))
        self._versions = [*map(_version, self._written)]
        self._call.work = self._new(floats("hope_token_work", self._call)).data_ptr()
        _pack(ctypes.addressof(self._call))

    def current(self, state: ModelState) -> bool:
        """Whether nothing but this has changed what was packed, since."""
        same = self.mark is not None and self.mark is state.fingerprint and all(map(is_, state.mixers, self._mixers))
        return same and all(map(is_, map(getattr, self._owners, self._names), self._written)) and (
            [*map(_version, self._written)] == self._versions
        )

    def step(self, state: ModelState, finite: bool) -> Tensor | None:
        """Reads the tokens: logits [B, 1, vocab_size]; the mixers' tensors are advanced in place. finite: None, and
        nothing is advanced, where logits are not finite."""
        logits = torch.empty(self._shape, dtype=torch.float32, device="cpu")
        self._pos[:] = state.pos
        self._call.logits, self._call.finite = logits.data_ptr(), finite
        self._call.threads = min(self._threads, torch.get_num_threads())
        outcome = _step.bound()(ctypes.addressof(self._call))
        if outcome == NOT_FINITE:
            return None
        cpu_library.check_outcome(outcome, "Decoder")
        # a graph that has kept one of these tensors must find out
        torch.autograd.graph.increment_version(self._written)
        self._versions = [version + 1 for version in self._versions]
        return logits

    def _new(self, floats: int) -> Tensor:
        t = torch.empty(floats, dtype=torch.float32, device="cpu")
        self._held.append(t)
        return t

    def _at(self, t: Tensor | None, count: int) -> int | None:
        self._held.append(t)
        return address(t, count)

    def _fill(self, to: _Block, block: Any, state: TitansState, levels: list[Level] | None, B: int) -> None:
        mixer, c, d = block.mixer, block.mixer.config, block.mixer.config.d_model
        weights = {n: getattr(mixer, n) for n in ("in_proj", "q_proj", "gate_proj", "out_proj")}
        for name, module in weights.items():
            setattr(to, name, None if module is None else self._matrix(module.weight, d, d))
        W = c.conv_window or 1
        to.gain, to.out_gain = self._at(block.norm.weight, d), self._at(mixer.norm_gain, d)
        to.conv, to.tail = self._at(mixer.conv, W * d), self._at(state.conv_tail, B * (W - 1) * d)
        self._memories(to, mixer, state, B)
        of = (_Level * len(levels or ()))()
        for level, at in zip(levels or (), of):
            at.N, at.gain = block.cms.config.hidden, self._at(level["norm_gain"], d)
            at.up, at.down = self._rows(level["up"], at.N, d, B), self._rows(level["down"], d, at.N, B)
        self._held.append(of)
        to.levels, to.level = len(of), ctypes.cast(of, ctypes.POINTER(_Level))

    def _memories(self, to: _Block, mixer: SelfModifyingTitans, state: TitansState, B: int) -> None:
        c, H, D = mixer.config, mixer.config.num_heads, mixer.config.head_dim
        shapes = Layout.of(c).shapes(B, H)
        slots = B * max(c.chunk_memory, c.chunk_other) * H
        counts = [size_of(s) for s in shapes] + [slots * D, slots * D, slots, slots]
        where: dict[str, Any] = {}
        for name, count in zip(_STATE, counts):
            t = getattr(state, name)
            where[name] = self._at(t, count)
            if t is not None:
                self._seen.append((state, name, t))
        if state.count is not None:
            to.count = address(state.count, B, "count", torch.int64)
            self._seen.append((state, "count", state.count))
        if state.conv_tail is not None:
            self._seen.append((state, "conv_tail", state.conv_tail))
        if c.retain_to == "init":
            for name, t, count in zip(("base2", "base1", "base1s"), mixer.w_init, counts):
                where[name] = self._at(t, count // B if B else 0)
        where |= {"eta_bias": self._at(mixer.eta_bias, H), "alpha_bias": self._at(mixer.alpha_bias, H)}
        to.titans = TitansCall(
            B=B, T=1, H=H, threads=1, update=1, **settings(c), **where, pos=ctypes.addressof(self._pos),
            len=ctypes.addressof(self._ones),
        )
        to.packed = self._new(floats("hope_token_packed", to.titans)).data_ptr()

    def _rows(self, W: Tensor | Matrix, rows: int, K: int, B: int) -> int:
        """The addresses of every row's own matrix."""
        found = Matrix.of(W)
        mine = found.rows or (False,) * B
        shared = None if found.shared is None or all(mine) else self._matrix(found.shared, rows, K)
        own = [shared if found.own is None or not m else self._packed(found.own[b], rows, K).data_ptr()
               for b, m in enumerate(mine)]
        addresses = (ctypes.c_void_p * B)(*own)
        self._held.append(addresses)
        return ctypes.addressof(addresses)

    def _matrix(self, W: Tensor, rows: int, K: int) -> int:
        """Strips of a matrix of the model."""
        known = self._strips.get(W.data_ptr())
        if known is None or known[1] != W._version or known[0].shape != W.shape:
            known = self._strips[W.data_ptr()] = (W, W._version, self._packed(W, rows, K))
        self._held.append(known)
        return known[2].data_ptr()

    def _packed(self, W: Tensor, rows: int, K: int) -> Tensor:
        to = self._new(-(-rows // 8) * 8 * K)
        _strips(rows, K, address(W, rows * K), to.data_ptr())
        return to


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

