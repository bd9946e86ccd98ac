"""Queries, keys and values of attention of every kind."""

import torch

from hope_kernels import HopeConfig

CASES = {  # heads, key heads, width of a head, and what is seen
    "full": (4, 4, 32, {}),
    "grouped": (9, 3, 64, {}),
    "more key heads than meet their keys together": (13, 13, 8, {"window": 100, "sinks": 3}),
    "one key head, a width of no vectors": (5, 1, 14, {"attention_scale": 0.7}),
    "window": (4, 2, 16, {"window": 40}),
    "window narrower than a panel": (3, 3, 8, {"window": 5}),
    "one token": (2, 1, 8, {"window": 1}),
    "sinks": (4, 2, 16, {"window": 40, "sinks": 4}),
    "sinks of several blocks": (2, 2, 8, {"window": 9, "sinks": 150}),
    "groups wider than a panel": (40, 2, 8, {"window": 30, "sinks": 3}),
}
READ, T = 230, 90


def config(case) -> HopeConfig:
    heads, kv_heads, width, options = case
    return HopeConfig(8, 8 * heads, 1, mixer="attention", num_heads=heads, num_kv_heads=kv_heads, head_dim=width,
                      **options)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(case, B=1):
    """(config, q, k, v, far) of READ + T tokens."""
    c, (H, G, D, _) = config(case), case
    q, k, v, far = (draw(B, READ + T, n, D, seed=i) for i, n in enumerate((H, G, G, H)))
    return c, 2 * q, k, v, 2 * far if c.sinks else None
