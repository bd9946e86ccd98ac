"""Causal depthwise convolution with a carried tail and ragged rows, in one launch.

    joined = [tail, x]      y_t = sum_{j < W} w[:, j] joined_{t+j}      new tail = joined[n : n + W-1]

n is the row's length. A program owns BT tokens of BD channels of one row. It reads the tile once per window
position: W - 1 of the W reads hit the cache, so device memory sees x once and y once, 2 d elements a token at
2 W FLOPs an element: bandwidth-bound on every GPU. Shared memory only turns the weights' layout (a few
hundred bytes). The first program along the tokens also copies the new tail, so decoding (T = 1) is one launch
too.

The W products of a token are added in the order j = 0, 1, ... whether a factor comes from the tail or from x,
and no other token takes part: the result does not depend on how a sequence is split into calls, on the batch
or on the lengths, bit for bit. Inputs of one dtype; products and sums in fp32; y is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....check import check_tensor
from ...shared.triton_build import DTYPES, SHARED_KIB, Specialization, aligned
from . import backward

MAX_WINDOW = 8
BLOCK_T, BLOCK_D, NUM_WARPS = 16, 128, 4  # compiled for sm_80 to sm_120 without spills, never timed


@triton.jit(do_not_specialize=["T"])
def causal_conv_kernel(
    x_p, tail_p, weight_p, lengths_p, y_p, new_tail_p, T: tl.int64, d: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr
):
    """x, y [B, T, d]; tail, new_tail [B, W-1, d]; weight [d, W]; lengths [B] int32. Grid (rows * tiles of
    tokens, tiles of channels)."""
    tiles = tl.maximum(tl.cdiv(T, BT), 1)
    i_b, i_t, i_d = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    # a length that lies on the device has not been checked
    n = tl.minimum(tl.maximum(tl.load(lengths_p + i_b).to(tl.int64), 0), T)
    t = i_t * BT + tl.arange(0, BT)
    c = i_d * BD + tl.arange(0, BD)
    x_p += i_b * T * d + c[None, :]
    tail_p += i_b * (W - 1) * d + c[None, :]
    inside = (c < d)[None, :]

    y = tl.zeros([BT, BD], tl.float32)
    for j in tl.static_range(W):
        s = t[:, None] + (j - (W - 1))  # position in x; before 0 the tail
        w = tl.load(weight_p + c * W + j, mask=c < d, other=0.0).to(tl.float32)
        u = tl.load(x_p + s * d, mask=inside & (s >= 0) & (t < n)[:, None], other=0.0)
        if j < W - 1:
            u = tl.where(s < 0, tl.load(tail_p + (s + W - 1) * d, mask=inside & (s < 0), other=0.0), u)
        y += u.to(tl.float32) * w[None, :]
    y = tl.where((t < n)[:, None], y, 0.0)
    tl.store(
        y_p + (i_b * T + t[:, None]) * d + c[None, :], y.to(y_p.dtype.element_ty), mask=inside & (t < T)[:, None]
    )

    if i_t == 0:
        for i in tl.static_range(W - 1):
            last = n + i - (W - 1)
            from_tail = tl.load(tail_p + (last + W - 1) * d, mask=inside & (last < 0))
            from_x = tl.load(x_p + last * d, mask=inside & (last >= 0))
            tl.store(
                new_tail_p + (i_b * (W - 1) + i) * d + c[None, :], tl.where(last < 0, from_tail, from_x),
                mask=inside
            )


_library = torch.library.Library("hope_kernels", "FRAGMENT")
_library.define("causal_conv(Tensor x, Tensor tail, Tensor weight, Tensor lengths) -> (Tensor, Tensor)")


def _launch(x: Tensor, tail: Tensor, weight: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    (B, T, d), W = x.shape, weight.shape[1]
    x, tail, weight, lengths = aligned(x), aligned(tail), aligned(weight), aligned(lengths)
    y, new_tail = torch.empty_like(x), torch.empty_like(tail)
    if B:
        grid = (B * max(1, triton.cdiv(T, BLOCK_T)), triton.cdiv(d, BLOCK_D))
        with torch.cuda.device_of(x):
            causal_conv_kernel[grid](
                x, tail, weight, lengths, y, new_tail, T, d=d, W=W, BT=BLOCK_T, BD=BLOCK_D,
                num_warps=NUM_WARPS, num_stages=1
            )
    return y, new_tail


_library.impl("causal_conv", _launch, "CPU")  # interpreted or emulated
_library.impl("causal_conv", _launch, "CUDA")


@torch.library.register_fake("hope_kernels::causal_conv", lib=_library)
def _(x: Tensor, tail: Tensor, weight: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), tail.new_empty(tail.shape)


torch.library.register_autograd(
    "hope_kernels::causal_conv", backward.backward, setup_context=backward.setup_context, lib=_library
)


def causal_conv_triton(
    x: Tensor, tail: Tensor, weight: Tensor, lengths: list[int] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """``causal_conv_chunked`` in one launch: (y [B, T, d], new tail [B, W-1, d]), bit-identical for any
    split; differentiable once.

    x: [B, T, d]. tail: [B, W-1, d] and weight: [d, W] in its dtype, W <= 8. lengths: [B] in 0..T; a tensor on
    the device costs no sync; None is T for every row. y is zero after a row's length, whatever x holds
    there, and so is the gradient of x; a row of length 0 keeps its tail bit for bit.
    Raises ValueError for other shapes, dtypes or devices, TypeError for non-tensors.
    """
    name = "causal_conv"
    sizes = check_tensor(name, "x", x, ("B", "T", "d"))
    B, d = sizes["B"], sizes["d"]
    W = check_tensor(name, "weight", weight, (d, "W"), dtype=x.dtype, device=x.device)["W"]
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: argument x has dtype {x.dtype}, expected one of {list(DTYPES)}")
    if not 1 <= W <= MAX_WINDOW:
        raise ValueError(f"{name}: argument weight has a window of {W}, expected 1 to {MAX_WINDOW}")
    check_tensor(name, "tail", tail, (B, W - 1, d), dtype=x.dtype, device=x.device)
    if lengths is None:
        lengths = torch.full((B,), sizes["T"], dtype=torch.int32, device=x.device)
    lengths = torch.as_tensor(lengths, dtype=torch.int32, device=x.device)
    check_tensor(name, "lengths", lengths, (B,))
    return torch.ops.hope_kernels.causal_conv(x, tail, weight, lengths)


def specializations() -> Iterator[Specialization]:
    """The kernels per dtype, at even and odd widths, small and large windows."""
    for dtype, d, W in (("bf16", 2048, 4), ("bf16", 2048, MAX_WINDOW), ("fp16", 1000, 4), ("fp32", 77, 2)):
        data = dict.fromkeys(("x_p", "tail_p", "weight_p", "y_p", "new_tail_p"), f"*{dtype}")
        yield Specialization(
            "causal_conv", causal_conv_kernel, {**data, "lengths_p": "*i32", "T": "i64"},
            {"d": d, "W": W, "BT": BLOCK_T, "BD": BLOCK_D},
            NUM_WARPS, num_stages=1, row=f"{dtype} d={d} W={W}", archs=tuple(SHARED_KIB),
        )
    yield from backward.specializations()
