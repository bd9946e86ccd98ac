"""Gradient of the causal convolution, in one launch and one sum over tiles.

    joined = [tail, x]      y_t = sum_j w[:, j] joined_{t+j}      new tail = joined[n : n + W-1]

    djoined_s = dnew_{s-n} + sum_j w[:, j] dy_{s-j}      dw[:, j] = sum_s joined_s dy_{s-j}

n is the row's length; sums are over the j with 0 <= s-j < n.

[dtail, dx] = djoined. A program owns BS places s of BD channels of one row: it reads joined once, and dy
once per window position (W - 1 of the W reads hit the cache), and uses each number of dy for both sums. Device memory
sees x, dy and dx once, 3 d elements a token, and W / BS fp32 words an element for the partial sums of dw,
which ``triton_sum.py`` adds in one order: bandwidth-bound.

A place of djoined is summed alone, from dnew on and then in the order j = 0, 1, ...: a later call's part
comes first, as it would in one call. So its bits do not depend on the batch or the lengths, and in fp32 not
on how the sequence is split. Products and sums in fp32, rounded once. Nothing after a row's length is read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shared.triton_build import SHARED_KIB, Specialization, aligned
from ...shared.triton_sum import sum_parts

BLOCK_S, BLOCK_D, NUM_WARPS = 64, 64, 8  # compiled for sm_80 to sm_120 without spills, never timed


@triton.jit(do_not_specialize=["T"])
def causal_conv_backward_kernel(
    dy_p, dnew_p, x_p, tail_p, weight_p, lengths_p, dx_p, dtail_p, parts_p, T: tl.int64,
    d: tl.constexpr, W: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):
    """dy, x, dx [B, T, d]; dnew, tail, dtail [B, W-1, d]; weight [d, W]; lengths [B] int32; parts
    [rows * tiles, d, W] fp32. Grid (rows * tiles of places, tiles of channels)."""
    tiles = tl.cdiv(T + (W - 1), BS)
    i_b, i_s, i_d = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    n = tl.minimum(tl.maximum(tl.load(lengths_p + i_b).to(tl.int64), 0), T)  # as in the forward pass
    s = i_s * BS + tl.arange(0, BS)
    c = i_d * BD + tl.arange(0, BD)
    inside = (c < d)[None, :]
    at_x = (i_b * T + s - (W - 1))[:, None] * d + c[None, :]
    at_tail = (i_b * (W - 1) + s)[:, None] * d + c[None, :]
    in_x = inside & (s >= W - 1)[:, None]
    in_tail = inside & (s < W - 1)[:, None]

    joined = tl.load(x_p + at_x, mask=in_x & (s - (W - 1) < n)[:, None], other=0.0)
    g = tl.zeros([BS, BD], tl.float32)
    if W > 1:
        # n = 0 reads no tail
        joined = tl.where(in_tail, tl.load(tail_p + at_tail, mask=in_tail & (n > 0), other=0.0), joined)
        g += tl.load(
            dnew_p + at_tail - n * d, mask=inside & ((s >= n) & (s < n + W - 1))[:, None], other=0.0
        ).to(tl.float32)
    joined = joined.to(tl.float32)
    parts_p += (tl.program_id(0).to(tl.int64) * d + c) * W
    for j in tl.static_range(W):
        t = s - j
        w = tl.load(weight_p + c * W + j, mask=c < d, other=0.0).to(tl.float32)
        dy = tl.load(
            dy_p + at_x + (W - 1 - j) * d, mask=inside & ((t >= 0) & (t < n))[:, None], other=0.0
        ).to(tl.float32)
        g += dy * w[None, :]
        tl.store(parts_p + j, tl.sum(dy * joined, 0), mask=c < d)
    tl.store(dx_p + at_x, g.to(dx_p.dtype.element_ty), mask=in_x & (s < T + (W - 1))[:, None])
    if W > 1:
        tl.store(dtail_p + at_tail, g.to(dtail_p.dtype.element_ty), mask=in_tail)


_library = torch.library.Library("hope_kernels", "FRAGMENT")
_library.define(
    "causal_conv_backward(Tensor dy, Tensor dnew, Tensor x, Tensor tail, Tensor weight, Tensor lengths)"
    " -> (Tensor, Tensor, Tensor)"
)


def _launch(
    dy: Tensor, dnew: Tensor, x: Tensor, tail: Tensor, weight: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, d), W = x.shape, weight.shape[1]
    dy, dnew, x, tail, weight, lengths = map(aligned, (dy, dnew, x, tail, weight, lengths))
    dx, dtail = torch.empty_like(x), torch.empty_like(tail)
    rows = B * triton.cdiv(T + W - 1, BLOCK_S)
    parts = torch.empty(rows, d * W, device=x.device, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(x):
            causal_conv_backward_kernel[(rows, triton.cdiv(d, BLOCK_D))](
                dy, dnew, x, tail, weight, lengths, dx, dtail, parts, T, d=d, W=W, BS=BLOCK_S, BD=BLOCK_D,
                num_warps=NUM_WARPS, num_stages=1,
            )
    return dx, dtail, sum_parts(parts, weight)


_library.impl("causal_conv_backward", _launch, "CPU")  # interpreted or emulated
_library.impl("causal_conv_backward", _launch, "CUDA")


@torch.library.register_fake("hope_kernels::causal_conv_backward", lib=_library)
def _(
    dy: Tensor, dnew: Tensor, x: Tensor, tail: Tensor, weight: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), tail.new_empty(tail.shape), weight.new_empty(weight.shape)


def _no_second_gradient(ctx, *grads):
    raise RuntimeError("causal_conv: the Triton kernel has no second derivative; the chunked backend does")


torch.library.register_autograd("hope_kernels::causal_conv_backward", _no_second_gradient, lib=_library)


def setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx, dy: Tensor, dnew: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of causal_conv's arguments x, tail, weight, lengths."""
    return *torch.ops.hope_kernels.causal_conv_backward(dy, dnew, *ctx.saved_tensors), None


def specializations() -> Iterator[Specialization]:
    """The kernel at the forward pass's rows."""
    for dtype, d, W in (("bf16", 2048, 4), ("bf16", 2048, 8), ("fp16", 1000, 4), ("fp32", 77, 2)):
        data = dict.fromkeys(("dy_p", "dnew_p", "x_p", "tail_p", "weight_p", "dx_p", "dtail_p"), f"*{dtype}")
        yield Specialization(
            "causal_conv_backward", causal_conv_backward_kernel,
            {**data, "lengths_p": "*i32", "parts_p": "*fp32", "T": "i64"},
            {"d": d, "W": W, "BS": BLOCK_S, "BD": BLOCK_D}, NUM_WARPS, num_stages=1,
            row=f"{dtype} d={d} W={W}", archs=tuple(SHARED_KIB),
        )
