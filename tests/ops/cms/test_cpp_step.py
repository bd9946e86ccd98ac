"""Updates in C++ against PyTorch's in fp64, for shapes that leave rests everywhere: values, the 16-bit copy, rows and
threads; and who is updated there."""

import itertools

import pytest
import torch
from cms_stream import make
from numerics import within_yardstick

from hope_kernels import CMSConfig
from hope_kernels.ops.cms import cpp_step
from hope_kernels.ops.cms import level as chunked
from hope_kernels.ops.cms.backends import resolve
from hope_kernels.ops.cms.level import Adam
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=str(cpu_library.unavailable()))
FP32, FP16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
CPU = torch.device("cpu")


def draw(*shape, seed=0, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Problem:
    """Three rows of a matrix [r, c] with everything that a step may have; row 1 is NaN where it is not stepped."""

    def __init__(self, rule, dtype, C, r, c, total):
        self.rule, self.dtype = rule, dtype
        self.left, self.right = (None, None) if C is None else (
            draw(3, C, r, dtype=dtype), draw(3, C, c, seed=1, dtype=dtype))
        self.weight, self.moment, self.total = draw(3, r, c, seed=2), draw(3, r, c, seed=3), draw(3, r, c, seed=4)
        self.square = 0.1 + draw(3, r, c, seed=5).square()  # a small one multiplies the moment's error
        self.weight[1] = float("nan")
        if rule == "gd":
            self.moment = None
        if rule != "adam":
            self.square = None
        if not total:
            self.total = None

    def stepped(self, ops, kind=FP32, rows=(0, 2)):
        """weight, moment, square, total, copy after a step in ``rows``, with everything in ``kind``."""
        weight, moment, square, total = (
            None if t is None else t.to(kind, copy=True) for t in (self.weight, self.moment, self.square, self.total))
        copy = None if self.dtype == FP32 else self.weight.to(self.dtype)
        factors = (None if t is None else t.double() if kind == F64 else t for t in (self.left, self.right))
        adam = None if square is None else Adam(square, (0.9, 0.999), 3, 40)
        ops.refresh_(weight, copy, *factors, list(rows), 0.03, moment=moment, mu=0.9, total=total, adam=adam)
        return weight, moment, square, total, copy


SHAPES = [(7, 13, 21), (40, 8, 48), (1, 1, 1), (33, 70, 130), (None, 9, 17)]


@pytest.mark.parametrize("rule, total", itertools.product(("gd", "momentum", "adam"), (False, True)))
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_step(rule, total, dtype):
    for C, r, c in SHAPES:
        if C is None and not total:
            continue
        problem = Problem(rule, dtype, C, r, c, total)
        exact, peer, ours = problem.stepped(chunked, F64), problem.stepped(chunked), problem.stepped(cpp_step)
        for name, a, b, e in zip(("weight", "moment", "square", "total"), ours, peer, exact):
            if a is not None:
                within_yardstick(a[[0, 2]], b[[0, 2]], e[[0, 2]], f"{name} of {r} x {c}")
                before = getattr(problem, name)
                assert torch.equal(a[1].nan_to_num(7), before[1].nan_to_num(7))
        if dtype != FP32:
            assert torch.equal(ours[4][[0, 2]], ours[0][[0, 2]].to(dtype)) and ours[4][1].isnan().all()
        assert not total or not ours[3][[0, 2]].any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_sum_of_products(dtype):
    for C, r, c in SHAPES[:-1]:
        left, right, target = draw(3, C, r, dtype=dtype), draw(3, C, c, seed=1, dtype=dtype), draw(3, r, c, seed=2)
        for rows, alpha, beta in ([0, 1, 2], 1.0, 1.0), ([1], -0.5, 1.0), ([0, 2], 2.0, 0.0), ([1, 2], 1.0, 0.5):
            ours, peer, exact = target.clone(), target.clone(), target.double()
            cpp_step.outer_add_(ours, left, right, rows, alpha, beta)
            chunked.outer_add_(peer, left, right, rows, alpha, beta)
            chunked.outer_add_(exact, left.double(), right.double(), rows, alpha, beta)
            within_yardstick(ours, peer, exact, f"{r} x {c}")
            others = [b for b in range(3) if b not in rows]
            assert torch.equal(ours[others], target[others])


@pytest.mark.parametrize("rule", ["gd", "momentum", "adam"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bits_depend_neither_on_threads_nor_on_company(rule, dtype):
    problem, before, found = Problem(rule, dtype, 64, 260, 200, True), torch.get_num_threads(), []
    problem.weight[1] = 0.5
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(problem.stepped(cpp_step, rows=(0, 1, 2)))
    finally:
        torch.set_num_threads(before)
    alone = problem.stepped(cpp_step, rows=(1,))
    for one, two, three, own in zip(*found, alone):
        if one is not None:
            assert torch.equal(one, two) and torch.equal(one, three) and torch.equal(one[1], own[1])


def test_zero_tokens_beyond_the_last_leave_the_bits():
    problem = Problem("adam", BF16, 17, 20, 50, True)
    want = problem.stepped(cpp_step)
    longer = [torch.cat([t, t.new_zeros(3, 30, t.shape[2])], 1) for t in (problem.left, problem.right)]
    problem.left, problem.right = longer
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(problem.stepped(cpp_step), want))


def test_the_copy_is_rounded_as_pytorch_rounds():
    """Every kind of number: denormal, tied, largest, infinite, and no number."""
    top = torch.arange(2**16, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    weight = (top[:, None] | low).view(FP32)[None].contiguous()
    weight = torch.where(weight.isfinite() & (weight.abs() < torch.finfo(FP32).tiny), 0.0, weight)  # flushed in a step
    copy, total = torch.zeros_like(weight, dtype=BF16), torch.zeros_like(weight)
    given = weight.clone()
    cpp_step.refresh_(weight, copy, None, None, [0], 0.1, total=total)
    number = ~given.isnan()
    assert torch.equal(weight[number], given[number]) and weight[~number].isnan().all()
    assert torch.equal(copy[number].view(torch.int16), given.to(BF16)[number].view(torch.int16))
    assert copy[~number].isnan().all()


@pytest.mark.parametrize("fields", [{}, {"optimizer": "adam", "lr": 1e-3}, {"optimizer": "momentum"}])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_gated_layer_learns_alike(fields, dtype):
    """Levels that PyTorch reads, updated in C++ by default and in PyTorch on request."""
    found = []
    for backend in (None, "chunked"):
        fields = {"lr": 0.01, "d_model": 24, "mlp": "swiglu", "intermediate_size": 40, "chunks": (8, 16)} | fields
        layer = make(1, dtype=dtype, **fields)
        x, error = draw(2, 64, 24, seed=6, dtype=dtype), 0.3 * draw(2, 64, 24, seed=7, dtype=dtype)
        with torch.no_grad():
            state = None
            for t in range(0, 64, 8):
                y, state = layer(x[:, t : t + 8], state, backend=backend)
                state = layer.refresh(state, error[:, t : t + 8], backend=backend)
        found.append([y, *(w for level in state.weights for w in level.values())])
        if dtype == BF16:
            for level, copies in zip(state.weights, state.copies):
                assert all(torch.equal(copies[n], w.to(BF16)) for n, w in level.items())
    for ours, theirs in zip(*found):
        tight = 2e-5 if dtype == FP32 else 2e-2
        torch.testing.assert_close(ours, theirs, rtol=tight, atol=tight)


@pytest.mark.skipif(
    cpu_library.unavailable() is not None or not cpp_step.multiplies_bf16(), reason="the CPU does not multiply bf16")
@pytest.mark.parametrize("shape", [(128, 300), (300, 128)])
def test_muon_in_bf16(shape):
    """Large matrices of 16-bit models only; as far from fp32 as torch.optim.Muon's bf16 is."""
    g = draw(2, *shape)
    exact, ours = chunked.newton_schulz(g), cpp_step.newton_schulz(g, narrow=True)
    assert ours.dtype == FP32
    assert 1e-3 * exact.norm() < (ours - exact).norm() < 0.05 * exact.norm()
    for theirs, mine in zip(exact, ours):
        a, b = torch.linalg.svdvals(theirs), torch.linalg.svdvals(mine)
        assert b.min() > 0.6 and b.max() < 1.25 and (a - b).abs().max() < 0.05
    muon = pytest.importorskip("torch.optim._muon")
    theirs = muon._zeropower_via_newtonschulz(g[0], chunked.NS_COEFFICIENTS, chunked.NS_STEPS, chunked.NS_EPS)
    assert (ours[0] - exact[0]).norm() < 1.5 * (theirs.float() - exact[0]).norm()
    small = draw(1, 127, 300)
    assert torch.equal(cpp_step.newton_schulz(small, narrow=True), cpp_step.newton_schulz(small))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_muon_of_a_model_in_fp32_stays_in_fp32(dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(cpp_step, "newton_schulz", lambda g, narrow: asked.append(narrow) or g)
    layer = make(1, dtype=dtype, d_model=16, mlp="swiglu", chunks=(4,), optimizer="muon", lr=0.01)
    x = draw(1, 4, 16, dtype=dtype)
    with torch.no_grad():
        _, state = layer(x)
        layer.refresh(state, x)
    assert asked == [dtype == BF16] * 3


def test_who_is_updated_here():
    gated, plain = CMSConfig(16, (4,), mlp="swiglu"), CMSConfig(16, (4,))
    for config, dtype in ((gated, FP32), (gated, BF16), (plain, BF16), (plain, FP16)):
        assert resolve(config, dtype, CPU, inner=True) is cpp_step
        assert resolve(config, dtype, CPU, "chunked", inner=True) is chunked
        assert resolve(config, dtype, CPU) is chunked
    assert resolve(gated, F64, CPU, inner=True) is chunked
