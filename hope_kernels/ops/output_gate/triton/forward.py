"""Norm per head, gain and gate in one pass: y = o / sqrt(mean(o^2) + eps) * gain * silu(gate); norm with
gain, or gate, may be off.

[B, T, H, D] and [B, T, H D] are one matrix of B T H rows of D numbers, row r belonging to head r mod H. A
program owns BR rows and the whole width, so the mean is one reduction inside a tile and every number is read
once and written once: 3 d elements a token, bandwidth-bound. No shared memory beyond what the reduction
across threads takes.

The reduction runs over a tile row of fixed width next_power_of_2(D), zeros after D: its order depends on D
alone, so a row's result does not depend on its neighbours, on B or on T, bit for bit. fp32 inside, one
rounding at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....check import check_tensor
from ...shared.triton_build import DTYPES, SHARED_KIB, Specialization, aligned
from ..forward import EPS
from . import backward

TILE, NUM_WARPS = 2048, 4  # elements a program; compiled for sm_80 to sm_120 without spills, never timed
MAX_WIDTH = 8192


@triton.jit(do_not_specialize=["rows"])
def output_gate_kernel(
    o_p, gain_p, gate_p, y_p, rows: tl.int64, H: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_GATE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):
    """o, gate, y [rows, D], rows = B T H; gain [H, D]. Grid (rows / BR)."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    c = tl.arange(0, BD)
    inside = (r < rows)[:, None] & (c < D)[None, :]
    at = r[:, None] * D + c[None, :]
    y = tl.load(o_p + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        gain = tl.load(gain_p + (r % H)[:, None] * D + c[None, :], mask=inside, other=0.0).to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, 1) / D + EPS)[:, None] * gain
    if HAS_GATE:
        gate = tl.load(gate_p + at, mask=inside, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
    tl.store(y_p + at, y.to(y_p.dtype.element_ty), mask=inside)


def _tile(D: int) -> dict[str, int]:
    width = triton.next_power_of_2(D)
    return {"BR": max(1, TILE // width), "BD": width}


_library = torch.library.Library("hope_kernels", "FRAGMENT")
_library.define("output_gate(Tensor o, Tensor? gain, Tensor? gate) -> Tensor")


def _launch(o: Tensor, gain: Tensor | None, gate: Tensor | None) -> Tensor:
    B, T, H, D = o.shape
    o = aligned(o)
    gain, gate = (None if t is None else aligned(t) for t in (gain, gate))
    y = torch.empty_like(o).flatten(2)
    tile, rows = _tile(D), B * T * H
    if rows:
        with torch.cuda.device_of(o):
            output_gate_kernel[(triton.cdiv(rows, tile["BR"]),)](
                o, o if gain is None else gain, o if gate is None else gate, y, rows, H=H, D=D, EPS=EPS,
                HAS_NORM=gain is not None, HAS_GATE=gate is not None, **tile, num_warps=NUM_WARPS, num_stages=1,
            )
    return y


_library.impl("output_gate", _launch, "CPU")  # interpreted or emulated
_library.impl("output_gate", _launch, "CUDA")


@torch.library.register_fake("hope_kernels::output_gate", lib=_library)
def _(o: Tensor, gain: Tensor | None, gate: Tensor | None) -> Tensor:
    B, T, H, D = o.shape
    return o.new_empty(B, T, H * D)


torch.library.register_autograd(
    "hope_kernels::output_gate", backward.backward, setup_context=backward.setup_context, lib=_library
)


def output_gate_triton(o: Tensor, gain: Tensor | None, gate: Tensor | None) -> Tensor:
    """``output_gate_chunked`` in one pass: [B, T, d]; a row's bits depend on that row alone; differentiable once.

    o: [B, T, H, D], D <= 8192. gain: [H, D] and gate: [B, T, d], d = H D, in its dtype; None is no norm or no
    gate, and without both the result is a view of o.
    Raises ValueError for other shapes, dtypes or devices, TypeError for non-tensors.
    """
    name = "output_gate"
    s = check_tensor(name, "o", o, ("B", "T", "H", "D"))
    if o.dtype not in DTYPES:
        raise ValueError(f"{name}: argument o has dtype {o.dtype}, expected one of {list(DTYPES)}")
    if not 1 <= s["D"] <= MAX_WIDTH:
        raise ValueError(f"{name}: argument o has heads of width {s['D']}, expected 1 to {MAX_WIDTH}")
    if gain is not None:
        check_tensor(name, "gain", gain, (s["H"], s["D"]), dtype=o.dtype, device=o.device)
    if gate is not None:
        check_tensor(name, "gate", gate, (s["B"], s["T"], s["H"] * s["D"]), dtype=o.dtype, device=o.device)
    if gain is None and gate is None:
        return o.flatten(2)
    return torch.ops.hope_kernels.output_gate(o, gain, gate)


def specializations() -> Iterator[Specialization]:
    """The kernels per dtype and head width, 77 is no power of two; and with norm or gate off."""
    for dtype, H, D, norm, gate in (
        ("bf16", 32, 64, True, True), ("fp16", 16, 128, True, True), ("fp32", 3, 77, True, True),
        ("bf16", 1, 2048, True, True),
        ("fp32", 1, MAX_WIDTH, True, True), ("bf16", 32, 64, False, True), ("bf16", 32, 64, True, False),
    ):
        data = dict.fromkeys(("o_p", "gain_p", "gate_p", "y_p"), f"*{dtype}")
        yield Specialization(
            "output_gate", output_gate_kernel, {**data, "rows": "i64"},
            {"H": H, "D": D, "EPS": EPS, "HAS_NORM": norm, "HAS_GATE": gate, **_tile(D)}, NUM_WARPS, num_stages=1,
            row=f"{dtype} H={H} D={D} norm={norm:d} gate={gate:d}", archs=tuple(SHARED_KIB),
        )
    yield from backward.specializations()
