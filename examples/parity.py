"""Which backend a training goes through: the package's choice, if its gradients are as good as the chunked one's."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_kernels import HopeForCausalLM


def gradient(model: HopeForCausalLM, ids: Tensor, backend: str | None) -> Tensor:
    """[P] fp64, of the mean loss of ids [B, T + 1]."""
    logits, _ = model(ids[:, :-1], backend=backend)
    loss = F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten())
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([g.double().flatten() for g in found])


def trusted(model: HopeForCausalLM, ids: Tensor, chosen: str | None = None) -> tuple[str | None, float, float]:
    """(backend to train with, error of the gradient by ``chosen``, error by "chunked").

    Errors are relative, against the chunked backend in fp64. chosen (None: the package's choice) is trusted up to
    twice the error of "chunked", and as much as fp32 rounds a sum to; beyond, or where it is not finite, or
    refuses, "chunked" is what is returned.
    """
    exact = gradient(copy.deepcopy(model).double(), ids, "chunked")
    error = lambda found: float((found - exact).norm() / exact.norm())
    known = error(gradient(model, ids, "chunked"))
    try:
        own = error(gradient(model, ids, chosen))
    except Exception as refused:  # a kernel that does not compile raises what its compiler likes
        print(f"gradients by the package's choice of backend: {refused}")
        own = float("nan")
    return (chosen if own <= 2 * known + 1e-6 else "chunked"), own, known
