"""A gradient for every parameter: zero where a call does not depend on it. DistributedDataParallel waits for
all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def with_zero_gradient(y: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """y, bit for bit, whose graph also reaches ``parameters``. Their values are not read, so a NaN among them
    stays where it is."""
    empty = [p.flatten()[:0] for p in parameters if p.requires_grad]
    # y - 0, for y + 0 would turn -0 into 0
    return y - torch.cat(empty).sum() if empty else y
