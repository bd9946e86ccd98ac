"""Tokens through all blocks of a model with attention in one call of C++ (csrc/cpu/attention_model.cpp), for readings
without learning on a CPU: the functions that the layers call, without what lies between two of them."""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backend import NO_GRADIENT, Request
from ..layers.attention import AttentionState, CausalAttention
from ..layers.block import HopeAttentionBlock
from ..layers.cms import ContinuumMemory
from ..layers.cms_level import CMSLevel
from ..layers.wrapped import is_hooked, is_plain
from ..model_state import ModelState
from ..ops.attention import backends as attention
from ..ops.attention import cpp as attention_cpp
from ..ops.cms import cpp as cms_cpp
from ..ops.cms.level import Level
from ..ops.cms.matrix import Matrix
from ..ops.linear import backends as linear
from ..ops.linear import cpp as linear_cpp
from ..ops.shared.cpu_library import POINTER, REAL, SIZE, Function, address, row_array
from ..ops.shared.cpu_library import is_plain as readable
from .native_attention_mixer import AttentionMixer, Caches, after, give_weights
from .native_level import KINDS, settled
from .protocol import Model

PIECE = 512  # tokens, of all rows together, that are read at a time: what they are on the way stays in the cache
_PLAIN = (nn.RMSNorm, nn.Linear, nn.ModuleList, nn.ModuleDict, HopeAttentionBlock, ContinuumMemory, CMSLevel,
          CausalAttention)


class _Level(ctypes.Structure):
    _fields_ = [("kind", SIZE), ("N", SIZE), *((n, POINTER) for n in ("gain", "up", "down"))]


class _Block(AttentionMixer):
    _fields_ = [("levels", SIZE), ("level", ctypes.POINTER(_Level))]


class _Call(ctypes.Structure):
    _fields_ = [
        *((n, SIZE) for n in ("B", "T", "d", "blocks", "threads", "piece", "rotations")), ("eps", REAL),
        ("len", POINTER), ("block", ctypes.POINTER(_Block)), ("h", POINTER),
    ]


_read = Function("hope_attention_read", "HopeForCausalLM", POINTER)


def serves(model: Model, state: ModelState, backend: str | None) -> bool:
    """Whether the blocks of ``model`` read here, with what ``state`` has learned."""
    config = model.config
    if backend not in (None, "cpp") or config.mixer != "attention" or config.post_norm or config.d_model % 8:
        return False
    if not model.plain or model.parallel is not None or not settled(state):
        return False
    return all(_served(block, backend, config.norm_eps) for block in model.blocks)


def read(model: Any, h: Tensor, state: ModelState, lengths: list[int]) -> tuple[Tensor, list[Any]]:
    """What ``model.run`` makes of h [B, T, d]: new h and mixers; what it is after a row's ``lengths`` tokens means
    nothing. Raises ValueError for tensors that the library cannot read."""
    h = h.clone(memory_format=torch.contiguous_format)
    (B, T, d), config, threads = h.shape, model.config, torch.get_num_threads()
    reading, blocks, mixers = _Reading(h, lengths), (_Block * len(model.blocks))(), []
    counts = row_array(lengths, B)
    for to, block, old, cms in zip(blocks, model.blocks, cast("list[AttentionState]", state.mixers), state.cms):
        mixers.append(reading.block(to, block, old, [] if cms is None else block.cms.effective_levels(cms)))
    call = _Call(
        B=B, T=T, d=d, blocks=len(blocks), threads=threads, piece=max(PIECE * threads // max(B, 1) // 16, 1) * 16,
        rotations=reading.rotations, eps=config.norm_eps, len=ctypes.addressof(counts),
        block=ctypes.cast(blocks, ctypes.POINTER(_Block)), h=address(h, B * T * d),
    )
    _read(ctypes.addressof(call))
    return h, [after(block.mixer, new, lengths) for block, new in zip(model.blocks, mixers)]


class _Reading(Caches):
    """What the library is handed for h [B, T, d]."""

    def __init__(self, h: Tensor, lengths: list[int]):
        super().__init__(h.shape[1], lengths)
        self.batch, self.width = h.shape[0], h.shape[2]

    def block(self, to: _Block, block: Any, old: AttentionState, levels: list[Level]) -> AttentionState:
        """Fills ``to``; the state that ``block`` reads from and writes into."""
        give_weights(to, block, self.at)
        state, of, d = self.give(to, block.mixer, old), (_Level * len(levels))(), self.width
        for level, at in zip(levels, of):
            at.kind, at.N = KINDS[block.cms.config.mlp], block.cms.config.hidden
            at.gain = self.at(level["norm_gain"], d)
            at.up, at.down = self._rows(level["up"], at.N, d), self._rows(level["down"], d, at.N)
        self._held.append(of)
        to.levels, to.level = len(of), ctypes.cast(of, ctypes.POINTER(_Level))
        return state

    def _rows(self, W: Tensor | Matrix, rows: int, K: int) -> int:
        """The addresses of every row's own matrix."""
        found, B = Matrix.of(W), self.batch
        own, mine = found.own, found.rows or (False,) * B
        shared = self.at(found.shared, rows * K)
        first = None if own is None else self.at(own, B * rows * K)
        addresses = (POINTER * B)(*[shared if first is None or not m else first + 4 * rows * K * b
                                    for b, m in enumerate(mine)])
        self._held.append(addresses)
        return ctypes.addressof(addresses)


def _served(block: nn.Module, backend: str | None, eps: float) -> bool:
    if type(block) is not HopeAttentionBlock or not all(_plain(m, eps) for m in block.modules()):
        return False
    like, mixer, cms = block.norm.weight, block.mixer, block.cms
    request = Request(block.config, like.dtype, like.device, NO_GRADIENT)
    assert isinstance(mixer, CausalAttention)
    if mixer.across is not None or mixer.head_dim % 2 or mixer.q_norm is not None and mixer.head_dim % 8:
        return False
    if linear.resolve(request, backend) is not linear_cpp or attention.resolve(request, backend) is not attention_cpp:
        return False
    if cms is None:
        return True
    c = cms.config
    plain = c.variant != "independent" and c.norm == "rmsnorm" and not c.bias and c.rank is None
    return plain and cms.norm_eps == eps and cms.ops(like.dtype, like.device, backend, inner=False) is cms_cpp


def _plain(module: nn.Module, eps: float) -> bool:
    """Whether ``module`` is as the package makes it, in fp32 on the CPU."""
    if type(module) not in _PLAIN or is_hooked(module) or type(module) is nn.Linear and not is_plain(module, bias=True):
        return False
    if isinstance(module, nn.RMSNorm) and (module.weight is None or module.eps != eps):
        return False
    return all(p is None or readable(p) and p.is_contiguous() for p in module._parameters.values())
