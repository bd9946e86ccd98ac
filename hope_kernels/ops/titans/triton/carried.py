"""Which calls the kernel of carry.py serves, what it is told, and every compilation that leads to.

A backend's bits must not depend on how a sequence is cut, so it serves all calls of a layer or none: prefill,
single tokens and pure reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ....config import TitansConfig
from ...shared.triton_build import Specialization
from .carry import carry_kernel
from .carry_common import MEMBERS
from .groups import Biases, Exchange, Progress, Reads, Shared, Weights, Writes
from .tiles import rule_of, shape_of

CHUNKS = (16,)
# Found by compiling: two programs a multiprocessor. With the 168 registers of three a few dozen would spill.
# On sm_100, which has other matrix instructions, some do with 255, and so they do without a base, and for one head
# on sm_120.
REGISTERS, WARPS, ARCHS = 255, 4, (80, 86, 89, 90)


def carried(config: TitansConfig, itemsize: int, arch: int) -> bool:
    """Whether a layer's memories fit: heads of 64 with 64 hidden units, one clock of 16 tokens, operands of
    16 bits, initial weights as the base, and all five memories."""
    return (
        arch in ARCHS and itemsize == 2 and config.head_dim == config.hidden == 64 and config.memory == "mlp"
        and config.self_modifying and config.retention and config.retain_to == "init"
        and config.chunk_memory == config.chunk_other and config.chunk_memory in CHUNKS
        and config.momentum is None and not config.adaptive_q and not config.scalar_skip
    )


def constants(config: TitansConfig, update: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernel."""
    return {
        "UPDATE": update, "C": config.chunk_memory, "shape": shape_of(config),
        "rule": rule_of(config, update),
    }


def options() -> dict[str, int]:
    return {"num_warps": WARPS, "num_stages": 1, "maxnreg": REGISTERS}


def launch(
    told: dict[str, Any], reads: Reads, weights: Weights, pending: Writes, biases: Biases, progress: Progress,
    **numbers: Any,
) -> None:
    """told: ``constants`` and ``options``; numbers: what else the kernel is told at run time."""
    B, T, H, D = reads.x.shape
    exchange, scratch = _buffers(B * H, told["C"], D, told["UPDATE"], reads.x)
    carry_kernel[(B * H * (MEMBERS.value if told["UPDATE"] else 1),)](
        reads=reads, weights=weights, pending=pending, exchange=exchange, biases=biases, progress=progress,
        scratch=scratch, B=B, T=T, **numbers, **told,
    )


def _buffers(groups: int, C: int, D: int, update: bool, like: Tensor) -> tuple[Exchange, Shared]:
    """What the members of ``groups`` (row, head) pairs exchange; a pure read touches none of it."""
    groups = groups if update else 1
    k, keys = torch.empty(groups * 5 * C * D, dtype=like.dtype, device=like.device).split(groups * 4 * C * D)
    sizes = [groups * size for size in (4 * C, 4 * C, 3 * C, C * C)]
    of_tokens = torch.empty(sum(sizes), dtype=torch.float32, device=like.device).split(sizes)
    return Exchange(k, *of_tokens[:2]), Shared(keys, *of_tokens[2:])


def specializations() -> Iterator[Specialization]:
    usual, row = TitansConfig(128, 2), "D=64 N=64 C=16"
    yield _specialization(usual, f"{row} bf16")
    yield _specialization(TitansConfig(64, 1), f"{row} bf16 one head")
    yield _specialization(usual, f"{row} fp16", "fp16")
    yield _specialization(usual, f"{row} bf16 reads only", update=False)
    free = usual.replace(target_norm=False, step_clip=False, activation="gelu")
    yield _specialization(free, f"{row} bf16 free")
    dot = usual.replace(objective="dot", step_clip=False, qk_l2norm=False)
    yield _specialization(dot, f"{row} bf16 dot")
    given = usual.replace(own_values=False, dgd=False, activation="silu", eta_activation="softplus")
    yield _specialization(given, f"{row} bf16 given values")


def _specialization(
    config: TitansConfig, row: str, dtype: str = "bf16", update: bool = True
) -> Specialization:
    """Weights, gates and scratch are fp32, all else is in the input dtype."""
    like = f"*{dtype}"
    signature = {
        "reads": Reads(like, like, like), "weights": Weights(like, like, like, "*fp32", "*fp32", "*fp32"),
        "pending": Writes(like, like, "*fp32", "*fp32", "*fp32"),
        "exchange": Exchange(like, "*fp32", "*fp32"), "biases": Biases(like, like),
        "progress": Progress("*i64", "*i64", "*i64"), "scratch": Shared(like, "*fp32", "*fp32"),
        "B": "i32", "T": "i64", "eta_scale": "fp32", "grad_scale": "fp32",
    }
    return Specialization(
        "titans_carry", carry_kernel, signature, constants(config, update), wants_mma=True, row=row,
        archs=ARCHS, **options(),
    )
