"""Tile choices of the memory's Triton kernel in one table, and every compilation they lead to (benchmarks/compile_report.py).

The table was found by compiling for sm_80 to sm_120: the largest tiles without spills. Nothing in it has been timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ...config import TitansConfig
from ..triton_build import Specialization
from .fast_weights import Layout
from .triton_common import GELU, GELU_TANH, SILU
from .triton_scan import LINE, scan_kernel

WIDTHS, MULTIPLES, CHUNKS = (32, 64, 128), (1, 2, 4), (16, 32, 64, 128, 256)
ACTIVATIONS = {"gelu_tanh": GELU_TANH.value, "gelu": GELU.value, "silu": SILU.value}


class Tiles(NamedTuple):
    """NT hidden units and CT tokens a tile, of the tasks that walk N (read, errors) and of those that own a tile of N."""

    NT: int
    CT: int
    OWN_NT: int
    OWN_CT: int


def tiles(D: int, N: int, C: int, itemsize: int, momentum: bool = False) -> Tiles:
    """For head width D, N hidden units, C tokens a chunk and operands of ``itemsize`` bytes (fp32 products run on FMA units)."""
    wide = D == 128 or itemsize == 4
    CT, NT = min(C, 32 if wide else 64), min(N, 32 if wide else 64)
    walk = 32 if N == 64 else NT  # a loop of one tile spills a word on some architectures
    if momentum:  # s beside the deviations takes as many registers again
        return Tiles(walk, CT if N == 64 else min(C, 32), min(N, 32), min(C, 32))
    return Tiles(walk, CT, NT, min(C, 32))


def warps(D: int) -> int:
    return 8 if D == 128 else 4


class Clock(NamedTuple):
    """Memories M0 .. M1, which commit every C tokens."""

    M0: int
    M1: int
    C: int


def clocks(config: TitansConfig) -> list[Clock]:
    """The layer's clocks, the faster one first; M_memory is number 0."""
    M = len(config.memories)
    if not config.self_modifying or config.chunk_memory == config.chunk_other:
        return [Clock(0, M, config.chunk_memory)]
    return sorted([Clock(0, 1, config.chunk_memory), Clock(1, M, config.chunk_other)], key=lambda c: c.C)


def constants(config: TitansConfig, itemsize: int, update: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernel. They depend on the model only, and on whether anything is learned."""
    layout, both = Layout.of(config), clocks(config)
    fast, slow = both[0], both[1] if len(both) > 1 else Clock(0, 0, both[0].C)
    big = max(config.chunk_memory, config.chunk_other)  # slots of the open chunk
    named = {
        f"{prefix}_{name}": size
        for prefix, clock in (("FAST", fast), ("SLOW", slow))
        for name, size in tiles(config.head_dim, config.hidden, clock.C, itemsize, config.momentum is not None)._asdict().items()
    }
    return named | {
        "UPDATE": update, "PRODUCE": update and config.self_modifying, "FM0": fast.M0, "FM1": fast.M1, "SM0": slow.M0, "SM1": slow.M1,
        "SMALL": fast.C, "BIG": big, "H": config.num_heads, "D": config.head_dim, "N": config.hidden, "MF": len(layout.full),
        "MS": len(layout.scalars), "R": layout.rows, "ACT": ACTIVATIONS[config.activation], "HAS_BASE": config.retain_to == "init",
        "SKIP": layout.skip, "HAS_ALPHA": config.retention, "UNIT_K": config.qk_l2norm, "SOFTPLUS": config.eta_activation == "softplus",
        "OWN": config.own_values, "TARGET_NORM": config.target_norm, "DOT": config.objective == "dot", "DGD": config.dgd,
        "CLIP": config.step_clip, "MOMENTUM": update and config.momentum is not None, "ADAPTIVE_Q": config.adaptive_q,
    }


def scratch_shapes(config: TitansConfig, itemsize: int) -> list[dict[str, tuple[int, ...]]]:
    """Per clock, what one chunk of one (row, head) leaves in scratch; ``a`` in the dtype of the operands, the rest in fp32."""
    layout = Layout.of(config)
    D, N, M, MF, MS = config.head_dim, config.hidden, len(layout.names), len(layout.full), max(1, len(layout.scalars))
    KEYS, VECTORS = (1, 3) if config.momentum is None else (2, 7)
    return [
        {
            "e": (MF, D, C), "es": (MS, C), "e2": (M, C), "a": (M, N, C), "d": (M, N, C),
            "norms": (M, N // tiles(D, N, C, itemsize, config.momentum is not None).OWN_NT, 2, C),
            "keys": (KEYS, C, D), "vectors": (VECTORS, C), "gram": (C, C if config.step_clip else 1), "steps": (M, C),
        }
        for _, _, C in clocks(config)
    ]


def counters(groups: int) -> int:
    """Numbers in the kernel's ``sync`` for ``groups`` (row, head) pairs: a ticket, and their counters."""
    return (1 + groups) * LINE.value


def specializations() -> Iterator[Specialization]:
    """The kernel at the corners of the table and on the rows people use, in bf16; other switches and two clocks on one row each."""
    for config, dtype, row in _rows():
        yield _specialization(constants(config, {"bf16": 2}[dtype], True), warps(config.head_dim), dtype, row)


def _rows() -> Iterator[tuple[TitansConfig, str, str]]:
    def config(D, mult, C, **kw):
        return TitansConfig(2 * D, 2, hidden_mult=mult, **{"chunk_memory": C, "chunk_other": C, **kw})

    for D, mult, C in ((32, 1, 16), (64, 1, 16), (64, 1, 64), (64, 4, 16), (64, 4, 64), (64, 1, 256), (128, 4, 64)):
        yield config(D, mult, C), "bf16", f"D={D} N={D * mult} C={C}"
    yield config(64, 4, 16, chunk_other=64), "bf16", "two clocks"
    yield TitansConfig.preset("nested_learning", d_model=64, chunk_memory=64, chunk_other=64), "bf16", "nested_learning"
    yield TitansConfig.preset("titans", d_model=128, num_heads=2, momentum=None, chunk_memory=64), "bf16", "titans"
    for C in (16, 64):
        yield TitansConfig.preset("titans", d_model=128, num_heads=2, chunk_memory=C), "bf16", f"titans momentum C={C}"
    yield config(64, 4, 64, momentum="learned"), "bf16", "momentum"
    yield config(64, 1, 16, adaptive_q=True), "bf16", "adaptive_q"


# in the input dtype
_INPUTS = ("x_p", "q_p", "o_p", "k_p", "v_p", "a_p", "slow_a_p", "given_k_p", "given_v_p", "given_eta_p", "given_alpha_p",
           "given_beta_p", "base2_p", "base1_p", "base1s_p", "eta_bias_p", "alpha_bias_p")
_WHOLE = {"pos_p": "*i64", "len_p": "*i64", "sync_p": "*i64", "B": "i32", "T": "i64"}


def _specialization(consts: dict, num_warps: int, dtype: str, row: str) -> Specialization:
    signature = {}
    for arg in scan_kernel.arg_names:
        if arg not in consts:
            signature[arg] = _WHOLE.get(arg, f"*{dtype}" if arg in _INPUTS else "*fp32" if arg.endswith("_p") else "fp32")
    return Specialization("titans_scan", scan_kernel, signature, consts, num_warps, 2, wants_mma=True,
                          row=row, archs=(80, 90, 100, 120) if row == "D=64 N=64 C=16" else (80, 90, 100))
