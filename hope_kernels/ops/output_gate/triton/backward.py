"""Gradient of norm, gain and gate, in one pass and one sum over tiles.

    scale = 1 / sqrt(mean(o^2) + eps)      u = o scale      y = u gain silu(gate)
    h = dy silu(gate)      sig = sigmoid(gate)

    dgate = dy u gain sig (1 + gate (1 - sig))      dgain = sum_tokens h u
    do = scale (h gain - u mean(h gain u))

without the norm: u = o, gain = 1, do = h; without the gate: h = dy. A program owns SPAN tokens of one head,
BR at a time, and the whole width: the means are reductions inside a tile, every number is read once and
written once (5 d elements a token), and dgain's partial sums stay in registers until they leave as one fp32
row a program, which ``triton_sum.py`` adds in one order: bandwidth-bound.

A row's do and dgate depend on that row alone, bit for bit: the tile's width follows from D. fp32 inside, one
rounding at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shared.triton_build import SHARED_KIB, Specialization, aligned
from ...shared.triton_sum import sum_parts
from ..forward import EPS

# elements a step, least tokens a program; compiled for sm_80 to sm_120 without spills, never timed
TILE, SPAN = 2048, 32


@triton.jit(do_not_specialize=["tokens"])
def output_gate_backward_kernel(
    dy_p, o_p, gain_p, gate_p, do_p, dgate_p, parts_p, tokens: tl.int64, H: tl.constexpr, D: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_GATE: tl.constexpr, SPAN: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):
    """dy, o, gate, do, dgate [tokens, H, D], tokens = B T; gain [H, D]; parts [tokens / SPAN, H, D] fp32.
    Grid (tokens / SPAN, H)."""
    start, h = tl.program_id(0).to(tl.int64) * SPAN, tl.program_id(1)
    i = tl.arange(0, BR)
    c = tl.arange(0, BD)
    dgain = tl.zeros([BR, BD], tl.float32)
    for step in range(0, SPAN, BR):
        r = start + step + i
        inside = (r < tokens)[:, None] & (c < D)[None, :]
        at = (r * H + h)[:, None] * D + c[None, :]
        u = tl.load(o_p + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_p + at, mask=inside, other=0.0).to(tl.float32)
        dh = dy
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(u * u, 1) / D + EPS)[:, None]
            u *= scale
            # held across steps, D = 8192 spills
            gain = tl.load(gain_p + h * D + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
        if HAS_GATE:
            gate = tl.load(gate_p + at, mask=inside, other=0.0).to(tl.float32)
            sig = tl.sigmoid(gate)
            dh = dy * (gate * sig)
            dgate = dy * u * (sig * (1.0 + gate * (1.0 - sig)))
            if HAS_NORM:
                dgate *= gain
            tl.store(dgate_p + at, dgate.to(dgate_p.dtype.element_ty), mask=inside)
        do = dh
        if HAS_NORM:
            dgain += dh * u
            du = dh * gain
            do = scale * (du - u * (tl.sum(du * u, 1) / D)[:, None])
        tl.store(do_p + at, do.to(do_p.dtype.element_ty), mask=inside)
    if HAS_NORM:
        tl.store(parts_p + (tl.program_id(0).to(tl.int64) * H + h) * D + c, tl.sum(dgain, 0), mask=c < D)


def _tile(D: int) -> dict[str, int]:
    width = triton.next_power_of_2(D)
    rows = max(1, TILE // width)
    return {"SPAN": max(SPAN, rows), "BR": rows, "BD": width}


def _warps(D: int) -> int:
    return max(4, triton.next_power_of_2(D) // 1024)


_library = torch.library.Library("hope_kernels", "FRAGMENT")
_library.define("output_gate_backward(Tensor dy, Tensor o, Tensor? gain, Tensor? gate) -> (Tensor, Tensor, Tensor)")


def _launch(dy: Tensor, o: Tensor, gain: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """do, dgain, dgate; empty for an argument that is None."""
    B, T, H, D = o.shape
    dy, o = aligned(dy), aligned(o)
    gain, gate = (None if t is None else aligned(t) for t in (gain, gate))
    do, dgate = torch.empty_like(o), o.new_empty(0) if gate is None else torch.empty_like(gate)
    tile = _tile(D)
    tiles = triton.cdiv(B * T, tile["SPAN"])
    parts = torch.empty(0 if gain is None else tiles, H * D, device=o.device, dtype=torch.float32)
    if tiles:
        with torch.cuda.device_of(o):
            output_gate_backward_kernel[(tiles, H)](
                dy, o, o if gain is None else gain, o if gate is None else gate, do, dgate, parts, B * T, H=H,
                D=D, EPS=EPS,
                HAS_NORM=gain is not None, HAS_GATE=gate is not None, **tile, num_warps=_warps(D), num_stages=1,
            )
    return do, o.new_empty(0) if gain is None else sum_parts(parts, gain), dgate


_library.impl("output_gate_backward", _launch, "CPU")  # interpreted or emulated
_library.impl("output_gate_backward", _launch, "CUDA")


@torch.library.register_fake("hope_kernels::output_gate_backward", lib=_library)
def _(dy: Tensor, o: Tensor, gain: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return o.new_empty(o.shape), *(o.new_empty(0 if t is None else t.shape) for t in (gain, gate))


def _no_second_gradient(ctx, *grads):
    raise RuntimeError("output_gate: the Triton kernel has no second derivative; the chunked backend does")


torch.library.register_autograd("hope_kernels::output_gate_backward", _no_second_gradient, lib=_library)


def setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of output_gate's arguments o, gain, gate."""
    o, gain, gate = ctx.saved_tensors
    do, dgain, dgate = torch.ops.hope_kernels.output_gate_backward(dy, o, gain, gate)
    return do, None if gain is None else dgain, None if gate is None else dgate


def specializations() -> Iterator[Specialization]:
    """The kernel at the forward pass's rows."""
    for dtype, H, D, norm, gate in (
        ("bf16", 32, 64, True, True), ("fp16", 16, 128, True, True), ("fp32", 3, 77, True, True),
        ("bf16", 1, 2048, True, True),
        ("fp32", 1, 8192, True, True), ("bf16", 32, 64, False, True), ("bf16", 32, 64, True, False),
    ):
        data = dict.fromkeys(("dy_p", "o_p", "gain_p", "gate_p", "do_p", "dgate_p"), f"*{dtype}")
        yield Specialization(
            "output_gate_backward", output_gate_backward_kernel, {**data, "parts_p": "*fp32", "tokens": "i64"},
            {"H": H, "D": D, "EPS": EPS, "HAS_NORM": norm, "HAS_GATE": gate, **_tile(D)}, _warps(D), num_stages=1,
            row=f"{dtype} H={H} D={D} norm={norm:d} gate={gate:d}", archs=tuple(SHARED_KIB),
        )
