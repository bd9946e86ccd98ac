"""What the Triton kernels share: the types they serve, how tensors reach them, and what compiling them
without a GPU takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

# served by the Triton kernels, with Triton's names
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# sm_: what a block may ask for (CUDA programming guide)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def aligned(t: torch.Tensor) -> torch.Tensor:
    """t, contiguous and starting at a multiple of 16 bytes. Triton compiles another kernel for other
    addresses, with threads laid out otherwise: a reduction would change its order, and with it its last
    bits."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def filled(found: Iterable[torch.Tensor | None], stand_in: torch.Tensor) -> list[torch.Tensor]:
    """``found`` with ``stand_in`` for what a layer does not have: a pointer needs a tensor of its type, which
    the kernel never looks at."""
    return [stand_in if t is None else t for t in found]


@dataclass(frozen=True)
class Specialization:
    """One kernel as one table row launches it. A module with kernels offers ``specializations()``, which
    yields them.

    name: of the kernel. fn: its ``@triton.jit`` function. signature: argument -> Triton type ("*bf16", "i64",
    "fp32"), or a tuple of them for a group of arguments; "constexpr" may be left out. constexprs: argument ->
    value. wants_mma: the tensor cores must do its products. row: the table row, for people. archs: compute
    capabilities it is offered on (90 is sm_90). attrs: as ``ASTSource`` takes them, {path of indices: [[name,
    value]]}; None: every pointer is a multiple of 16 bytes (``aligned``), nothing is known about integers.
    maxnreg: registers a thread may have.
    """

    name: str
    fn: Any
    signature: dict[str, str | tuple]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    wants_mma: bool = False
    row: str = ""
    archs: tuple[int, ...] = (80, 90, 100)
    attrs: dict | None = None
    maxnreg: int | None = None

    @classmethod
    def of(cls, other: Any) -> Specialization:
        """From a tuple in the order of the fields, or from any object that has them; what it lacks takes its
        default."""
        if isinstance(other, cls):
            return other
        if type(other) is tuple:
            return cls(*other)
        return cls(**{f.name: getattr(other, f.name) for f in fields(cls) if hasattr(other, f.name)})

    def source(self) -> tuple[dict[str, str | tuple], dict, dict]:
        """(signature, constexprs, attrs) with every argument, in the kernel's order, for
        ``triton.compiler.ASTSource``."""
        signature = {
            arg: "constexpr" if arg in self.constexprs else self.signature[arg] for arg in self.fn.arg_names
        }
        if self.attrs is not None:
            return signature, self.constexprs, self.attrs
        attrs = {path: [["tt.divisibility", 16]] for path in _pointers(tuple(signature.values()))}
        return signature, self.constexprs, attrs


def _pointers(kinds: tuple, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Where pointers stand in a signature, groups included."""
    for i, kind in enumerate(kinds):
        if isinstance(kind, tuple):
            yield from _pointers(kind, (*path, i))
        elif kind.startswith("*"):
            yield (*path, i)
