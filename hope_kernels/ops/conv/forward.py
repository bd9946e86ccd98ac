"""Causal depthwise convolution with a carried tail, in PyTorch: any device, differentiable, no Python loop
over tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv_chunked(
    x: Tensor, tail: Tensor, weight: Tensor, lengths: list[int] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_t = sum_j weight[:, j] * joined_{t+j} over the W inputs that end with x_t, where joined = [tail, x]
    along the tokens.

    x: [B, T, d]. tail: [B, W-1, d], each row's last W-1 inputs before x. weight: [d, W], its last column
    meets x_t itself. lengths: tokens of each row that count; None is T for every row. Returns y [B, T, d],
    zero after a row's length, and the new tail, each row's last W-1 inputs.
    Values of x after a row's length reach neither result; but a backward multiplies them by zero, so they
    must be finite.
    """
    T, W = x.shape[1], weight.shape[1]
    joined = torch.cat([tail.to(x.dtype), x], 1)
    taps = weight.t().contiguous()  # a strided weight would be read element by element
    y = joined[:, :T] * taps[0]
    for j in range(1, W):
        y = torch.addcmul(y, joined[:, j : j + T], taps[j])
    if lengths is None or not isinstance(lengths, Tensor) and all(n == T for n in lengths):
        return y, joined[:, T:]
    n = torch.as_tensor(lengths, dtype=torch.long, device=x.device).unsqueeze(1)
    y = torch.where((torch.arange(T, device=x.device) < n).unsqueeze(-1), y, 0.0)
    index = n + torch.arange(W - 1, device=x.device)
    return y, joined.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
