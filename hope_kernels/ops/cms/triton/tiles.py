"""Tile choices of the CMS's Triton kernels in one table, and every compilation they lead to
(benchmarks/compile_report.py).

The table was found by compiling for sm_80 to sm_120: large tiles that leave no architecture with a spill, in
at most 99 KB of shared memory, so that one table serves all of them. Nothing in it has been timed. A tile
follows from the width of the output and the dtype, never from the number of tokens: it decides bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import triton

from ...shared.triton_build import SHARED_KIB, Specialization
from ..level import ADAM_EPS, NS_EPS
from .backward import back_kernel, error_kernel
from .common import Operand
from .forward import down_kernel, inner_kernel, up_kernel
from .newton_schulz import LANES, PARTS, squares_kernel, start_kernel, step_kernel, symmetric_kernel
from .newton_schulz import NUM_WARPS as NORM_WARPS
from .norm import norm_backward_kernel, norm_kernel, norm_options, norm_tile
from .refresh import refresh_kernel

# tiles of rows that run beside each other: 8 x 16 programs fill an H100 and read 24 tiles of operands, not
# 136
GROUP = 8
# slots of the pending part that a product takes at a time; one size, so that unused slots change no order
RANK = 32


class Tile(NamedTuple):
    """BM rows, BN columns of the output, BK numbers of the sum at a time."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def sizes(self) -> dict[str, int]:
        return {"BM": self.BM, "BN": self.BN, "BK": self.BK}

    def options(self, pending: bool = False) -> dict[str, int | None]:
        """What Triton is told about a launch. With pending parts the assembler must be told a thread's limit:
        left alone it aims at more programs a multiprocessor, and spills for it; without them it would only
        take more registers."""
        return {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": 255 if pending else self.maxnreg
        }



# Outputs up to 2048 wide: tiles of 64 columns, so that a segment of 512 tokens is a program for each of an
# H100's multiprocessors.
NARROW = 2048
# (bytes of an operand, narrow) -> tile. 128 x 128 takes 106 registers and 96 KB on sm_90: two programs a
# multiprocessor. 128 x 256 would do 85 FLOPs a byte from L2, not 64 (59% of an H200's GEMM rate, not 45%), but
# spills on sm_90: 30 stores without pending parts, 354 with them, whose accumulator is as large as the first.
# Their tile has to be the same, or unused slots would change bits.
PRODUCTS = {
    (2, True): Tile(128, 64, 64, 8, 3), (2, False): Tile(128, 128, 64, 8, 3),
    # FMA units: a thread holds its rows and columns of both operands
    (4, True): Tile(64, 64, 16, 8, 2), (4, False): Tile(64, 64, 16, 8, 2),
}
# two accumulators, and their pending parts: 128 x 128 spills with these (33 stores on sm_90)
GATED_UP = {2: Tile(128, 64, 32, 8, 4), 4: Tile(64, 32, 16, 8, 2, 255)}
INNER = {2: Tile(64, 64, 64, 4, 3), 4: Tile(64, 32, 16, 4, 2)}
# Adam's epilogue takes 245 registers. 128 x 128 would read less from L2, but spills.
REFRESH = {2: Tile(128, 64, 64, 8, 3), 4: Tile(64, 64, 16, 8, 2)}
# of gd: two programs a multiprocessor, so that the epilogue of one runs beside the product of the other; left
# alone the assembler takes 159 on sm_80
GD_REGISTERS = 128
WHOLE = Tile(64, 64, 16, 8, 2)  # Newton-Schulz, fp32


def up_tile(N: int, itemsize: int, gated: bool) -> Tile:
    return GATED_UP[itemsize] if gated else PRODUCTS[itemsize, N <= NARROW]


def error_tile(N: int, itemsize: int, gated: bool) -> Tile:
    """swiglu's epilogue holds z and g beside the accumulator: half the columns."""
    return PRODUCTS[itemsize, gated or N <= NARROW]


def down_tile(D: int, itemsize: int) -> Tile:
    """Of both products whose output is as wide as the model."""
    return PRODUCTS[itemsize, D <= NARROW]


def refresh_tile(itemsize: int, product: bool, more: bool) -> Tile:
    """product: of factors of ``itemsize`` bytes; more: a moment or a total is read as well."""
    tile = REFRESH[itemsize if product else 4]
    return tile if more or not product or itemsize == 4 else tile._replace(maxnreg=GD_REGISTERS)


def specializations(full: bool = False) -> Iterator[Specialization]:
    """Every row of the table, and every switch that changes the code; ``full``: all of them on all
    architectures."""
    for spec in (*_levels(), *_refreshes(), *_newton_schulz()):
        yield replace(spec, archs=tuple(SHARED_KIB)) if full else spec


def _levels() -> Iterator[Specialization]:
    """Nothing divides 1000 and 77."""
    plain = {
        "OWN": False, "BIAS": False, "PENDING": False, "KEEP": True, "RESIDUAL": True, "LAYERNORM": False,
        "EPS": 1e-6
    }
    all_on = plain | {"OWN": True, "BIAS": True, "PENDING": True, "LAYERNORM": True}
    yield from _level(2048, 8192, "bf16", (80, 90, 100), GATED=False, **plain)
    yield from _level(2048, 8192, "bf16", (90, 120), GATED=True, **plain)
    yield from _level(8192, 32768, "bf16", (80, 90, 100), GATED=False, **all_on)
    yield from _level(1000, 4000, "fp16", (86,), GATED=True, **all_on | {"KEEP": False, "RESIDUAL": False})
    yield from _level(77, 231, "fp32", (90,), GATED=True, **all_on)


def _level(D: int, N: int, dtype: str, archs: tuple[int, ...], **switches) -> Iterator[Specialization]:
    """The kernels of one level's forward and backward."""
    itemsize, gated, pending = 4 if dtype == "fp32" else 2, switches["GATED"], switches["PENDING"]
    kernels = [(up_kernel, up_tile(N, itemsize, gated)), (error_kernel, error_tile(N, itemsize, gated))]
    kernels += [
        (fn, down_tile(D, itemsize)) for fn in (back_kernel, down_kernel)[: 1 if gated and not pending else 2]
    ]
    if pending:
        kernels.append((inner_kernel, INNER[itemsize]))
    row = f"{dtype} d={D} N={N}" + " swiglu" * gated + " all on" * pending
    for fn, tile in kernels:
        yield _specialization(fn, dtype, row, archs, tile, D=D, N=N, K=N, BR=RANK, GROUP=GROUP, **switches)
    for fn in (norm_kernel, norm_backward_kernel) if pending else ():
        yield _specialization(
            fn, dtype, row, archs[-1:], Tile(0, 0, 0, **norm_options(D)), D=D, **switches, **norm_tile(D)
        )


def _refreshes() -> Iterator[Specialization]:
    """The updates that occur: gd, momentum with a total, adam with and without one, a sum on its own, a step
    from a total alone; after the library's product momentum and adam, from a gradient that stays."""
    gd = {"PRODUCT": True, "MOMENT": False, "ADAM": False, "TOTAL": False, "COPY": True, "READ": True}
    gd["LATE"] = False
    adam, total = gd | {"MOMENT": True, "ADAM": True}, {"TOTAL": True, "CLEAR": True}
    after = {"PRODUCT": False, "TOTAL": True}
    for dtype, rows, cols, archs, switches in (
        ("bf16", 8192, 2048, (80, 86, 90, 100), gd),
        ("bf16", 8192, 2048, (80, 90, 100), gd | {"MOMENT": True} | total),
        ("bf16", 8192, 2048, (80, 90, 100), adam),
        ("bf16", 8192, 2048, (80, 90, 100), adam | total),
        ("bf16", 8192, 2048, (80, 90, 100), adam | {"LATE": True}),
        ("bf16", 8192, 2048, (80, 90, 100), adam | total | {"LATE": True}),
        ("bf16", 8192, 2048, (90,), adam | {"PRODUCT": False} | total),
        ("fp32", 231, 77, (90,), adam | {"COPY": False} | total),
        ("fp16", 1000, 77, (90,), gd | {"COPY": False, "READ": False}),
        ("bf16", 8192, 2048, (90,), gd | {"PRODUCT": False} | total),
        ("fp32", 231, 77, (90,), gd | {"MOMENT": True} | total),
        ("bf16", 8192, 2048, (80, 90, 100), gd | after),
        ("bf16", 8192, 2048, (80, 90, 100), adam | after),
    ):
        row = f"{dtype} {rows} x {cols}" + "".join(
            f" {name.lower()}" for name, on in switches.items() if on and name not in ("READ", "CLEAR")
        ) + " stays" * (switches["TOTAL"] and not switches.get("CLEAR", False))
        tile = refresh_tile(
            4 if dtype == "fp32" else 2, switches["PRODUCT"], switches["MOMENT"] or switches["TOTAL"]
        )
        known = {"CLEAR": False, "ROWS": rows, "COLS": cols, "GROUP": GROUP, "EPS": ADAM_EPS} | switches
        yield _specialization(refresh_kernel, dtype, row, archs, tile, **known)


def _newton_schulz() -> Iterator[Specialization]:
    for R, L, archs in ((2048, 8192, (80, 90)), (77, 231, (90,))):
        sizes = {"R": R, "L": L, "G_R": 1, "G_L": R, "O_R": 1, "O_L": R, "ADD": True, "GROUP": GROUP}
        for fn in (symmetric_kernel, step_kernel):
            yield _specialization(fn, "fp32", f"fp32 {R} x {L}", archs, WHOLE, **sizes)
    small, size = Tile(32, 32, 0, NORM_WARPS, 1), {
        "SIZE": R * L, "BLOCK": PARTS, "COUNT": triton.cdiv(R * L, PARTS), "BP": LANES
    }
    for fn in (squares_kernel, start_kernel):
        yield _specialization(fn, "fp32", f"fp32 {R} x {L}", (90,), small, **sizes, **size, EPS=NS_EPS)


_FP32 = ("weight_p", "moment_p", "square_p", "total_p", "late_p")
_OPERANDS = ("up", "gate", "down")  # groups of pointers
_COUNTS = ("S", "T", "groups", "R", "slots", "C", "tokens")


def _specialization(fn, dtype: str, row: str, archs: tuple[int, ...], tile: Tile, **known) -> Specialization:
    """``fn`` at this tile; of ``known``, what the kernel takes."""
    known |= tile.sizes() if tile.BM else {}
    consts = {arg: known[arg] for arg in fn.arg_names if arg in known}
    signature = {}
    for arg in fn.arg_names:
        if arg not in consts:
            kind = "*fp32" if arg in _FP32 else "*i32" if arg == "rows_p" else f"*{dtype}"
            signature[arg] = kind if arg.endswith("_p") else "i64" if arg in _COUNTS else "fp32"
            if arg in _OPERANDS:
                signature[arg] = Operand(*("*i32" if f == "owns" else f"*{dtype}" for f in Operand._fields))
    products = dtype != "fp32" and "BK" in consts and consts.get("PRODUCT", True)
    name, options = f"cms_{fn.__name__.removesuffix('_kernel')}", tile.options(consts.get("PENDING", False))
    return Specialization(name, fn, signature, consts, wants_mma=products, row=row, archs=archs, **options)
