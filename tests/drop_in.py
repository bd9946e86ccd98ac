"""What the tests of the drop-in class share: the same layer in both packages, and what a state holds.

Importing it skips a test file where nested-learning is not installed.
"""

import pytest
import torch
from torch import Tensor

from hope_kernels.compat import nested_learning as ours

oracle = pytest.importorskip("nested_learning.titan.self_modifying")

D = 5
PARTS = ("w1", "w2", "w_skip")
FIELDS = PARTS + tuple(f"m_{p}" for p in PARTS)


def pair(dtype=torch.float64, **options):
    """The same layer in both packages; weights large enough and steps long enough that the memories really move."""
    torch.manual_seed(0)
    options = {"dim": D, "eta_scale": 0.1, **options}
    theirs = oracle.SelfModifyingTitans(oracle.SelfModifyingTitansConfig(**options)).to(dtype)
    mine = ours.SelfModifyingTitans(ours.SelfModifyingTitansConfig(**options)).to(dtype)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|: a memory that alpha has worn down to 1e-6 is held to its own size."""
    error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()
    return error if error == error else float("inf")


def tensors(state) -> dict:
    return {
        (name, field): t for name in ours.NAMES for field in FIELDS
        if (t := getattr(getattr(state, name), field)) is not None
    }


def worst(state, expected) -> float:
    a, b = tensors(state), tensors(expected)
    assert a.keys() == b.keys() and all(a[key].shape == b[key].shape for key in a)
    return max(relative(a[key], b[key]) for key in a)


def read_all(layer, xs, **sizes):
    """The outputs of consecutive calls, and the state after them."""
    state, outputs = layer.init_fast_state(), []
    for x in xs:
        y, state = layer.forward_with_updates(x, state, **sizes)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def moved(layer, state) -> float:
    """The least that a memory which learns has changed, over its weights."""
    start, skip = layer.init_fast_state(), {"q": not layer.config.adaptive_q, "alpha": not layer.config.use_alpha}

    def change(name: str) -> float:
        after, before = getattr(state, name), getattr(start, name)
        return max(float((getattr(after, part) - getattr(before, part)).abs().max()) for part in ("w1", "w2"))

    return min(change(name) for name in ours.NAMES if not skip.get(name))
