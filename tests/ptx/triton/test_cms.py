"""The CMS's kernels as PTX: outputs, gradients and factors of a level by the yardstick, a row's bits in any
company, and its updates.

Widths are no multiples of a tile, sums are long enough that the loads of several tiles are under way at once,
and above 2048 columns the tiles are others.
"""

import pytest
import torch
from cms_level import EPS, MIXED, OWN, both_ways, draw, picked, problem, wide
from numerics import within_yardstick

from hope_kernels.ops.cms import level as chunked
from hope_kernels.ops.cms.level import Adam
from hope_kernels.ops.cms.triton import library
from hope_kernels.ops.cms.triton import operator as kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LEVELS = {
    "plain": dict(d=72, N=330),
    "gated": dict(mlp="swiglu", d=72, N=330),
    "all on": dict(mlp="swiglu", norm="layernorm", bias=True, rows=MIXED, rank=33, d=72, N=330),
    "all on, not gated": dict(norm="layernorm", bias=True, rows=OWN, rank=5, d=72, N=330, residual=False),
    "wide": dict(d=136, N=2064),
    "wide, all on": dict(norm="layernorm", bias=True, rows=MIXED, rank=33, d=136, N=2064),
    "wide output, all on": dict(norm="layernorm", bias=True, rows=MIXED, rank=33, d=2064, N=136),
    "one number": dict(d=1, N=1),
}
slowly = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
CASES = [
    ("plain", BF16, 80), ("all on", BF16, 80), ("wide", BF16, 80), ("gated", FP16, 80), ("one number", BF16, 80),
    ("plain", FP32, 80), ("all on", FP32, 80), ("all on, not gated", BF16, 80),
    ("plain", BF16, 90), ("gated", BF16, 90), ("wide", BF16, 90), ("all on, not gated", FP16, 90),
    slowly("wide, all on", BF16, 80), slowly("wide output, all on", BF16, 80), slowly("all on", FP32, 90),
    slowly("wide, all on", BF16, 90), slowly("wide output, all on", BF16, 90), slowly("all on", BF16, 90),
    slowly("plain", FP16, 80), slowly("all on", FP16, 80), slowly("gated", BF16, 80), slowly("gated", FP32, 80),
    slowly("all on, not gated", BF16, 90), slowly("plain", FP16, 90), slowly("all on", FP16, 90),
]


@pytest.mark.parametrize("name, dtype, arch", CASES)
def test_a_level_both_ways(name, dtype, arch, device):
    """17 tokens of each of three rows, in company and split."""
    device.arch = arch
    switches = dict(LEVELS[name])
    residual = switches.pop("residual", True)
    config, level = problem(**switches, dtype=dtype)
    x, dy = (draw(3, 17, config.d_model, dtype=dtype, seed=s) for s in (30, 31))
    x[0] *= 1e-3  # eps counts here
    exact = both_ways(chunked, x.double(), dy.double(), config, wide(level), residual)
    peer = both_ways(chunked, x, dy, config, level, residual)
    ours = both_ways(kernels, x, dy, config, level, residual)
    for part, t in ours.items():
        within_yardstick(t, peer[part], exact[part], part)
    halves = zip(x.split((1, 16), 1), dy.split((1, 16), 1))
    parts = [both_ways(kernels, a, b, config, level, residual) for a, b in halves]
    some = both_ways(kernels, x[[2, 0]], dy[[2, 0]], config, picked(level, [2, 0]), residual)
    for part, t in ours.items():
        assert torch.equal(torch.cat([p[part] for p in parts], 1), t), part
        assert torch.equal(some[part], t[[2, 0]]), part
    y, none = kernels.level_forward(x, level, config, EPS, residual=residual, keep=False)
    assert none is None and torch.equal(y, ours["y"])


@pytest.mark.parametrize("dtype, arch", [(BF16, 80), slowly(FP16, 80), (FP32, 80), (BF16, 90), slowly(FP32, 90)])
def test_more_than_a_tile_of_tokens(dtype, arch, device):
    """A tile holds tokens of several rows, or a row takes several tiles."""
    device.arch = arch
    config, level = problem(rows=MIXED, d=24, N=40, dtype=dtype)
    x, dy = (draw(3, 140, 24, dtype=dtype, seed=s) for s in (30, 31))
    whole = both_ways(kernels, x, dy, config, level)
    parts = [both_ways(kernels, a, b, config, level) for a, b in zip(x.split((17, 123), 1), dy.split((17, 123), 1))]
    for part, t in whole.items():
        assert torch.equal(torch.cat([p[part] for p in parts], 1), t), part
    exact = both_ways(chunked, x.double(), dy.double(), config, wide(level))
    peer = both_ways(chunked, x, dy, config, level)
    for part, t in whole.items():
        within_yardstick(t, peer[part], exact[part], part)


@pytest.mark.parametrize("tokens, moment, total, beta, copied, dtype, arch", [
    (70, False, False, 1.0, True, BF16, 80), (300, True, True, 1.0, True, BF16, 80),
    (17, False, True, 0.0, False, FP16, 80), (70, True, True, 1.0, True, FP32, 80),
    (None, False, True, 1.0, True, BF16, 80), (None, True, False, 1.0, True, FP32, 80),
    (70, False, False, 1.0, True, BF16, 90), (300, True, True, 1.0, True, BF16, 90),
    (70, False, False, 0.0, False, FP16, 90), (70, True, True, 1.0, True, FP32, 90),
    (None, False, True, 1.0, True, BF16, 90),
    (70, "adam", False, 1.0, True, BF16, 80), (300, "adam", True, 1.0, True, BF16, 90),
    (70, "adam", True, 1.0, False, FP32, 90), (None, "adam", True, 1.0, True, BF16, 90),
    slowly(70, "adam", False, 1.0, True, BF16, 90), slowly(300, "adam", True, 1.0, True, BF16, 80),
])
def test_refresh(tokens, moment, total, beta, copied, dtype, arch, device):
    """Rows 0 and 2 of three: values, the copy, a total that becomes zero; row 1 keeps its bits. Adam's numbers from
    the device make the same bits as those from the host."""
    device.arch = arch
    r, c, rows = 72, 133, [0, 2]
    left, right = (None, None) if tokens is None else (
        draw(3, tokens, r, dtype=dtype), draw(3, tokens, c, dtype=dtype, seed=1)
    )
    weight, m, t, v = (draw(3, r, c, seed=s) for s in (2, 3, 4, 5))
    v, adaptive = 0.1 + v.square(), moment == "adam"  # a small v multiplies the error of m
    copy = torch.zeros(3, r, c, dtype=dtype) if copied else None
    weight[1] = float("nan")
    if left is not None:
        left[1] = float("nan")

    def update(ops, kind, late=False):
        factors = [f if f is None or kind == FP32 else f.double() for f in (left, right)]
        given = ((weight, True), (m, moment), (t, total), (v, adaptive))
        w, m_, t_, v_ = (f.to(kind, copy=True) if there else None for f, there in given)
        adam = Adam(v_, (0.9, 0.99), 3, 70) if adaptive else None
        if late:
            adam = adam._replace(step=99, late=torch.tensor(adam.numbers(0.3), dtype=kind))
        mine = None if copy is None else copy.clone()
        if beta:
            ops.refresh_(w, mine, *factors, rows, 0.3, moment=m_, mu=0.9, total=t_, adam=adam)
        else:
            ops.outer_add_(w, *factors, rows, -0.3, beta)
        return w, m_, t_, v_, mine

    exact, peer, ours = update(chunked, torch.float64), update(chunked, FP32), update(kernels, FP32)
    for name, a, b, e, before in zip(("weight", "moment", "total", "square"), ours, peer, exact, (weight, m, t, v)):
        if a is not None:
            within_yardstick(a[rows], b[rows], e[rows], name)
            assert torch.equal(a[1].view(torch.int32), before[1].view(torch.int32)), name
    if copied:
        assert torch.equal(ours[4][rows], ours[0][rows].to(dtype)) and not ours[4][1].any()
    assert not (total and beta) or not ours[2][rows].any()
    if adaptive:
        again = update(kernels, FP32, late=True)
        assert all(torch.equal(a[rows], b[rows]) for a, b in zip(ours, again) if a is not None)


@pytest.mark.parametrize("moment, dtype, arch", [
    (True, BF16, 80), ("adam", BF16, 90), slowly("adam", BF16, 80), slowly(True, BF16, 90),
])
def test_refresh_after_the_librarys_product(moment, dtype, arch, device, monkeypatch):
    """As for a long segment: the kernel takes a gradient, or a moment, that stays as it is."""
    device.arch = arch
    monkeypatch.setattr(library, "LONG", 16)
    monkeypatch.setattr(library, "LARGE", 0)
    r, c, rows = 72, 136, [0, 2]
    left, right = draw(3, 32, r, dtype=dtype), draw(3, 32, c, dtype=dtype, seed=1)
    weight, m, v = (draw(3, r, c, seed=s) for s in (2, 3, 5))
    v = 0.1 + v.square() if moment == "adam" else None

    def update(ops, kind, of=slice(None), rows=rows):
        w, m_, v_ = (None if t is None else t[of].to(kind, copy=True) for t in (weight, m, v))
        factors, copy = [f[of] if kind == FP32 else f[of].double() for f in (left, right)], w.to(dtype)
        adam = None if v_ is None else Adam(v_, (0.9, 0.99), 3, 70)
        ops.refresh_(w, copy, *factors, rows, 0.3, moment=m_, mu=0.9, adam=adam)
        return w, m_, v_, copy

    exact, peer, ours = update(chunked, torch.float64), update(chunked, FP32), update(kernels, FP32)
    alone = update(kernels, FP32, slice(2, 3), [0])
    for name, a, b, e, one in zip(("weight", "moment", "square"), ours, peer, exact, alone):
        if a is not None:
            within_yardstick(a[rows], b[rows], e[rows], name)
            assert torch.equal(a[2], one[0]), name
    assert torch.equal(ours[0][1], weight[1]) and torch.equal(ours[3], ours[0].to(dtype))


@pytest.mark.parametrize("shape, arch", [((2, 66, 80), 80), ((72, 20), 80), ((70, 130), 90), ((72, 20), 90)])
def test_newton_schulz(shape, arch, device):
    device.arch = arch
    g = draw(*shape)
    ours = kernels.newton_schulz(g)
    within_yardstick(ours, chunked.newton_schulz(g), chunked.newton_schulz(g.double()), "x")
    if len(shape) == 3:
        assert all(torch.equal(a, kernels.newton_schulz(b)) for a, b in zip(ours, g))
