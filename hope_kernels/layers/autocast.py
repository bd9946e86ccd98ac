"""Layers under torch.autocast: they compute in the dtype of their weights, which says what states and
exactness promise."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .wrapped import placement


def in_own_dtype(forward):
    """A layer's or model's ``forward`` as it is outside autocast; inside, autocast is off for the call, and a
    floating input is cast to the dtype of the weights."""

    @functools.wraps(forward)
    def call(self, x, *args, **kwargs):
        if not isinstance(x, Tensor) or x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
            return forward(self, x, *args, **kwargs)
        if x.is_floating_point():
            x = x.to(placement(self).dtype)
        with torch.autocast(x.device.type, enabled=False):
            return forward(self, x, *args, **kwargs)

    return call
