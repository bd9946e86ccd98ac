"""Tile choices of the backward's kernels in one table, and the compilations it leads to
(benchmarks/compile_report.py).

The table was found by compiling for sm_80 to sm_100: the largest tiles without spills. Nothing in it has been
timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ....config import TitansConfig
from ...shared.activations import ACTIVATION_CODES
from ...shared.triton_build import Specialization
from ..state import Layout
from .tiles import clocks


class Tiles(NamedTuple):
    """NT hidden units and CT tokens a tile, warps: of the kernels that walk N, and of those that own a tile
    of N (sums_CT: of ``sums``)."""

    NT: int
    CT: int
    warps: int
    own_NT: int
    own_CT: int
    sums_CT: int
    own_warps: int


def tiles(D: int, C: int, itemsize: int, skip: bool) -> Tiles:
    """For head width D, C tokens a chunk, operands of ``itemsize`` bytes, with or without skip rows."""
    warps = 8 if D == 128 else 4
    # less work a tile where the chunk is one tile, and all of it is in flight at once, or where more weights
    # are held
    small = C == 16 or D == 128 or itemsize == 4 or skip
    return Tiles(32, min(C, 32), warps, 16 if small else 32, 16, 16 if small or C == 32 else 32, warps)


def constants(config: TitansConfig, itemsize: int) -> dict[str, dict[str, Any]]:
    """Compile-time arguments of the reads' kernels."""
    layout = Layout.of(config)
    small = clocks(config)[0].C
    t = tiles(config.head_dim, small, itemsize, layout.skip)
    shape = _shape(config) | {
        "ACT": ACTIVATION_CODES[config.activation], "HAS_BASE": config.retain_to == "init", "SKIP": layout.skip
    }
    M, D = len(config.memories), config.head_dim
    made = {
        "reread": shape | {"CT": t.CT, "NT": t.NT, "UNIT_K": config.qk_l2norm,
            "SOFTPLUS": config.eta_activation == "softplus",
                           "num_warps": t.warps},
        "read_adjoint": shape | {"C": small, "CT": t.own_CT, "NT": t.own_NT, "num_warps": t.own_warps},
        "unit_adjoint": {"H": config.num_heads, "D": D, "CT": 16, "num_warps": 4},
        "collect": {"H": config.num_heads, "D": D, "C": small, "M": M, "TILES": config.hidden // t.own_NT,
            "FULL": False, "num_warps": 4},
    }
    return _staged(made)


def group_constants(config: TitansConfig, itemsize: int, M0: int, M1: int, C: int) -> dict[str, dict[str, Any]]:
    """Compile-time arguments of the adjoint of a commit of memories M0 .. M1, C tokens a chunk."""
    layout = Layout.of(config)
    t = tiles(config.head_dim, C, itemsize, layout.skip)
    tiles_of_N, M = config.hidden // t.own_NT, len(config.memories)
    token = {"H": config.num_heads, "D": config.head_dim, "C": C}
    shape = _shape(config) | {"C": C, "M0": M0}
    acts = {"ACT": ACTIVATION_CODES[config.activation], "HAS_BASE": config.retain_to == "init", "SKIP": layout.skip}
    own = {"CT": t.own_CT, "NT": t.own_NT, "num_warps": t.own_warps}
    target = {"TARGET_NORM": config.target_norm, "DOT": config.objective == "dot"}
    clip = {"CLIP": config.step_clip}
    decay = {"HAS_ALPHA": config.retention, "DGD": config.dgd, "num_warps": 4, "num_stages": 1}
    made = {
        "clock": token | decay,
        "errors": shape | acts | target | {"OWN": config.own_values, "CT": t.CT, "NT": t.NT, "num_warps": t.warps},
        "sums": shape | acts | own | {"CT": t.sums_CT},
        "steps": {"H": config.num_heads, "C": C, "M": M, "M0": M0, "TILES": tiles_of_N, "num_warps": 4} | clip,
        "hidden": shape | acts | own | {"DGD": config.dgd},
        "targets": token | target
        | {"MF": shape["MF"], "MS": shape["MS"], "M0": M0, "CT": min(C, 16), "TILES": tiles_of_N, "num_warps": 4},
        "inputs": shape | acts | own | {"DGD": config.dgd},
        "outputs": {k: v for k, v in (shape | acts | own).items() if k != "SKIP"},
        "values": shape | acts | own | {"OWN": config.own_values},
        "clock_adjoint": token | decay | clip | {"M": M, "M0": M0, "M1": M1, "TILES": tiles_of_N},
        "collect": token | {"M": M, "M0": M0, "M1": M1, "TILES": tiles_of_N, "FULL": True, "num_warps": 4},
    }
    return _staged(made)


def _staged(made: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Two stages where nothing else is said: Triton's own default, three, is another kernel than the one the
    table was made with."""
    return {name: {"num_stages": 2} | consts for name, consts in made.items()}


def _shape(config: TitansConfig) -> dict[str, int]:
    layout = Layout.of(config)
    return {"H": config.num_heads, "D": config.head_dim, "N": config.hidden, "MF": len(layout.full),
            "MS": len(layout.scalars),
            "R": layout.rows}


def specializations() -> Iterator[Specialization]:
    """Every kernel on the rows people use and at the corners, in bf16; two clocks and the presets on one row
    each."""
    from . import (
        backward_clock as triton_backward_clock,
    )
    from . import (
        backward_commit as triton_backward_write,
    )
    from . import (
        backward_hidden as triton_backward_hidden,
    )
    from . import (
        backward_read as triton_backward_read,
    )
    from . import (
        backward_tokens as triton_backward_tokens,
    )

    modules = (
        triton_backward_clock, triton_backward_hidden, triton_backward_read, triton_backward_tokens,
        triton_backward_write
    )
    for config, row in _rows():
        made = constants(config, 2)
        made = {
            n: consts | ({"M0": 1, "M1": len(config.memories)} if n == "collect" else {}) for n,
            consts in made.items()
        }
        if not config.self_modifying:
            made = {"read_adjoint": made["read_adjoint"], "collect": made["collect"] | {"M0": 0, "M1": 1}}
        jobs = [(n, consts, row) for n, consts in made.items()]
        for M0, M1, C in clocks(config):
            jobs += [
                (n, consts, f"{row} m={M0}..{M1} C={C}") for n,
                consts in group_constants(config, 2, M0, M1, C).items()
            ]
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


_INPUTS = ("x_p", "read_p", "k_p", "v_p", "eta_bias_p", "alpha_bias_p")  # in the input dtype
_WHOLE = ("slot", "S", "end", "half")
_PRODUCTS = ("reread", "read_adjoint", "errors", "sums", "hidden", "inputs", "outputs", "values")


def _specialization(name: str, fn: Any, consts: dict, row: str) -> Specialization:
    signature = {}
    for arg in fn.arg_names:
        if arg.endswith("_p"):
            signature[arg] = "*i64" if arg in ("lo_p", "hi_p") else "*bf16" if arg in _INPUTS else "*fp32"
        elif arg not in consts:
            signature[arg] = "i64" if arg in _WHOLE else "fp32"
    constexprs = {k: v for k, v in consts.items() if k not in ("num_warps", "num_stages")}
    label, products = (
        f"titans_backward_{name}", name in _PRODUCTS and (name != "values" or consts["OWN"] or consts["MS"] > 0)
    )
    return Specialization(
        label, fn, signature, constexprs, consts["num_warps"], consts["num_stages"], wants_mma=products, row=row)
