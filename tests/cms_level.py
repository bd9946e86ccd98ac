"""Random levels of the CMS, and every output of their forward and backward."""

from dataclasses import replace

import torch

from hope_kernels import CMSConfig
from hope_kernels.ops.cms.matrix import Matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
SHARED, OWN, MIXED = None, (True, True, True), (True, False, True)  # which of three rows own their matrices


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def problem(mlp="gelu", norm="rmsnorm", bias=False, rows=SHARED, rank=0, d=40, N=72, B=3, dtype=torch.float32):
    """(config, level): a level of B rows with ``rows`` of their own and ``rank`` slots pending, the last of
    them unused."""
    config = CMSConfig(d, (8,), mlp=mlp, norm=norm, bias=bias, intermediate_size=N)
    level = {"norm_gain": 1 + 0.1 * draw(d, dtype=dtype)}
    if norm == "layernorm":
        level["norm_bias"] = 0.1 * draw(d, dtype=dtype, seed=1)
    for i, (name, r, c) in enumerate([("up", N, d), ("down", d, N)] + [("gate", N, d)] * (mlp == "swiglu")):
        left, right = (draw(B, rank, n, dtype=dtype, seed=10 * i + s) for s, n in ((2, r), (3, c)))
        left[:, -1:], right[:, -1:] = 0, 0
        own = draw(B, r, c, dtype=dtype, seed=10 * i + 4) / c**0.5
        pending = (left / c**0.5, right / c**0.5, 0.5) if rank else (None, None, 0.0)
        level[name] = Matrix(
            draw(r, c, dtype=dtype, seed=10 * i + 5) / c**0.5, None if rows is None else own, rows or (), *pending
        )
        if bias:
            level[f"{name}_bias"] = draw(r, dtype=dtype, seed=10 * i + 6)
    return config, level


def mapped(level: dict, change) -> dict:
    """The level with ``change(name of a part, tensor)`` for every tensor."""
    def of(W: Matrix) -> Matrix:
        return replace(W, **{n: change(n, t) for n, t in W._tensors().items() if t is not None})

    return {n: of(t) if isinstance(t, Matrix) else change(n, t) for n, t in level.items()}


def wide(level: dict) -> dict:
    return mapped(level, lambda _, t: t.double())


def picked(level: dict, rows: list[int]) -> dict:
    return {n: t.take(rows) if isinstance(t, Matrix) else t for n, t in level.items()}


def both_ways(ops, x, dy, config, level, residual=True) -> dict:
    """Every output of a level's forward and backward by name."""
    y, saved = ops.level_forward(x, level, config, EPS, residual=residual, keep=True)
    dx, factors = ops.level_backward(dy, saved, level, config, EPS, residual=residual, need_dx=True)
    found = {"y": y, "dx": dx} | {n: t for n, t in saved._asdict().items() if n != "x" and t is not None}
    return found | {
        f"{name}.{side}": t for name, pair in factors.items() for side, t in zip(("left", "right"), pair)
    }


def poison_buffers(monkeypatch):
    """Every buffer a kernel has to fill starts as NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, float("nan")))

    def new_empty(t, *shape, **kw):
        return t.new_full(
            shape if isinstance(shape[0], int) else shape[0], float("nan") if t.is_floating_point() else 0, **kw
        )

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
