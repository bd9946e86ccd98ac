"""PyTorch's operations on lists of tensors, as torch.optim uses them: one launch for many of a GPU."""

from __future__ import annotations

from typing import Any

import torch

_torch: Any = torch  # they have no public names yet

add, add_, mul_ = _torch._foreach_add, _torch._foreach_add_, _torch._foreach_mul_
lerp, lerp_ = _torch._foreach_lerp, _torch._foreach_lerp_
addcmul_, zero_ = _torch._foreach_addcmul_, _torch._foreach_zero_
eager = _torch._disable_dynamo  # torch.compile runs the function as it is; does not import the compiler
