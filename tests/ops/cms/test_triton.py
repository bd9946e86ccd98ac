"""The CMS's Triton kernels against the chunked functions in fp64, and a row's bits in any company. Updates:
test_triton_refresh.py."""

from dataclasses import replace

import pytest
import torch
from cms_level import DEVICE, EPS, MIXED, OWN, SHARED, both_ways, draw, mapped, picked, poison_buffers, problem, wide
from numerics import within_yardstick

from hope_kernels import CMSConfig
from hope_kernels.ops.cms import level as chunked
from hope_kernels.ops.cms.chain import cms_forward, pass_back
from hope_kernels.ops.cms.level import Adam
from hope_kernels.ops.cms.matrix import Matrix
from hope_kernels.ops.shared.triton_library import interpreted

pytest.importorskip("triton")
from hope_kernels.ops.cms.triton import operator as kernels  # noqa: E402
from hope_kernels.ops.cms.triton.operands import matrices_of  # noqa: E402

# the interpreter's, on a loop bound
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    poison_buffers(monkeypatch)


@pytest.fixture
def ordered_products(monkeypatch):
    """The interpreter multiplies tiles by BLAS, where the bits of a row depend on its place in the tile; on a
    GPU's units they do not. Here every number is the sum over k in order."""
    if not interpreted():
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, *_):
        total, left, right = d.data.copy(), a.data.astype(d.data.dtype), b.data.astype(d.data.dtype)
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[k]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


VARIANTS = [
    dict(d=1, N=1, T=1), dict(T=5), dict(mlp="swiglu", norm="layernorm", bias=True, T=17),
    dict(bias=True, rows=MIXED, T=70, residual=False), dict(norm="layernorm", rank=40, T=17),
    dict(mlp="swiglu", bias=True, rows=OWN, rank=5, T=17), dict(rows=MIXED, rank=5, T=1),
    dict(mlp="swiglu", rank=5, T=1),
    dict(mlp="swiglu", norm="layernorm", rows=MIXED, rank=33, d=72, N=70, T=5, residual=False),
]


HALF = [VARIANTS[i] for i in (2, 3, 8)]  # between them each norm, activation, and kind of rows and pending parts
KINDS = [
    *((v, torch.float32) for v in VARIANTS),
    *(pytest.param(v, torch.float16, marks=() if v in HALF else pytest.mark.slow) for v in VARIANTS),
    *(pytest.param(v, torch.bfloat16, marks=pytest.mark.gpu) for v in VARIANTS),
]


@pytest.mark.parametrize(
    "variant, dtype", KINDS, ids=lambda v: "-".join(str(x) for x in v.values()) if isinstance(v, dict) else None
)
def test_values_and_factors(variant, dtype):
    variant = dict(variant)
    T, residual = variant.pop("T"), variant.pop("residual", True)
    config, level = problem(**variant, dtype=dtype)
    x, dy = (draw(3, T, config.d_model, dtype=dtype, seed=s) for s in (30, 31))
    x[0] *= 1e-3  # eps counts here
    exact = both_ways(chunked, x.double(), dy.double(), config, wide(level), residual)
    peer = both_ways(chunked, x, dy, config, level, residual)
    for name, t in both_ways(kernels, x, dy, config, level, residual).items():
        within_yardstick(t, peer[name], exact[name], name)


@pytest.mark.parametrize("mlp, rows, rank, dtype", [
    ("gelu", SHARED, 0, torch.float32), ("swiglu", MIXED, 5, torch.float32), ("gelu", SHARED, 33, torch.float16),
    *(pytest.param(mlp, rows, rank, torch.bfloat16, marks=pytest.mark.gpu) for mlp, rows, rank in
      (("gelu", SHARED, 33), ("swiglu", OWN, 0), ("swiglu", MIXED, 5))),
])
def test_a_token_does_not_see_its_company(mlp, rows, rank, dtype, ordered_products):
    """Outputs, kept tensors and gradients: split anywhere, one row alone, rows in another order."""
    config, level = problem(mlp, bias=True, rows=rows, rank=rank, d=24, N=40, dtype=dtype)
    T = 140 if dtype != torch.float32 else 70  # more than one tile of tokens
    x, dy = (draw(3, T, config.d_model, dtype=dtype, seed=s) for s in (30, 31))
    whole = both_ways(kernels, x, dy, config, level)
    for sizes in ((1, T - 1), (17, 53, T - 70)) if not rank else ((65, T - 65),):
        parts = [both_ways(kernels, a, b, config, level) for a, b in zip(x.split(sizes, 1), dy.split(sizes, 1))]
        for name, t in whole.items():
            assert torch.equal(torch.cat([p[name] for p in parts], 1), t), (sizes, name)
    some = both_ways(kernels, x[[2, 0]], dy[[2, 0]], config, picked(level, [2, 0]))
    for name, t in whole.items():
        assert torch.equal(some[name], t[[2, 0]]), name
    y, none = kernels.level_forward(x, level, config, EPS, residual=True, keep=False)
    assert none is None and torch.equal(y, whole["y"])


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_owning_what_is_shared_and_unused_slots_change_nothing(dtype, ordered_products):
    config, level = problem("swiglu", rank=6, d=24, N=32, dtype=dtype)
    x, dy = (draw(3, 19, config.d_model, dtype=dtype, seed=s) for s in (30, 31))
    want = both_ways(kernels, x, dy, config, level)

    def owned(W: Matrix) -> Matrix:
        return replace(W, own=W.shared.expand(3, -1, -1).clone(), rows=(False, True, True))

    def longer(W: Matrix) -> Matrix:
        return replace(W, left=torch.cat([W.left, torch.zeros_like(W.left).repeat(1, 9, 1)], 1),
                       right=torch.cat([W.right, torch.zeros_like(W.right).repeat(1, 9, 1)], 1))

    def in_a_buffer(W: Matrix) -> Matrix:  # the first slots of a longer buffer, as a state holds them
        return replace(longer(W), left=longer(W).left[:, :6], right=longer(W).right[:, :6])

    for change in (owned, longer, in_a_buffer):
        changed = {n: change(t) if isinstance(t, Matrix) else t for n, t in level.items()}
        for name, t in both_ways(kernels, x, dy, config, changed).items():
            assert torch.equal(t, want[name]), (change.__name__, name)
    nothing = mapped(level, lambda n, t: t * 0 if n in ("left", "right") else t)
    without = {n: replace(t, left=None, right=None) if isinstance(t, Matrix) else t for n, t in level.items()}
    want = both_ways(kernels, x, dy, config, without)
    for name, t in both_ways(kernels, x, dy, config, nothing).items():
        assert torch.equal(t, want[name]), name


@pytest.mark.parametrize("parts", [("x",), ("dy",), ("own", "left", "right")], ids="-".join)
def test_a_nan_stays_in_its_row(parts):
    config, level = problem("swiglu" if "own" in parts else "gelu", rows=MIXED, rank=5, N=30)
    # what a row does not use may hold anything
    level = mapped(level, lambda name, t: torch.cat([t[:1], t[1:2] * float("nan"), t[2:]]) if name == "own" else t)
    x, dy = draw(3, 19, 40, seed=30), draw(3, 19, 40, seed=31)
    want = both_ways(kernels, x, dy, config, level)

    def spoiled(name: str, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t[:1] * float("nan"), t[1:]]) if name in parts else t

    found = both_ways(kernels, spoiled("x", x), spoiled("dy", dy), config, mapped(level, spoiled))
    assert all(torch.isfinite(t).all() for t in want.values())
    assert not torch.isfinite(found["dx"][0]).any()
    for name, t in found.items():
        assert torch.equal(t[1:], want[name][1:]), name


def test_rows_without_a_shared_base_and_no_tokens():
    config, level = problem(rows=OWN, N=30)
    x, dy = draw(3, 5, 40, seed=30), draw(3, 5, 40, seed=31)
    bare = {n: replace(t, shared=None) if isinstance(t, Matrix) else t for n, t in level.items()}
    want = both_ways(kernels, x, dy, config, level)
    for name, t in both_ways(kernels, x, dy, config, bare).items():
        assert torch.equal(t, want[name])
    assert all(t.shape[:2] == (3, 0) for t in both_ways(kernels, x[:, :0], dy[:, :0], config, level).values())
    _, saved = kernels.level_forward(x, level, config, EPS, residual=True, keep=True)
    dx, factors = kernels.level_backward(dy, saved, level, config, EPS, residual=True, need_dx=False)
    assert dx is None and torch.equal(factors["up"][0], want["up.left"])


@pytest.mark.parametrize("mlp, rows, rank", [("gelu", SHARED, 0), ("swiglu", (True, False), 5)])
def test_opcheck(mlp, rows, rank, monkeypatch):
    monkeypatch.undo()  # opcheck makes its own buffers
    config, level = problem(mlp, bias=True, rows=rows, rank=rank, d=4, N=8, B=2)
    x, dy, z, weight = (draw(2, 3, n, seed=i) for i, n in enumerate((4, 4, 8, 4)))
    matrices = matrices_of(level)
    vectors = [level.get(n) for n in ("norm_gain", "norm_bias", "up_bias", "gate_bias", "down_bias")]
    ops, check = torch.ops.hope_kernels, torch.library.opcheck
    check(ops.cms_level_forward, (x, *vectors, *matrices, EPS, False, True, rank > 0))
    check(
        ops.cms_level_backward, (dy, x, z, z if rank else None, level["norm_gain"], *matrices, EPS, False,
            True, rank == 0)
    )
    if rank:
        factors = draw(2, 5, 3), draw(2, 5, 4)
        check(
            ops.cms_refresh_, (weight, weight.half(), *factors, [0, 1], 0.1, 1.0, weight.clone(), 0.9,
                weight.clone())
        )
        averages = {"square": weight.square(), "beta2": 0.9, "first": 0.1, "second": 0.1, "root": 2.0}
        check(ops.cms_refresh_, (weight, None, *factors, [0], 0.1, 1.0, weight.clone(), 0.9, None), averages)
    else:
        check(ops.cms_refresh_, (weight, None, None, None, [1], 0.1, 1.0, None, 0.0, weight.clone()))
        check(ops.cms_newton_schulz, (weight,))


def test_the_engine_takes_these_functions():
    """Two levels read and learned from through ``chain.py``: outputs, and the weights the factors make."""
    config = CMSConfig(24, (5, 10), mlp="swiglu", intermediate_size=30)
    weights = [{n: draw(*s, seed=10 * l + i) / s[1] ** 0.5 for i, (n, s) in enumerate(
        (("up", (30, 24)), ("gate", (30, 24)), ("down", (24, 30))))} | {"norm_gain": torch.ones(24,
        device=DEVICE)} for l in range(2)]
    x, error = draw(2, 5, 24, seed=30), draw(2, 5, 24, seed=31)

    def run(ops, kind):
        levels = [{n: t.to(kind) for n, t in level.items()} for level in weights]
        own = [{n: t.expand(2, -1, -1).clone() for n, t in level.items() if n != "norm_gain"} for level in levels]

        def sink(l, factors):
            for name, (left, right) in factors.items():
                ops.refresh_(own[l][name], None, left, right, [0, 1], 0.1)

        pass_back(x.to(kind), error.to(kind), levels, config, sink, ops=ops)
        with torch.no_grad():
            y = cms_forward(x.to(kind), [level | w for level, w in zip(levels, own)], config, ops=ops)
        return [y, *(t for level in own for t in level.values())]

    for i, (a, b, c) in enumerate(
        zip(run(kernels, torch.float32), run(chunked, torch.float32), run(chunked, torch.float64))
    ):
        within_yardstick(a, b, c, f"tensor {i}")


def test_refuses():
    config, level = problem("swiglu", rank=5)
    x = draw(3, 5, 40)
    call = lambda x=x, **parts: kernels.level_forward(x, level | parts, config, EPS, residual=True, keep=False)
    with pytest.raises(ValueError, match=r"argument x has shape \[3, 5, 39\], expected \[B, T, 40\]"):
        call(x[..., 1:])
    with pytest.raises(ValueError, match="dtype torch.float64, expected one of"):
        call(x.double())
    with pytest.raises(ValueError, match=r"level.up.left has shape \[2, 5, 72\], expected \[3, 5, 72\]"):
        call(up=replace(level["up"], left=level["up"].left[:2]))
    with pytest.raises(ValueError, match=r"pending parts of \[0, 5\] slots"):
        call(gate=replace(level["gate"], left=None, right=None))
    with pytest.raises(ValueError, match="level.down has rows without a matrix"):
        call(down=replace(level["down"], shared=None))
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        call(x.clone().requires_grad_())[0].sum().backward()
    weight, left, right = draw(2, 4, 8), draw(2, 3, 4), draw(2, 3, 8)
    with pytest.raises(
        ValueError, match=r"cms refresh_: argument right has shape \[2, 3, 7\], expected \[2, 3, 8\]"
    ):
        kernels.refresh_(weight, None, left, right[..., 1:], [0], 0.1)
    for rows in ([2], [0, 0], [-1]):
        with pytest.raises(ValueError, match="cms outer_add_: argument rows is"):
            kernels.outer_add_(weight, left, right, rows)
    with pytest.raises(ValueError, match="argument moment is None, expected a tensor with adam"):
        kernels.refresh_(weight, None, left, right, [0], 0.1, adam=Adam(weight.square(), (0.9, 0.99), 1, 3))
    with pytest.raises(ValueError, match="argument adam.square has shape"):
        kernels.refresh_(
            weight, None, left, right, [0], 0.1, moment=weight.clone(), adam=Adam(left, (0.9, 0.99), 1, 3))
    with pytest.raises(ValueError, match="contiguous"):
        kernels.refresh_(draw(2, 8, 4).mT, None, left, right, [0], 0.1)
    with pytest.raises(ValueError, match="cms newton_schulz: argument grad"):
        kernels.newton_schulz(weight.double())
    assert "float64" in kernels.unserved(config, torch.float64, x.device)
    assert "8192" in kernels.unserved(CMSConfig(8193, (8,)), x.dtype, x.device)
    assert "geglu" in kernels.unserved(CMSConfig(24, (8,), mlp="geglu"), x.dtype, x.device)
    assert "post_norm" in kernels.unserved(CMSConfig(24, (8,), post_norm=True), x.dtype, x.device)
    assert kernels.unserved(config, x.dtype, x.device) is None
