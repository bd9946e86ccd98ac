"""Tile choices of the backward's kernels in one table, and the compilations it leads to
(benchmarks/compile_report.py).

The table was found by compiling for sm_80 to sm_100: the largest tiles without spills. Nothing in it has been
timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ....config import TitansConfig
from ...shared.triton_build import Specialization
from .groups import Biases, Clock, ClockTerms, Errors, Place, Slots, Weights
from .tiles import clocks, rule_of, shape_of


class BackwardTiles(NamedTuple):
    """Hidden units and tokens a tile, and warps: of the kernels that walk over all N, and of those that own a
    tile of N (SUMS_CT: of ``sums``; READ_CT: of ``outputs`` and ``read_adjoint``)."""

    WALK_NT: int
    WALK_CT: int
    walk_warps: int
    TILE_NT: int
    TILE_CT: int
    SUMS_CT: int
    READ_CT: int
    tile_warps: int
    hidden_stages: int  # of ``hidden``'s loop over tokens


def tiles(D: int, C: int, itemsize: int, skip: bool) -> BackwardTiles:
    """For head width D, C tokens a chunk, operands of ``itemsize`` bytes, with or without skip rows."""
    warps = 8 if D == 128 else 4
    # less work a tile where the chunk is one tile, and all of it is in flight at once, or where more weights
    # are held
    small = C == 16 or D == 128 or itemsize == 4 or skip
    # what a tile's program loads of the tokens it loads for all of its hidden units; 8 warps have the registers
    wide = D == 64 and not small
    return BackwardTiles(
        WALK_NT=32, WALK_CT=min(C, 64 if wide else 32), walk_warps=warps, TILE_NT=16 if small else 64 if wide else 32,
        TILE_CT=16, SUMS_CT=16 if small or C == 32 else 32, READ_CT=32 if wide else 16, tile_warps=8 if wide else warps,
        hidden_stages=1 if wide else 2,  # two spilled a few words on sm_100
    )


def rounds(D: int) -> bool:
    """Whether weights in force and the adjoint of u lie rounded in memory: heads of 128 would spill on sm_80."""
    return D < 128


def constants(config: TitansConfig, itemsize: int) -> dict[str, dict[str, Any]]:
    """Compile-time arguments of the reads' kernels."""
    shape, rule, small = shape_of(config), rule_of(config, True), clocks(config)[0].C
    t, M = tiles(shape.D, small, itemsize, rule.SKIP), shape.MF + shape.MS
    model = {"shape": shape, "rule": rule}
    made = {
        "reread": {
            "shape": shape, "rule": rule._replace(HAS_BASE=False), "C": small, "CT": t.WALK_CT, "NT": t.WALK_NT,
            "num_warps": t.walk_warps,
        },
        "read_adjoint": model | {
            "C": small, "CT": t.READ_CT, "NT": t.TILE_NT, "CONSTANT": False, "num_warps": t.tile_warps,
        },
        "unit_adjoint": {"H": shape.H, "D": shape.D, "CT": 16, "num_warps": 4},
        "collect": {
            "H": shape.H, "D": shape.D, "C": small, "M": M, "M0": 0, "M1": len(config.memories),
            "TILES": shape.N // t.TILE_NT, "FULL": False, "num_warps": 4,
        },
    }
    return _staged(made)


def clock_constants(config: TitansConfig, itemsize: int, clock: Clock) -> dict[str, dict[str, Any]]:
    """Compile-time arguments of the adjoint of a commit of one clock."""
    shape, rule, C = shape_of(config), rule_of(config, True), clock.C
    t = tiles(shape.D, C, itemsize, rule.SKIP)
    TILES, model = shape.N // t.TILE_NT, {"shape": shape, "rule": rule}
    tile = model | {"clock": clock, "CT": t.TILE_CT, "NT": t.TILE_NT, "num_warps": t.tile_warps}
    made = {
        "clock": model | {"C": C, "num_warps": 4, "num_stages": 1},
        "errors": {
            "shape": shape, "rule": rule._replace(HAS_BASE=False), "clock": clock, "SMALL": clocks(config)[0].C,
            "CT": t.WALK_CT, "NT": t.WALK_NT, "num_warps": t.walk_warps,
        },
        "sums": tile | {"CT": t.SUMS_CT},
        "gain": {"shape": shape, "clock": clock, "TILES": TILES, "CLIP": rule.CLIP, "num_warps": 4},
        "hidden": tile | {"num_stages": t.hidden_stages},
        "targets": model | {"clock": clock, "CT": min(C, 16), "TILES": TILES, "num_warps": 4},
        "inputs": tile, "outputs": tile | {"CT": t.READ_CT},
        "clock_adjoint": model | {"clock": clock, "TILES": TILES, "num_warps": 4, "num_stages": 1},
        "collect": {
            "H": shape.H, "D": shape.D, "C": C, "M": shape.MF + shape.MS, "M0": clock.M0, "M1": clock.M1,
            "TILES": TILES, "FULL": True, "num_warps": 4,
        },
    }
    return _staged(made)


def _staged(made: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Two stages where nothing else is said: Triton's own default, three, is another kernel than the one the
    table was made with."""
    return {name: {"num_stages": 2} | consts for name, consts in made.items()}


def specializations() -> Iterator[Specialization]:
    """Every kernel on the rows people use and at the corners, in bf16; two clocks and the presets on one row
    each."""
    from . import backward_clock, backward_commit, backward_hidden, backward_read, backward_tokens

    modules = (backward_clock, backward_hidden, backward_read, backward_tokens, backward_commit)
    for config, row in _rows():
        made = constants(config, 2)
        if not config.self_modifying:
            made = {n: made[n] for n in ("read_adjoint", "collect")}
        jobs = [(n, consts, row) for n, consts in made.items()]
        jobs.append(("read_adjoint", made["read_adjoint"] | {"CONSTANT": True}, f"{row} constant"))
        for clock in clocks(config):
            label = f"{row} m={clock.M0}..{clock.M1} C={clock.C}"
            jobs += [(n, consts, label) for n, consts in clock_constants(config, 2, clock).items()]
        for name, consts, label in jobs:
            fn = next(getattr(m, f"{name}_kernel") for m in modules if hasattr(m, f"{name}_kernel"))
            yield _specialization(name, fn, consts, label)


def _rows() -> Iterator[tuple[TitansConfig, str]]:
    def config(D, mult, C, **kw):
        return TitansConfig(2 * D, 2, hidden_mult=mult, **{"chunk_memory": C, "chunk_other": C, **kw})

    for D, mult, C in ((64, 1, 16), (64, 4, 64), (128, 4, 64), (32, 1, 16), (64, 1, 256)):
        yield config(D, mult, C), f"D={D} N={D * mult} C={C}"
    yield config(64, 4, 16, chunk_other=64), "two clocks"
    yield TitansConfig.preset("nested_learning", d_model=64, chunk_memory=64, chunk_other=64), "nested_learning"
    yield TitansConfig.preset("titans", d_model=128, num_heads=2, momentum=None, chunk_memory=64), "titans"


_INPUTS = ("x_p", "read_p", "k_p")  # in the input dtype
_WHOLE = ("slot", "S", "end", "first")
_GROUPS = {
    "weights": Weights(*["*fp32"] * 6), "weights_bar": Weights(*["*fp32"] * 6),
    "slots": Slots("*bf16", "*bf16", "*fp32", "*fp32"), "slots_bar": Slots(*["*fp32"] * 4),
    "place": Place("*i64", "*i64"), "biases": Biases("*bf16", "*bf16"), "terms": ClockTerms(*["*fp32"] * 4),
    "errors": Errors(*["*fp32"] * 3),
}
_PRODUCTS = ("reread", "read_adjoint", "errors", "sums", "hidden", "inputs", "outputs")


def _specialization(name: str, fn: Any, consts: dict, row: str) -> Specialization:
    signature: dict[str, Any] = {}
    for arg in fn.arg_names:
        if arg in _GROUPS:
            signature[arg] = _GROUPS[arg]
        elif arg == "in_force":  # without scalar memories delta1 stands for delta1s
            kind = "*bf16" if rounds(consts["shape"].D) else "*fp32"
            signature[arg] = Weights(*[kind] * 5, "*fp32" if consts["shape"].MS else kind)
        elif arg.endswith("_p"):
            narrow = arg in _INPUTS or arg == "u_bar_p" and rounds(consts["shape"].D)
            signature[arg] = "*bf16" if narrow else "*fp32"
        elif arg not in consts:
            signature[arg] = "i64" if arg in _WHOLE else "fp32"
    constexprs = {k: v for k, v in consts.items() if k not in ("num_warps", "num_stages")}
    return Specialization(
        f"titans_backward_{name}", fn, signature, constexprs, consts["num_warps"], consts["num_stages"],
        wants_mma=name in _PRODUCTS, row=row,
    )
