"""Calls, or parts of them, that a backend of ``ops/titans`` serves: on a CPU the C++ library.

A call of the package counts chunks from its own first token, like a sequence that has read nothing, and
starts from the weights of the state: with ``retain_to="zero"`` a ``TitansState`` holds exactly them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...backend import NO_GRADIENT, Request, choose
from ...config import TitansConfig
from ...ops.conv.backends import ENTRIES as CONV
from ...ops.conv.forward import causal_conv_chunked
from ...ops.linear.backends import resolve as linear_ops
from ...ops.titans.backends import resolve
from ...ops.titans.inputs import TokenInputs
from ...ops.titans.scan import titans_chunk
from ...ops.titans.state import FastWeights, TitansState
from ...ops.unit.backends import ENTRIES as UNIT
from ...ops.unit.forward import EPS, l2norm
from ...state import Counters
from .config import SelfModifyingTitansConfig, engine


def kernel(
    config: SelfModifyingTitansConfig, other: int, memory: int, dtype: torch.dtype, device: torch.device
) -> Callable | None:
    """The backend's function, for ``kernel_call``, that reads whole chunks of these sizes; None: the loop of
    ``chunked.py`` has to."""
    if max(other, memory) % min(other, memory) or config.momentum > 0 or not config.stopgrad_vhat:
        return None
    if config.adaptive_q or config.dim == 1 or config.qk_l2_norm and config.eps != EPS:
        return None
    serves = resolve(engine(config, other, memory), dtype, device)
    return None if serves is titans_chunk else serves


def fast_convolution(config: SelfModifyingTitansConfig, x: Tensor) -> Callable | None:
    """A backend's causal convolution of x, without a graph; None: PyTorch's, as the package's."""
    serves = choose("conv", CONV, _request(config, x))
    return None if serves is causal_conv_chunked else serves


def fast_unit(config: SelfModifyingTitansConfig, z: Tensor) -> Callable | None:
    """A backend's unit vectors of z, without a graph; None: what ``SelfModifyingTitans.unit`` does."""
    if not config.qk_l2_norm or config.eps != EPS:
        return None
    serves = choose("unit", UNIT, _request(config, z))
    return None if serves is l2norm else serves


def products(config: SelfModifyingTitansConfig, x: Tensor) -> ModuleType:
    """The functions of ops/linear for x, without a graph."""
    return linear_ops(_request(config, x))


def _request(config: SelfModifyingTitansConfig, x: Tensor) -> Request:
    return Request(engine(config), x.dtype, x.device, NO_GRADIENT)


def kernel_call(
    serves: Callable, config: TitansConfig, x: Tensor, q: Tensor, w: FastWeights
) -> tuple[Tensor, FastWeights]:
    """o [B, T, dim] and the weights after whole chunks of x, q [B, T, dim]; w may be written over."""
    B, T, D = x.shape
    C = max(config.chunk_other, config.chunk_memory)
    one = x.new_zeros(1)

    def open_chunk(*width: int) -> Tensor:
        return x.new_zeros(B, C, 1, *width)

    weights: Any = [None if t is None else t.unsqueeze(1) for t in w]
    state = TitansState(
        Counters([0] * B), config, *weights, s2=None, s1=None, s1s=None,
        pending_k=open_chunk(D), pending_v=open_chunk(D), pending_eta=open_chunk(),
        pending_alpha=open_chunk() if config.retention else None, pending_beta=None,
        conv_tail=None,
    )
    inputs = TokenInputs(
        q.unsqueeze(2), x=x.unsqueeze(2), eta_bias=one, alpha_bias=one if config.retention else None
    )
    given = config, w.map(lambda t: t[:1]), inputs, state, [T] * B
    in_place = getattr(serves, "in_place", None)
    if in_place is not None:
        return in_place(*given).squeeze(2), w
    o, new = serves(*given)
    return o.squeeze(2), new.deviation.map(lambda t: t.squeeze(1))
