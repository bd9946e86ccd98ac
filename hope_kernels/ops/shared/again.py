"""The backward of an operator by the differentiable one that computes the same: for gradients of gradients, and for
inputs that the fast backward leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients_again(
    function: Callable[..., tuple[Tensor | None, ...]], tensors: Sequence[Tensor | None], wanted: Sequence[bool],
    errors: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """By each of ``tensors`` that is ``wanted``, from the ``errors`` at the results of ``function(*tensors)`` (None:
    zero). With a graph of their own in grad mode."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # leaves, or else aliases: where one of the tensors was made of another, a way through it is not theirs
        alias = (lambda t, _: t.view_as(t)) if again else (lambda t, w: t.detach().requires_grad_(w))
        tensors = [None if t is None else alias(t, w) for t, w in zip(tensors, wanted)]
        results = function(*tensors)
        pairs = [(y, e) for y, e in zip(results, errors) if y is not None and e is not None and y.requires_grad]
        sources = [t for t, w in zip(tensors, wanted) if w and t is not None]
        found = iter(torch.autograd.grad(
            [y for y, _ in pairs], sources, [e for _, e in pairs], create_graph=again, allow_unused=True))
    return [next(found) if w and t is not None else None for t, w in zip(tensors, wanted)]
