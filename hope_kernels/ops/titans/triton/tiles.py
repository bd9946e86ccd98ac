"""Tile choices of the memory's Triton kernel in one table, and every compilation they lead to
(benchmarks/compile_report.py).

The table was found by compiling for sm_80 to sm_120: large tiles that leave no architecture with a spill, in
at most 99 KB of shared memory, so that one table serves all of them. Nothing in it has been timed. NT divides
every N of its D, CT every C of its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from ....config import TitansConfig
from ...shared.activations import ACTIVATION_CODES
from ...shared.triton_build import SHARED_KIB, Specialization
from ..state import Layout
from .schedule import LINE, scan_kernel

WIDTHS, MULTIPLES, CHUNKS = (32, 64, 128), (1, 2, 4), (16, 32, 64, 128, 256)
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


class Tiles(NamedTuple):
    """NT hidden units and CT tokens a tile, of the tasks that walk N (read, errors) and of those that own a
    tile of N (hidden, update)."""

    NT: int
    CT: int
    OWN_NT: int
    OWN_CT: int


class Row(NamedTuple):
    """Heads of width D with any N, chunks of up to C tokens (from where the row before ends), operands of
    ``itemsize`` bytes.

    registers: a thread's limit. The assembler must be told: left alone it aims at more programs a
    multiprocessor, and spills for it.
    """

    D: int
    itemsize: int
    C: int
    tiles: Tiles
    registers: int


TABLE = (
    Row(32, 2, 16, Tiles(32, 16, 32, 16), 168),
    Row(32, 2, 256, Tiles(32, 32, 32, 32), 255),
    Row(64, 2, 16, Tiles(32, 16, 64, 16), 168),
    Row(64, 2, 256, Tiles(64, 32, 64, 16), 255),
    Row(128, 2, 16, Tiles(32, 16, 32, 16), 255),
    Row(128, 2, 256, Tiles(32, 16, 32, 32), 255),
    # products on FMA units, a thread holds its rows and columns of both operands
    Row(32, 4, 256, Tiles(16, 16, 16, 16), 255),
    Row(64, 4, 256, Tiles(16, 16, 16, 16), 255),
    Row(128, 4, 256, Tiles(16, 16, 16, 16), 255),
)
# One kernel holds the rows of both clocks, so these cannot depend on C. (D, itemsize) -> warps
WARPS = {(32, 2): 4, (64, 2): 4, (128, 2): 8, (32, 4): 4, (64, 4): 8, (128, 4): 8}
STAGES = 2


def row(D: int, C: int, itemsize: int) -> Row:
    """Neither the device nor a call has a say in it."""
    return next(row for row in TABLE if (row.D, row.itemsize) == (D, itemsize) and C <= row.C)


def options(config: TitansConfig, itemsize: int) -> dict[str, int]:
    """What Triton is told about the kernel: with two clocks the wider row's registers, and 8 warps, or some
    would spill."""
    both = clocks(config)
    registers = max(row(config.head_dim, clock.C, itemsize).registers for clock in both)
    return {
        "num_warps": 8 if len(both) > 1 else WARPS[config.head_dim, itemsize], "num_stages": STAGES,
        "maxnreg": registers
    }


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


def tiles(config: TitansConfig, clock: Clock, itemsize: int) -> Tiles:
    """The row's; with two clocks 16 tokens, or the kernel that holds both would spill (D = 128, N = 512 above
    16 still does, on sm_80)."""
    found = row(config.head_dim, clock.C, itemsize).tiles
    return found if len(clocks(config)) == 1 else found._replace(CT=16, OWN_CT=16)


def constants(config: TitansConfig, itemsize: int, update: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernel. They depend on the model only, and on whether anything is learned."""
    layout, both = Layout.of(config), clocks(config)
    fast, slow = both[0], both[1] if len(both) > 1 else Clock(0, 0, both[0].C)
    big = max(config.chunk_memory, config.chunk_other)  # slots of the open chunk
    named = {
        f"{prefix}_{name}": size
        for prefix, clock in (("FAST", fast), ("SLOW", slow))
        for name, size in tiles(config, clock, itemsize)._asdict().items()
    }
    return named | {
        "UPDATE": update, "PRODUCE": update and config.self_modifying, "FM0": fast.M0, "FM1": fast.M1,
        "SM0": slow.M0, "SM1": slow.M1,
        "SMALL": fast.C, "BIG": big, "H": config.num_heads, "D": config.head_dim, "N": config.hidden,
        "MF": len(layout.full),
        "MS": len(layout.scalars), "R": layout.rows, "ACT": ACTIVATION_CODES[config.activation],
        "HAS_BASE": config.retain_to == "init",
        "SKIP": layout.skip, "HAS_ALPHA": config.retention, "UNIT_K": config.qk_l2norm,
        "SOFTPLUS": config.eta_activation == "softplus",
        "OWN": config.own_values, "TARGET_NORM": config.target_norm, "DOT": config.objective == "dot",
        "DGD": config.dgd, "CLIP": config.step_clip, "MOMENTUM": update and config.momentum is not None,
        "ADAPTIVE_Q": config.adaptive_q,
    }


def scratch_shapes(config: TitansConfig, itemsize: int) -> list[dict[str, tuple[int, ...]]]:
    """Per clock, what one chunk of one (row, head) leaves in scratch; ``a`` in the dtype of the operands, the
    rest in fp32."""
    layout = Layout.of(config)
    D, N, M, MF, MS = config.head_dim, config.hidden, len(layout.names), len(layout.full), max(
        1, len(layout.scalars)
    )
    KEYS, VECTORS = (1, 3) if config.momentum is None else (2, 7)
    return [
        {
            "e": (MF, D, C), "es": (MS, C), "e2": (M, C), "a": (M, N, C), "d": (M, N, C),
            "norms": (M, N // tiles(config, clock, itemsize).OWN_NT, 2, C), "keys": (KEYS, C, D),
            "vectors": (VECTORS, C), "gram": (C, C if config.step_clip else 1), "steps": (M, C),
        }
        for clock in clocks(config) for C in (clock.C,)
    ]


def counters(groups: int) -> int:
    """Numbers in the kernel's ``sync`` for ``groups`` (row, head) pairs: a ticket, and their counters."""
    return (1 + groups) * LINE.value


def specializations(full: bool = False) -> Iterator[Specialization]:
    """Every row of the table at its worst shape (largest N and C), and every switch that changes the code;
    ``full``: then all shapes that are served, on all architectures."""
    if full:
        for dtype, D, mult, C in product(ITEMSIZE, WIDTHS, MULTIPLES, CHUNKS):
            yield _specialization(
                _config(D, mult, C), dtype, f"D={D} N={D * mult} C={C} {dtype}", tuple(SHARED_KIB)
            )
    for D, itemsize, C, *_ in TABLE:
        dtype = "fp32" if itemsize == 4 else "bf16"
        yield _specialization(
            _config(D, 4, C), dtype, f"D={D} N={4 * D} C={C} {dtype}", (80, 90, 100) if itemsize == 2 else (80, 90)
        )
    usual = _config(64, 1, 16)  # of a default layer with heads of 64
    yield _specialization(usual, "bf16", "D=64 N=64 C=16 bf16", (86, 89, 90, 120))
    yield _specialization(_config(128, 4, 256), "bf16", "D=128 N=512 C=256 bf16", (86,))
    yield _specialization(_config(64, 4, 64), "fp16", "D=64 N=256 C=64 fp16", (90,))
    yield _specialization(usual, "bf16", "reads only", (90,), update=False)
    yield _specialization(_config(64, 4, 16, chunk_other=64), "bf16", "two clocks", (80, 90))
    package = TitansConfig.preset("nested_learning", d_model=64, chunk_memory=64, chunk_other=64)
    yield _specialization(package, "bf16", "nested_learning", (80, 90))
    for C in (16, 64):
        lmm = TitansConfig.preset("titans", d_model=128, num_heads=2, chunk_memory=C, chunk_other=C)
        yield _specialization(lmm, "bf16", f"titans C={C}", (80, 90, 100))
    yield _specialization(_config(64, 4, 64, momentum="learned"), "bf16", "momentum", (80, 90, 100))
    yield _specialization(_config(64, 1, 16, adaptive_q=True), "bf16", "adaptive_q", (80, 90))


def _config(D: int, mult: int, C: int, **changes) -> TitansConfig:
    return TitansConfig(2 * D, 2, hidden_mult=mult, **{"chunk_memory": C, "chunk_other": C, **changes})


# in the input dtype
_INPUTS = ("x_p", "q_p", "o_p", "k_p", "v_p", "a_p", "slow_a_p", "given_k_p", "given_v_p", "given_eta_p",
           "given_alpha_p",
           "given_beta_p", "base2_p", "base1_p", "base1s_p", "eta_bias_p", "alpha_bias_p")
_WHOLE = {"pos_p": "*i64", "len_p": "*i64", "sync_p": "*i64", "B": "i32", "T": "i64"}


def _specialization(
    config: TitansConfig, dtype: str, title: str, archs: tuple[int, ...], update: bool = True
) -> Specialization:
    itemsize = ITEMSIZE[dtype]
    consts, signature = constants(config, itemsize, update), {}
    for arg in scan_kernel.arg_names:
        if arg not in consts:
            signature[arg] = _WHOLE.get(
                arg, f"*{dtype}" if arg in _INPUTS else "*fp32" if arg.endswith("_p") else "fp32"
            )
    return Specialization("titans_scan", scan_kernel, signature, consts, wants_mma=itemsize == 2, row=title,
                          archs=archs,
                          **options(config, itemsize))
