"""Whether a call may go on where its caller decides about its graph or its parameters: inside an
``autograd.Function``, or sharded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ADVICE = "checkpoint with use_reentrant=False, whose gradients are those without a checkpoint"


def check_recorded(op: str, state) -> None:
    """Refuses to advance a given ``state`` inside ``autograd.Function.forward``, which is where reentrant
    activation checkpointing makes a call first: the same call for the gradient would start from the state as
    advanced, and the returned one is cut from the graph.

    Raises ValueError. A call without a given state is a pure function of its input and passes.
    """
    if state is not None and _inside_function():
        raise ValueError(f"{op}: argument state is given inside an autograd.Function (reentrant activation "
                         "checkpointing?), which would read the same tokens twice and cut the state from the graph; "
                         f"{_ADVICE}")


def check_block_recorded(op: str, h: Tensor, learns: bool) -> None:
    """The same for a block of a model, whose states are always given; a model that is checkpointed as a whole
    gives it an h that no graph leads to. learns: in the pass that learns, which always records. Raises
    ValueError."""
    if (learns and not torch.is_grad_enabled()) or (h.requires_grad and _inside_function()):
        raise ValueError(f"{op}: called without a graph by one that records it (reentrant activation "
                         f"checkpointing?), which would cut the states of the memories from it; {_ADVICE}")


def check_whole(op: str, module: nn.Module, use: str) -> None:
    """``module`` has its parameters whole. Outside its own call a sharded one (FSDP) has not. Raises ValueError."""
    # the first stands for all: looking at each costs more than a decode step
    if hasattr(next(module.parameters(), None), "placements"):
        raise ValueError(f"{op}: the parameters of {type(module).__name__} are sharded outside its call, {use}")


def _inside_function() -> bool:
    # unlike no_grad, an autograd.Function turns forward-mode differentiation off too, and so does inference mode
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled()
                or torch._C._is_fwd_grad_enabled())
