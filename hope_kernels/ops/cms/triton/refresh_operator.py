"""The operator ``cms_refresh_``: an update of one matrix a row by a kernel, or its product by PyTorch's GEMM
(``library.py``)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...shared.triton_build import aligned, filled
from ..level import ADAM_EPS
from . import library
from .operands import on_device
from .refresh import refresh_kernel
from .tiles import GROUP, refresh_tile

_library = torch.library.Library("hope_kernels", "FRAGMENT")
_library.define(
    "cms_refresh_(Tensor(a!) weight, Tensor(b!)? copy, Tensor? left, Tensor? right, int[] rows, float lr, float beta, "
    "Tensor(c!)? moment, float mu, Tensor(d!)? total, Tensor(e!)? square=None, float beta2=0.0, "
    "float first=0.0, float second=0.0, float root=0.0, Tensor? late=None) -> ()"
)


class _Held(NamedTuple):
    """What an update may read and write, each [B, r, c]; copy in the inputs' dtype, the rest in fp32. late: as in
    ``Adam``, for all rows."""

    weight: Tensor
    copy: Tensor | None
    moment: Tensor | None
    square: Tensor | None
    total: Tensor | None
    late: Tensor | None = None

    def rows(self) -> tuple[Tensor | None, ...]:
        """Those that have one matrix a row."""
        return self[:-1]

    def only(self, b: int) -> _Held:
        return _Held(*(None if t is None else t[b : b + 1] for t in self.rows()), self.late)


def _launch_refresh(
    weight, copy, left, right, rows, lr, beta, moment, mu, total, square=None, beta2=0.0, first=0.0,
    second=0.0, root=0.0, late=None,
) -> None:
    held, rates = _Held(weight, copy, moment, square, total, late), (lr, mu, beta, beta2, first, second, root)
    if any(t is not None and (not t.is_contiguous() or t.data_ptr() % 16) for t in held.rows()):
        raise ValueError(
            "cms refresh_: what is updated in place is expected contiguous, at a multiple of 16 bytes"
        )
    if not rows or not weight[0].numel():
        return
    with torch.cuda.device_of(weight):
        if left is None or not library.serves(left, right, moment is not None or total is not None):
            _update(held, left, right, rows, rates, clear=total is not None)
        else:
            _update_by_library(held, library.placed(left), library.placed(right), rows, rates)


def _update_by_library(held: _Held, left: Tensor, right: Tensor, rows: list[int], rates: tuple) -> None:
    """The product by ``library.py``, row by row, and what it does not do by ``refresh_kernel`` without one."""
    lr, mu, beta, *_ = rates
    if held.total is not None:
        for b in rows:
            library.add_product_(held.total[b], left[b], right[b], 1.0, 1.0)
        _update(held, None, None, rows, rates, clear=True)
    elif held.square is not None:
        grad = torch.empty_like(held.weight[:1])
        for b in rows:
            library.add_product_(grad[0], left[b], right[b], 0.0, 1.0)
            _update(held.only(b)._replace(total=grad), None, None, [0], rates, clear=False)
    elif held.moment is not None:
        for b in rows:
            library.add_product_(held.moment[b], left[b], right[b], mu, 1.0)
        _update(held._replace(moment=None, total=held.moment), None, None, rows, rates, clear=False)
    else:
        for b in rows:
            library.add_product_(held.weight[b], left[b], right[b], beta, -lr)
            if held.copy is not None:
                held.copy[b].copy_(held.weight[b])


def _update(
    held: _Held, left: Tensor | None, right: Tensor | None, rows: list[int], rates: tuple, clear: bool
) -> None:
    """``refresh_kernel``. clear: what is held as the total becomes zero."""
    weight, copy, moment, square, total, late = held
    (_, r, c), C = weight.shape, 0 if left is None else left.shape[1]
    tile = refresh_tile(
        4 if left is None else left.itemsize, left is not None, moment is not None or total is not None
    )
    factors = [aligned(t) for t in filled((left, right), weight)]
    refresh_kernel[(triton.cdiv(r, tile.BM) * triton.cdiv(c, tile.BN), len(rows))](
        *filled((weight, copy, moment, square, total), weight), *factors,
        on_device(tuple(rows), weight.device), weight if late is None else late, C, *rates, ROWS=r, COLS=c,
        PRODUCT=left is not None, MOMENT=moment is not None, ADAM=square is not None, TOTAL=total is not None,
        COPY=copy is not None, CLEAR=clear, READ=rates[2] != 0, LATE=late is not None, EPS=ADAM_EPS, GROUP=GROUP,
        **tile.sizes(), **tile.options(),
    )


_library.impl("cms_refresh_", _launch_refresh, "CPU")  # interpreted or emulated
_library.impl("cms_refresh_", _launch_refresh, "CUDA")


@torch.library.register_fake("hope_kernels::cms_refresh_", lib=_library)
def _(weight, *rest):
    return None
