"""The rows of the tables of tiles: every Triton kernel as every row of its table launches it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Iterator

from hope_kernels.ops.shared.triton_build import Specialization

PROVIDERS = (
    "hope_kernels.ops.conv.triton.forward", "hope_kernels.ops.output_gate.triton.forward",
    "hope_kernels.ops.shared.triton_sum",
    "hope_kernels.ops.titans.triton.tiles", "hope_kernels.ops.titans.triton.carried",
    "hope_kernels.ops.titans.triton.backward_tiles",
    "hope_kernels.ops.cms.triton.tiles",
)


def provided(module: str, full: bool = False) -> Iterator[Specialization]:
    """The rows of one provider, all of them if ``full``; raises ModuleNotFoundError where there is no such
    module."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(module)
    offered = importlib.import_module(module).specializations
    return map(
        Specialization.of, offered(full=True) if full and "full" in inspect.signature(offered).parameters
        else offered()
    )


def leaves(types: Iterable) -> Iterator[str]:
    """The types of a signature's run-time arguments, groups of them flattened."""
    for kind in types:
        if isinstance(kind, tuple):
            yield from leaves(kind)
        elif kind != "constexpr":
            yield kind
