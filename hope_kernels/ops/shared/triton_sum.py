"""The second stage of a gradient shared by all tokens: out_m = sum_p parts[p, m], in one order.

The kernels before it leave one fp32 row of partial sums a tile. A program owns BM columns and walks down the
P rows, BP at a time: lane i adds rows i, i + BP, ... in that order, then the lanes are added. No atomics: the
order depends on P alone, so a gradient has the same bits in every run. Bytes: 4 P M read once, a few
hundredths of what the first stage moves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_build import SHARED_KIB, Specialization

BLOCK_P, BLOCK_M, NUM_WARPS = 16, 64, 4  # compiled for sm_80 to sm_120 without spills, never timed


@triton.jit(do_not_specialize=["P"])
def sum_kernel(parts_p, out_p, P: tl.int64, M: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr):
    """parts [P, M] fp32; out [M]. Grid (M / BM)."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i = tl.arange(0, BP)
    lanes = tl.zeros([BP, BM], tl.float32)
    for first in range(0, P, BP):
        p = first + i.to(tl.int64)
        lanes += tl.load(parts_p + p[:, None] * M + m[None, :], mask=(p < P)[:, None] & (m < M)[None, :], other=0.0)
    tl.store(out_p + m, tl.sum(lanes, 0).to(out_p.dtype.element_ty), mask=m < M)


def sum_parts(parts: Tensor, like: Tensor) -> Tensor:
    """parts [P, M] fp32 summed over P: the shape and dtype of ``like``, which has M elements; both
    contiguous. P = 0 gives zeros."""
    out = torch.empty_like(like)
    P, M = parts.shape
    if M:
        with torch.cuda.device_of(parts):
            sum_kernel[(triton.cdiv(M, BLOCK_M),)](
                parts, out, P, M=M, BP=BLOCK_P, BM=BLOCK_M, num_warps=NUM_WARPS, num_stages=1
            )
    return out


def specializations() -> Iterator[Specialization]:
    """The kernel per dtype; 231 columns fill no tile."""
    for dtype, M in (("bf16", 8192), ("fp16", 4000), ("fp32", 231)):
        yield Specialization(
            "sum", sum_kernel, {"parts_p": "*fp32", "out_p": f"*{dtype}", "P": "i64"},
            {"M": M, "BP": BLOCK_P, "BM": BLOCK_M},
            NUM_WARPS, num_stages=1, row=f"{dtype} M={M}", archs=tuple(SHARED_KIB),
        )
