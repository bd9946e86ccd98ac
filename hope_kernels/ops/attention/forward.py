"""softmax(q k^T) v of queries against a cache, with a window and sinks, a block of queries at a time, in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import HopeConfig
from ...state import master_dtype

BLOCK = 512  # queries per masked product: bounds the mask at BLOCK x keys


def attend(
    config: HopeConfig, q: Tensor, k: Tensor, v: Tensor, used: list[int], lengths: list[int], base: list[int],
    far: Tensor | None = None
) -> Tensor:
    """q [B, T, H, D] against slots of k, v [B, S, Hkv, D]; query t of row b stands at slot used[b] + t. Only the
    outputs of the first lengths[b] mean something.

    base[b]: tokens between the sinks and the slots after them, which the cache has dropped; nothing here depends on it.
    far: q as it sees the sinks, where some query stands past the last position that looks at them from
    its own; None: none does.
    """
    T, (window, sinks) = q.shape[1], config.sight
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    how: dict[str, Any] = {
        "scale": config.attention_scale, "enable_gqa": config.num_kv_heads != config.num_heads
    }
    if not any(used) and T <= k.shape[2] and (window is None or T <= window + sinks):
        y = F.scaled_dot_product_attention(q, k[:, :, :T], v[:, :, :T], is_causal=True, **how)
        return y.transpose(1, 2)
    # padding looks where the row's last token does: a query that sees nothing would be NaN
    ends = [max(u + n, 1) for u, n in zip(used, lengths)]
    same = len({*zip(used, lengths)}) == 1 and lengths[0] == T
    if same:
        used, ends = used[:1], ends[:1]
    start, last = (
        torch.tensor(i, dtype=torch.long, device=q.device).view(-1, 1, 1)
        for i in (used, [e - 1 for e in ends])
    )
    parts = []
    for a in range(0, T, BLOCK):
        b = min(a + BLOCK, T)
        low = 0 if window is None else max(0, min(min(u + a, e - 1) for u, e in zip(used, ends)) - window + 1)
        high = max(min(u + b, e) for u, e in zip(used, ends))
        apart = far is not None and high > sinks  # the sinks, then the slots from low on
        low = max(low, sinks) if apart else 0 if sinks else low
        seen = None
        if not (same and b - a == 1):
            place = (start + torch.arange(a, b, device=q.device).view(1, -1, 1)).minimum(last)
            slot = torch.arange(low, high, device=q.device)
            if apart:
                slot = torch.cat([torch.arange(sinks, device=q.device), slot])
            seen = slot <= place
            if window is not None:
                seen = seen & ((slot > place - window) | (slot < sinks))
            seen = seen.unsqueeze(1)
        keys, values = k[:, :, low:high], v[:, :, low:high]
        if far is None or not apart:
            y = F.scaled_dot_product_attention(q[:, :, a:b], keys, values, attn_mask=seen, **how)
        else:
            both, first = (q[:, :, a:b], far.transpose(1, 2)[:, :, a:b]), (k[:, :, :sinks], v[:, :, :sinks])
            y = _beside_sinks(*both, keys, values, *first, seen, config.attention_scale)
        parts.append(y)
    return torch.cat(parts, 2).transpose(1, 2)


def _beside_sinks(
    q: Tensor, far: Tensor, k: Tensor, v: Tensor, sink_k: Tensor, sink_v: Tensor, seen: Tensor | None,
    scale: float | None
) -> Tensor:
    """Attention of q [B, H, T, D] to k, v and of far, the same queries as they see the sinks, to the sinks'
    sink_k, sink_v [B, Hkv, S, D]: one softmax, over S sinks and the slots of k. seen: of both; None: all.

    A query has two rotations, a product only one. So a query is widened by its scores with the sinks,
    and the key of sink i is a one in place i of that part and zero elsewhere.
    """
    D, S = q.shape[-1], sink_k.shape[2]
    wide, extra = master_dtype(q.dtype), -(-S // 8) * 8  # kernels want widths of multiples of 8
    grouped = far.to(wide).unflatten(1, (sink_k.shape[1], -1))  # [B, Hkv, H / Hkv, T, D]
    scores = (grouped @ sink_k.to(wide).mT.unsqueeze(2)).flatten(1, 2).to(q.dtype)
    ones = F.pad(torch.eye(S, dtype=k.dtype, device=k.device), (D, extra - S))
    ones = ones.expand(*sink_k.shape[:2], -1, -1)
    y = F.scaled_dot_product_attention(
        torch.cat([q, F.pad(scores, (0, extra - S))], -1), torch.cat([ones, F.pad(k, (0, extra))], 2),
        F.pad(torch.cat([sink_v, v], 2), (0, extra)), attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1],
        scale=D**-0.5 if scale is None else scale,
    )
    return y[..., :D]
