"""Which rows of the tile tables an emulated GPU has launched: what the compile report compiles
(compile_report.py), against what tools/ptx/triton_device.py has noted.

A launch and a row are the same path of a kernel if they differ in sizes of the problem alone: the same operands,
switches, tiles and warps, whatever the number of heads, hidden units or tokens of a chunk. (What a kernel never
looks at may have another type in a launch: a stand-in.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import PROVIDERS, leaves, provided
from hope_kernels.ops.shared.triton_build import Specialization
from tools.ptx.triton_device import Launch

# constants that say how much there is, and choose no code; by the folder of ops/ that has the kernel
SIZES = {
    "conv": {"d"}, "output_gate": {"H", "D", "EPS"}, "shared": {"M"},
    "cms": {"D", "N", "K", "ROWS", "COLS", "R", "L", "G_R", "G_L", "O_R", "O_L", "SIZE", "COUNT", "EPS"},
    "titans": {"H", "M", "C", "TILES", "shape.H", "shape.N", "shape.R", "fast.C", "slow.C", "clock.C"},
}


@dataclass(frozen=True)
class Path:
    """One kernel as rows of a table that differ in sizes alone compile it. operands: their type."""

    kernel: str
    arch: int
    operands: str
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    maxnreg: int | None


def of_launch(launch: Launch) -> Path:
    return _path(
        launch.kernel, launch.module, launch.arch, (kind for _, kind in launch.types), dict(launch.constants),
        launch.num_warps, launch.num_stages, launch.maxnreg,
    )


def of_row(spec: Specialization, arch: int) -> Path:
    signature, constants, _ = spec.source()
    return _path(
        spec.fn.__name__, spec.fn.__module__, arch, signature.values(), constants, spec.num_warps, spec.num_stages,
        spec.maxnreg,
    )


def rows(archs: Iterable[int]) -> dict[Path, list[str]]:
    """Every row that the tables offer on these architectures, under its path."""
    found: dict[Path, list[str]] = {}
    for spec in (s for module in PROVIDERS for s in provided(module)):
        for arch in sorted(set(spec.archs) & set(archs)):
            found.setdefault(of_row(spec, arch), []).append(f"{spec.name} [{spec.row}] sm_{arch}")
    return found


def missing(launches: Iterable[Launch], archs: Iterable[int]) -> list[str]:
    """The rows whose paths were never launched."""
    launched = {of_launch(launch) for launch in launches}
    return [name for path, names in rows(archs).items() if path not in launched for name in names]


def _path(
    kernel: str, module: str, arch: int, types: Iterable, constants: dict[str, Any], *options: int | None
) -> Path:
    family = module.removeprefix("hope_kernels.ops.").split(".")[0]
    values = {name: value for name, value in _flat("", constants) if name not in SIZES.get(family, ())}
    return Path(
        f"{family}.{kernel}", arch, _operands(types), tuple(sorted(values.items())), *options
    )


def _operands(types: Iterable) -> str:
    """The narrowest floating type among the pointers: what products are computed in."""
    found = set(leaves(types))
    return next((kind for kind in ("bf16", "fp16") if f"*{kind}" in found), "fp32")


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A group of numbers as numbers with two names."""
    for name, value in values.items():
        if hasattr(value, "_asdict"):
            yield from _flat(f"{prefix}{name}.", value._asdict())
        else:
            yield prefix + name, value
