"""Tile choices of the memory's Triton kernels in one table, and every compilation they lead to (benchmarks/compile_report.py).

The table was found by compiling for sm_80 to sm_120: the largest tiles without spills. Nothing in it has been timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ...config import TitansConfig
from ..triton_build import Specialization
from .fast_weights import Layout
from .triton_common import GELU, GELU_TANH, SILU

WIDTHS, MULTIPLES, CHUNKS = (32, 64, 128), (1, 2, 4), (16, 32, 64, 128, 256)
ACTIVATIONS = {"gelu_tanh": GELU_TANH.value, "gelu": GELU.value, "silu": SILU.value}


class Tiles(NamedTuple):
    """NT hidden units and CT tokens a tile, warps: of the kernels that walk N (read, errors), and of those that own a tile of N."""

    NT: int
    CT: int
    warps: int
    own_NT: int
    own_CT: int
    own_warps: int


def tiles(D: int, N: int, C: int, itemsize: int) -> Tiles:
    """For head width D, N hidden units, C tokens a tile at most and operands of ``itemsize`` bytes (fp32 products run on FMA units)."""
    wide = D == 128 or itemsize == 4
    CT, NT = min(C, 32 if wide else 64), min(N, 32 if wide else 64)
    walk = 32 if N == 64 else NT  # a loop of one tile spills a word on some architectures
    warps = 8 if D == 128 else 4
    return Tiles(walk, CT, 2 if N == 32 else warps, NT, min(C, 32), warps)


def chunks_of(config: TitansConfig) -> tuple[int, int]:
    """(faster, slower) period of the layer's two clocks."""
    return min(config.chunk_memory, config.chunk_other), max(config.chunk_memory, config.chunk_other)


def constants(config: TitansConfig, itemsize: int) -> dict[str, dict[str, Any]]:
    """Compile-time arguments of every kernel but those of a commit's group (``group_constants``). They depend on the model only."""
    layout = Layout.of(config)
    small, big = chunks_of(config)
    t = tiles(config.head_dim, config.hidden, small, itemsize)
    shape = {"H": config.num_heads, "D": config.head_dim, "N": config.hidden, "MF": len(layout.full), "MS": len(layout.scalars),
             "R": layout.rows, "BIG": big, "ACT": ACTIVATIONS[config.activation], "HAS_BASE": config.retain_to == "init",
             "SKIP": layout.skip}
    slots = {"H": config.num_heads, "D": config.head_dim, "BIG": big, "HAS_ALPHA": config.retention}
    return {
        "read": shape | {"SMALL": small, "CT": t.CT, "NT": t.NT, "UNIT_K": config.qk_l2norm,
                         "SOFTPLUS": config.eta_activation == "softplus", "num_warps": t.warps},
        "append": slots | {"SMALL": small, "CT": min(small, 16), "num_warps": 4},
        "close": slots | {"CT": 16, "num_warps": 4},
    }


def group_constants(config: TitansConfig, itemsize: int, M0: int, M1: int, C: int) -> dict[str, dict[str, Any]]:
    """Compile-time arguments of a commit of memories M0 .. M1, C tokens a chunk."""
    t = tiles(config.head_dim, config.hidden, C, itemsize)
    shape = constants(config, itemsize)["read"]
    common = {k: shape[k] for k in ("H", "D", "N", "MF", "MS", "R", "BIG")} | {"M0": M0, "C": C}
    acts = {"ACT": ACTIVATIONS[config.activation], "HAS_BASE": config.retain_to == "init"}
    skip = {"SKIP": Layout.of(config).skip}
    rule = {"DGD": config.dgd, "CLIP": config.step_clip}
    own = {"CT": t.own_CT, "NT": t.own_NT, "num_warps": t.own_warps}
    return {
        "errors": common | acts | skip | rule | {
            "M1": M1, "CT": t.CT, "NT": t.NT, "num_warps": t.warps, "HAS_ALPHA": config.retention, "OWN": config.own_values,
            "TARGET_NORM": config.target_norm, "DOT": config.objective == "dot"},
        "hidden": common | acts | own | {"CLIP": config.step_clip},
        "update": common | skip | rule | own,
    }


def groups(config: TitansConfig) -> list[tuple[int, int, int]]:
    """(M0, M1, period) of the memories that commit together; M_memory is number 0."""
    M = len(config.memories)
    if not config.self_modifying or config.chunk_memory == config.chunk_other:
        return [(0, M, config.chunk_memory)]
    return [(0, 1, config.chunk_memory), (1, M, config.chunk_other)]


def specializations() -> Iterator[Specialization]:
    """Every kernel at the corners of the table and on the rows people use, in bf16; other switches and two clocks on one row each."""
    from . import triton_read, triton_write

    fns = {"read": triton_read.read_kernel, "append": triton_read.append_kernel, "close": triton_read.close_kernel,
           "errors": triton_write.errors_kernel, "hidden": triton_write.hidden_kernel, "update": triton_write.update_kernel}
    itemsizes = {"bf16": 2}
    for config, dtype, row in _rows():
        made = constants(config, itemsizes[dtype])
        if config.self_modifying:
            made.pop("append")
        for M0, M1, C in groups(config):
            for name, consts in group_constants(config, itemsizes[dtype], M0, M1, C).items():
                yield _specialization(name, fns[name], consts, dtype, f"{row} m={M0}..{M1} C={C}")
        for name, consts in made.items():
            yield _specialization(name, fns[name], consts, dtype, row)


def _rows() -> Iterator[tuple[TitansConfig, str, str]]:
    def config(D, mult, C, **kw):
        return TitansConfig(2 * D, 2, hidden_mult=mult, **{"chunk_memory": C, "chunk_other": C, **kw})

    for D, mult, C in ((32, 1, 16), (64, 1, 16), (64, 1, 64), (64, 4, 16), (64, 4, 64), (64, 1, 256), (128, 4, 64)):
        yield config(D, mult, C), "bf16", f"D={D} N={D * mult} C={C}"
    yield config(64, 4, 16, chunk_other=64), "bf16", "two clocks"
    yield TitansConfig.preset("nested_learning", d_model=64, chunk_memory=64, chunk_other=64), "bf16", "nested_learning"
    yield TitansConfig.preset("titans", d_model=128, num_heads=2, momentum=None, chunk_memory=64), "bf16", "titans"


_INPUTS = ("x_p", "q_p", "o_p", "k_p", "v_p", "a_p", "given_k_p", "given_v_p", "given_eta_p", "given_alpha_p")  # in the input dtype
_WHOLE = ("T", "step", "end")


def _specialization(name: str, fn: Any, consts: dict, dtype: str, row: str) -> Specialization:
    signature = {}
    for arg in fn.arg_names:
        if arg.endswith("_p"):
            signature[arg] = "*i64" if arg in ("pos_p", "len_p") else f"*{dtype}" if arg in _INPUTS else "*fp32"
        elif arg not in consts:
            signature[arg] = "i64" if arg in _WHOLE else "fp32"
    constexprs = {k: v for k, v in consts.items() if k != "num_warps"}
    products = name in ("read", "errors", "hidden", "update")
    return Specialization(f"titans_{name}", fn, signature, constexprs, consts["num_warps"], 2, wants_mma=products,
                          row=row, archs=(80, 90, 100, 120) if row == "D=64 N=64 C=16" else (80, 90, 100))

