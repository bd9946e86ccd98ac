"""Tile choices of the memory's Triton kernel in one table, and every compilation they lead to
(benchmarks/compile_report.py).

The table was found by compiling for sm_80 to sm_120: large tiles that leave no architecture with a spill, in
at most 99 KB of shared memory, so that most rows serve all of them. Where products take their operands from
shared memory (WIDE), heads of 64 have rows of their own for chunks of 64 tokens and more: 64 tokens a tile, so that
weights are read once for 64 tokens instead of 32: an eighth less time by count (docs/budget.md). They spill
elsewhere and with momentum. Results on these architectures have other last bits. Nothing in the table has been
timed. Tiles of hidden units divide every N of their D, tiles of tokens every C of their row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from ....config import TitansConfig
from ...shared.activations import ACTIVATION_CODES
from ...shared.triton_build import SHARED_KIB, Specialization
from ..state import Layout
from .groups import Biases, Clock, Momentum, Progress, Reads, Rule, Scratch, Shape, Tiles, Weights, Writes
from .schedule import LINE, scan_kernel

WIDTHS, MULTIPLES, CHUNKS = (32, 64, 128), (1, 2, 4), (16, 32, 64, 128, 256)
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


class TileRow(NamedTuple):
    """Heads of width D with any N, chunks of up to C tokens (from where the row before ends), operands of
    ``itemsize`` bytes.

    registers: a thread's limit. The assembler must be told: left alone it aims at more programs a
    multiprocessor, and spills for it. archs: which have this row; None: all that find no row before it.
    """

    D: int
    itemsize: int
    C: int
    tiles: Tiles
    registers: int
    archs: tuple[int, ...] | None = None


WIDE = (90, 100)
TABLE = (
    TileRow(32, 2, 16, Tiles(32, 16, 32, 16), 168),
    TileRow(32, 2, 256, Tiles(32, 32, 32, 32), 255),
    TileRow(64, 2, 16, Tiles(32, 16, 64, 16), 255, (100,)),  # 168 registers spill four there
    TileRow(64, 2, 16, Tiles(32, 16, 64, 16), 168),
    TileRow(64, 2, 32, Tiles(64, 32, 64, 32), 255),
    TileRow(64, 2, 64, Tiles(64, 64, 64, 64), 255, WIDE),
    TileRow(64, 2, 256, Tiles(64, 64, 64, 64), 255, WIDE),
    TileRow(64, 2, 256, Tiles(64, 32, 64, 32), 255),
    TileRow(128, 2, 16, Tiles(32, 16, 32, 16), 255),
    TileRow(128, 2, 256, Tiles(32, 16, 32, 32), 255),
    # products on FMA units, a thread holds its rows and columns of both operands
    TileRow(32, 4, 256, Tiles(16, 16, 16, 16), 255),
    TileRow(64, 4, 256, Tiles(16, 16, 16, 16), 255),
    TileRow(128, 4, 256, Tiles(16, 16, 16, 16), 255),
)
# One kernel holds the rows of both clocks, so these cannot depend on C. (D, itemsize) -> warps
WARPS = {(32, 2): 4, (64, 2): 4, (128, 2): 8, (32, 4): 4, (64, 4): 8, (128, 4): 8}
STAGES = 2
# Of the scratch, what products take as they find it
ROUNDED = ("e", "a", "d", "rounded_keys", "erased_keys")


def tile_row(D: int, C: int, itemsize: int, arch: int) -> TileRow:
    """A call has no say in it."""
    return next(
        row for row in TABLE
        if (row.D, row.itemsize) == (D, itemsize) and C <= row.C and (row.archs is None or arch in row.archs)
    )


def row_of(config: TitansConfig, clock: Clock, itemsize: int, arch: int) -> TileRow:
    """Of the memories of one clock; with momentum, which the kernel holds as well, sm_80's on every
    architecture."""
    return tile_row(config.head_dim, clock.C, itemsize, arch if config.momentum is None else 80)


def options(config: TitansConfig, itemsize: int, arch: int) -> dict[str, int]:
    """What Triton is told about the kernel: with two clocks the wider row's registers, and 8 warps, or some
    would spill."""
    both = clocks(config)
    registers = max(row_of(config, clock, itemsize, arch).registers for clock in both)
    registers = registers if config.momentum is None else 255  # whose sums spill with fewer
    return {
        "num_warps": 8 if len(both) > 1 else WARPS[config.head_dim, itemsize], "num_stages": STAGES,
        "maxnreg": registers
    }


def clocks(config: TitansConfig) -> list[Clock]:
    """The layer's clocks, the faster one first; M_memory is number 0."""
    M = len(config.memories)
    if not config.self_modifying or config.chunk_memory == config.chunk_other:
        return [Clock(0, M, config.chunk_memory)]
    return sorted([Clock(0, 1, config.chunk_memory), Clock(1, M, config.chunk_other)], key=lambda c: c.C)


def tiles(config: TitansConfig, clock: Clock, itemsize: int, arch: int) -> Tiles:
    """The row's; with two clocks 16 tokens, or the kernel that holds both would spill (D = 128, N = 512 above
    16 still does, on sm_80). So would updates of heads of 64 with momentum."""
    found = row_of(config, clock, itemsize, arch).tiles
    if config.momentum is not None and config.head_dim == 64:
        found = found._replace(TILE_CT=16)
    return found if len(clocks(config)) == 1 else found._replace(WALK_CT=16, TILE_CT=16)


def shape_of(config: TitansConfig) -> Shape:
    layout = Layout.of(config)
    return Shape(
        H=config.num_heads, D=config.head_dim, N=config.hidden, MF=len(layout.full), MS=len(layout.scalars),
        R=layout.rows,
    )


def rule_of(config: TitansConfig, update: bool) -> Rule:
    return Rule(
        ACT=ACTIVATION_CODES[config.activation], HAS_BASE=config.retain_to == "init",
        SKIP=Layout.of(config).skip, HAS_ALPHA=config.retention, UNIT_K=config.qk_l2norm,
        SOFTPLUS=config.eta_activation == "softplus", OWN_VALUES=config.own_values,
        TARGET_NORM=config.target_norm, DOT=config.objective == "dot", DGD=config.dgd, CLIP=config.step_clip,
        MOMENTUM=update and config.momentum is not None, ADAPTIVE_Q=config.adaptive_q,
    )


def constants(config: TitansConfig, itemsize: int, update: bool, arch: int) -> dict[str, Any]:
    """Compile-time arguments of the kernel. They depend on the model, on whether anything is learned, and on
    the architecture (90 is sm_90)."""
    fast, *others = clocks(config)
    # without a second clock no memory has it, and its chunk is that of the pending slots
    slow = others[0] if others else Clock(0, 0, max(config.chunk_memory, config.chunk_other))
    rule = rule_of(config, update)
    return {
        "UPDATE": update, "PRODUCE": update and config.self_modifying, "fast": fast, "slow": slow,
        "fast_tiles": tiles(config, fast, itemsize, arch), "slow_tiles": tiles(config, slow, itemsize, arch),
        "shape": shape_of(config), "rule": rule, "no_base": rule._replace(HAS_BASE=False),
    }


def erases_at_once(config: TitansConfig, C: int) -> bool:
    """A clock's keys are multiplied once for all memories (``clock._erased_keys``): where there are more than the
    head has features. Heads of other widths would spill."""
    return config.dgd and config.momentum is None and C > config.head_dim == 64


def scratch_shapes(config: TitansConfig, itemsize: int, arch: int) -> list[Scratch]:
    """Per clock, what one chunk of one (row, head) leaves in scratch; ``ROUNDED`` in the dtype of the operands,
    the rest in fp32."""
    layout = Layout.of(config)
    D, N, M, MF = config.head_dim, config.hidden, len(layout.names), len(layout.full)
    MS = max(1, len(layout.scalars))
    KEYS, VECTORS = (1, 3) if config.momentum is None else (2, 7)
    return [
        Scratch(
            e=(MF, D, C), es=(MS, C), e2=(M, C), a=(M, N, C), d=(M, N, C),
            norms=(M, N // tiles(config, clock, itemsize, arch).TILE_NT, 2, C), keys=(KEYS, C, D),
            rounded_keys=(KEYS, C, D), erased_keys=(D, D if erases_at_once(config, C) else 1),
            vectors=(VECTORS, C), gram2=(C, C if config.step_clip else 1), sizes=(M, C), gain=(M, C),
        )
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
            title = f"D={D} N={D * mult} C={C} {dtype}"
            yield from _specializations(_config(D, mult, C), dtype, title, tuple(SHARED_KIB))
    for D, itemsize, C, *_, archs in TABLE:
        dtype = "fp32" if itemsize == 4 else "bf16"
        offered = (80, 90, 100) if itemsize == 2 else (80, 90)
        known = [arch for arch in offered if tile_row(D, C, itemsize, arch).archs == archs]
        yield from _specializations(_config(D, 4, C), dtype, f"D={D} N={4 * D} C={C} {dtype}", tuple(known))
    usual = _config(64, 2, 16)  # with as many hidden units as outputs: carried.py
    yield from _specializations(usual, "bf16", "D=64 N=128 C=16 bf16", (86, 89, 90, 120))
    yield from _specializations(_config(128, 4, 256), "bf16", "D=128 N=512 C=256 bf16", (86,))
    yield from _specializations(_config(64, 4, 64), "fp16", "D=64 N=256 C=64 fp16", (90,))
    yield from _specializations(usual, "bf16", "reads only", (90,), update=False)
    yield from _specializations(_config(64, 4, 16, chunk_other=64), "bf16", "two clocks", (80, 90))
    package = TitansConfig.preset("nested_learning", d_model=64, chunk_memory=64, chunk_other=64)
    yield from _specializations(package, "bf16", "nested_learning", (80, 90))
    for C in (16, 64):
        lmm = TitansConfig.preset("titans", d_model=128, num_heads=2, chunk_memory=C, chunk_other=C)
        yield from _specializations(lmm, "bf16", f"titans C={C}", (80, 90, 100))
    yield from _specializations(_config(64, 4, 64, momentum="learned"), "bf16", "momentum", (80, 90, 100))
    yield from _specializations(_config(64, 1, 16, adaptive_q=True), "bf16", "adaptive_q", (80, 90))


def _config(D: int, mult: int, C: int, **changes) -> TitansConfig:
    return TitansConfig(2 * D, 2, hidden_mult=mult, **{"chunk_memory": C, "chunk_other": C, **changes})


def _specializations(
    config: TitansConfig, dtype: str, title: str, archs: tuple[int, ...], update: bool = True
) -> Iterator[Specialization]:
    """One for the architectures that have the same tiles. Weights, momentum, gates and most of scratch are fp32,
    all else is in the input dtype."""
    itemsize, like = ITEMSIZE[dtype], f"*{dtype}"
    scratch = Scratch(*(like if name in ROUNDED else "*fp32" for name in Scratch._fields))
    signature = {
        "reads": Reads(like, like, like), "given": Writes(like, like, like, like, like),
        "weights": Weights(like, like, like, "*fp32", "*fp32", "*fp32"),
        "in_force": Weights(like, like, like, like, like, "*fp32"),
        "momentum": Momentum("*fp32", "*fp32", "*fp32"),
        "pending": Writes(like, like, "*fp32", "*fp32", "*fp32"), "biases": Biases(like, like),
        "progress": Progress("*i64", "*i64", "*i64"), "fast_scratch": scratch, "slow_scratch": scratch,
        "B": "i32", "T": "i64", "eta_scale": "fp32", "grad_scale": "fp32",
    }
    alike: list[tuple[dict, dict, list[int]]] = []
    for arch in archs:
        made = constants(config, itemsize, update, arch), options(config, itemsize, arch)
        same = next((group for group in alike if group[:2] == made), None)
        if same is None:
            alike.append((*made, [arch]))
        else:
            same[2].append(arch)
    for known, told, group in alike:
        yield Specialization(
            "titans_scan", scan_kernel, signature, known, wants_mma=itemsize == 2, row=title,
            archs=tuple(group), **told,
        )
