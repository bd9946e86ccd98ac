"""Layers under torch.autocast: they compute in the dtype of their weights, on which states and the
promise of exactness rely."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .wrapped import placement

S = TypeVar("S", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")


def in_own_dtype(forward: Callable[Concatenate[S, Tensor, P], R]) -> Callable[Concatenate[S, Tensor, P], R]:
    """A layer's or model's ``forward`` as it is outside autocast; inside, autocast is off for the call, and a
    floating input is cast to the dtype of the weights."""

    @functools.wraps(forward)
    def call(self: S, x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if not isinstance(x, Tensor) or x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
            return forward(self, x, *args, **kwargs)
        if x.is_floating_point():
            x = x.to(placement(self).dtype)
        with torch.autocast(x.device.type, enabled=False):
            return forward(self, x, *args, **kwargs)

    return call


def without_autocast(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method of a model, or of a layer, as it is outside autocast."""

    @functools.wraps(method)
    def call(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        kind = placement(self).device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return method(self, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(self, *args, **kwargs)

    return call
