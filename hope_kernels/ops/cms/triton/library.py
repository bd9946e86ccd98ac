"""Updates of large matrices by long segments: the product by PyTorch's GEMM (cuBLAS), which adds in fp32 to
what is updated, in place of the kernel of ``refresh.py``.

    target <- beta target + alpha left^T right      left [C, r], right [C, c] in 16 bits, target [r, c] fp32

    gd              weight += -lr E^T A             then the rounded copy, 6 bytes a weight
    with a total    total += E^T A                  then ``refresh_kernel`` without a product
    momentum        moment = mu moment + E^T A      then the same, with the moment for f
    adam            scratch = E^T A, row by row     then the same

**When.** Our kernel reads the factors from L2 with tiles of 128 x 64: 3 C / 64 bytes a weight, at 4.5 (A100)
to 5.5 TB/s (H200). The library reaches some 80% of the tensor cores' rate, but the matrix is read and written
once more. The kernel's time divided by the library's, from those bytes and 2 C FLOPs a weight, with the rates
of benchmarks/budget/bounds.py:

    C                           512     1024     2048     4096
    gd             H200         1.9      2.6      2.9      3.1
                   A100         0.9      1.1      1.2      1.2
    momentum       H200         1.5      2.1      2.5      2.8
                   A100         0.8      0.9      1.0      1.1
    adam           H200         1.1      1.4      1.8      2.3
                   A100         0.7      0.7      0.8      1.0

So gd takes the library from ``LONG`` tokens on, and a step with another pass over the matrix from twice as
many. The library costs some launches, one of them for each row: below ``LARGE`` FLOPs a row they are more
than what it saves. Nothing of this was timed.

**Bits.** A row's product is one call with the row's own matrices: sizes, strides, types and the alignment of
all three pointers are the same for every row and in any company (``serves`` asks for widths that make it so,
``placed`` sees to the start of the factors). For equal calls cuBLAS promises equal bits, on one kind of GPU
and in one version, where one stream is at work or every stream has a workspace of its own, which PyTorch
gives it. It promises nothing for a batched product, whose kernel may follow from the number of rows, so rows
are taken one by one; nor for another C, so a level's segments all come with as many tokens, the last of a
shorter one being zeros (``whole_segments`` asks ``absorb`` for them). PyTorch's tuning of GEMMs by trial
(TunableOp), where somebody has turned it on, takes the promise away.
"""

from __future__ import annotations

import torch
from torch import Tensor

LONG = 1024  # tokens
LARGE = 2**32  # FLOPs of a row's product
ALIGNMENT = 256  # bytes: cuBLAS may choose another kernel for pointers at smaller multiples


def serves(left: Tensor, right: Tensor, pass_after: bool) -> bool:
    """Whether the library multiplies left [B, C, r] and right [B, C, c] into a matrix; pass_after: a kernel
    then goes through it. It follows from types and shapes, whatever the number of rows."""
    (_, C, r), c = left.shape, right.shape[2]
    alike = r % 8 == c % 8 == 0 and C * r % 128 == C * c % 128 == 0  # every row at a multiple of ALIGNMENT
    return left.itemsize == 2 and C >= (2 * LONG if pass_after else LONG) and 2 * C * r * c >= LARGE and alike


def whole_segments(C: int) -> bool:
    """Whether updates by segments of up to C tokens must be given C, zeros after the last one: another number
    is another product, and may be one of our kernel."""
    return C >= LONG


def placed(t: Tensor) -> Tensor:
    """t, contiguous and starting at a multiple of ``ALIGNMENT``, as every allocation on a GPU does."""
    t = t.contiguous()
    return t if t.data_ptr() % ALIGNMENT == 0 else t.clone()


def add_product_(target: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> None:
    """target [r, c] <- beta target + alpha left^T right, in place; beta = 0 ignores what target holds. On a
    CPU, where PyTorch adds no product of 16-bit numbers in fp32, of the factors in fp32."""
    if target.is_cpu:
        target.addmm_(left.mT.to(target.dtype), right.to(target.dtype), beta=beta, alpha=alpha)
    else:
        torch.addmm(target, left.mT, right, out_dtype=target.dtype, beta=beta, alpha=alpha, out=target)
