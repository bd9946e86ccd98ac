"""Kernels the compile report must catch, and one it must pass: a provider for
tests/benchmarks/test_compile_report.py."""

import triton
import triton.language as tl


@triton.jit
def spilling_kernel(x_p, y_p, BM: tl.constexpr, BN: tl.constexpr):
    """Holds a [BM, BN] tile across two reductions: 256 registers a thread for one warp and 64 x 128."""
    at = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    x = tl.load(x_p + at)
    x = x / tl.sum(x, 1)[:, None]
    tl.store(y_p + at, x * tl.sum(x, 0)[None, :])


@triton.jit
def product_kernel(x_p, y_p, BM: tl.constexpr, IEEE: tl.constexpr):
    """One product of [BM, BM] tiles; IEEE fp32 is not done by the tensor cores."""
    at = tl.arange(0, BM)[:, None] * BM + tl.arange(0, BM)[None, :]
    x = tl.load(x_p + at)
    tl.store(y_p + at, tl.dot(x, x, input_precision="ieee" if IEEE else "tf32"))


def specializations():
    """Plain tuples, in the order of the fields of ``Specialization``."""
    fp32, fp16 = ({"x_p": kind, "y_p": "*fp32"} for kind in ("*fp32", "*fp16"))
    yield "good", product_kernel, fp16, {"BM": 64, "IEEE": False}, 4, 1, True, "fp16", (80, 90, 100)
    yield "spills", spilling_kernel, fp32, {"BM": 64, "BN": 128}, 1, 1, False, "64x128, one warp", (90,)
    yield "no_mma", product_kernel, fp32, {"BM": 16, "IEEE": True}, 4, 1, True, "fp32", (90,)
    yield "refused", product_kernel, fp16, {"BM": 48, "IEEE": False}, 4, 1, True, "48", (90,)
