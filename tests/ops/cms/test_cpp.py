"""The C++ side of the CMS levels against the PyTorch one in fp64, alone and under a layer that learns."""

import itertools

import pytest
import torch
from cms_stream import make
from numerics import within_yardstick

from hope_kernels import CMSConfig
from hope_kernels.ops.cms import cpp, cpp_gated, cpp_training
from hope_kernels.ops.cms import level as chunked
from hope_kernels.ops.cms.backends import resolve
from hope_kernels.ops.cms.matrix import Matrix
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=str(cpu_library.unavailable()))
EPS = 1e-6
CPU = torch.device("cpu")


def problem(config: CMSConfig, B: int, T: int, bias: bool, rank: int, scale: float):
    """x, dy, level in fp64; a matrix is shared in row 0 and the row's own elsewhere, with a pending part."""
    torch.manual_seed(0)
    d, N = config.d_model, config.hidden

    def matrix(r: int, c: int) -> Matrix:
        own, left, right = (
            torch.randn(B, *s, dtype=torch.float64) / c**0.5 for s in ((r, c), (rank, r), (rank, c))
        )
        return Matrix(
            torch.randn(r, c, dtype=torch.float64) / c**0.5, own, tuple(b > 0 for b in range(B)), left, right, -0.1
        )

    level = {"norm_gain": 1 + 0.3 * torch.randn(d, dtype=torch.float64), "up": matrix(N, d), "down": matrix(d, N)}
    level |= {"norm_bias": torch.randn(d, dtype=torch.float64)} if config.norm == "layernorm" else {}
    names = ("up", "gate", "down") if config.gated else ("up", "down")
    level |= {"gate": matrix(N, d)} if config.gated else {}
    level |= {"post_gain": 1 + 0.3 * torch.randn(d, dtype=torch.float64)} if config.post_norm else {}
    level |= {f"{n}_bias": torch.randn(d if n == "down" else N, dtype=torch.float64) for n in names if bias}
    x, dy = scale * torch.randn(B, T, d, dtype=torch.float64), torch.randn(B, T, d, dtype=torch.float64)
    return x, dy, level


def narrow(level: dict) -> dict:
    parts = ("shared", "own", "left", "right")
    cast = lambda t: Matrix(
        *(getattr(t, n).float() for n in parts[:2]), t.rows, *(getattr(t, n).float() for n in parts[2:]), t.scale
    )
    return {n: cast(t) if isinstance(t, Matrix) else t.float() for n, t in level.items()}


def passed(ops, x, dy, level, config, residual):
    y, saved = ops.level_forward(x, level, config, EPS, residual=residual, keep=True)
    dx, factors = ops.level_backward(dy, saved, level, config, EPS, residual=residual, need_dx=True)
    return {"y": y, "dx": dx} | {
        f"{n} {side}": t for n, pair in factors.items() for side, t in zip(("left", "right"), pair)
    }


def equals_chunked(backend, config, residual):
    for scale, T in ((1.0, 7), (1e-3, 1), (30.0, 300)):
        x, dy, level = problem(config, 3, T, config.norm == "layernorm", 2, scale)
        exact = passed(chunked, x, dy, level, config, residual)
        single = (x.float(), dy.float(), narrow(level), config, residual)
        ours, theirs = passed(backend, *single), passed(chunked, *single)
        assert ours.keys() == exact.keys()
        for name in exact:
            within_yardstick(ours[name], theirs[name], exact[name], f"{name} at {scale}")


@pytest.mark.parametrize("norm, residual", itertools.product(("rmsnorm", "layernorm"), (True, False)))
def test_a_level_and_its_gradient(norm, residual):
    equals_chunked(cpp, CMSConfig(24, (4,), norm=norm, expansion=3.0), residual)


GATED = [{"mlp": "swiglu"}, {"mlp": "geglu", "norm": "layernorm"}, {"mlp": "swiglu", "post_norm": True},
         {"post_norm": True}]


@pytest.mark.parametrize("options, residual", itertools.product(GATED, (True, False)))
def test_a_gated_level_or_one_with_a_norm_behind_it(options, residual):
    equals_chunked(cpp_gated, CMSConfig(24, (4,), expansion=3.0, **options), residual)


@pytest.mark.parametrize("options", GATED)
def test_bits_of_gated_levels_do_not_depend_on_company_or_threads(options):
    config = CMSConfig(40, (4,), **options)
    x, _, level = problem(config, 3, 150, "norm" in options, 1, 1.0)
    x, held = x.float(), {
        n: Matrix(t.shared, t.own, t.rows) if isinstance(t, Matrix) else t for n, t in narrow(level).items()
    }

    def read(a, b):
        return cpp_gated.level_forward(x[:, a:b], held, config, EPS, residual=True, keep=False)[0]

    whole, before = read(0, 150), torch.get_num_threads()
    for a, b in ((0, 1), (1, 20), (20, 21), (21, 150)):
        assert torch.equal(read(a, b), whole[:, a:b])
    try:
        torch.set_num_threads(3)
        assert torch.equal(read(0, 150), whole)
    finally:
        torch.set_num_threads(before)


def test_extreme_inputs_and_zero_rows():
    config = CMSConfig(8, (4,), expansion=1.0)
    level = {"norm_gain": torch.ones(8), "up": Matrix(1e4 * torch.eye(8)), "down": Matrix(torch.eye(8))}
    x = torch.tensor([[[0.0] * 8, [-1.0] * 8, [1.0, -1.0] * 4, [float("nan")] * 8]])
    ours, theirs = (passed(ops, x, torch.ones_like(x), level, config, True) for ops in (cpp, chunked))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True)
    assert torch.isfinite(ours["y"][:, :3]).all() and torch.isfinite(ours["dx"][:, :3]).all()


def test_bits_do_not_depend_on_threads_or_on_what_is_kept():
    config = CMSConfig(64, (4,))
    x, dy, level = problem(config, 2, 200, True, 1, 1.0)
    single = (x.float(), dy.float(), narrow(level), config, True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            z = torch.randn(2, 200, 256, generator=torch.Generator().manual_seed(1))
            a, slope = torch.empty_like(z), torch.empty_like(z)
            cpp.gelu(z, a, slope)
            found.append((a, slope))
        kept, _ = cpp.level_forward(*single[:1], single[2], config, EPS, residual=True, keep=True)
        bare, _ = cpp.level_forward(*single[:1], single[2], config, EPS, residual=True, keep=False)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found)) and torch.equal(kept, bare)


@pytest.mark.parametrize(
    "optimizer, variant",
    [("gd", "sequential"), ("momentum", "nested"), ("muon", "independent"), ("adam", "sequential")],
)
def test_a_layer_learns_alike(optimizer, variant):
    found = []
    for backend in ("cpp", "chunked"):
        layer = make(
            1, dtype=torch.float32, d_model=8, expansion=2.0, chunks=(4, 8), optimizer=optimizer,
            variant=variant, lr=0.02
        )
        x, error = torch.randn(2, 32, 8), 0.3 * torch.randn(2, 32, 8)
        with torch.no_grad():
            state, outputs = None, []
            for t in range(0, 32, 4):
                y, state = layer(x[:, t : t + 4], state, backend=backend)
                outputs.append(y)
                state = layer.refresh(state, error[:, t : t + 4], backend=backend)
        found.append(torch.cat(outputs, 1))
    assert not torch.equal(*found)  # they are different code
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)


def test_who_is_served():
    config = CMSConfig(16, (4,))
    with torch.no_grad():
        assert resolve(config, torch.float32, CPU) is cpp and resolve(
            config, torch.float32, CPU, "chunked"
        ) is chunked
        assert resolve(config, torch.float64, CPU) is chunked
        for other in ({"d_model": 12}, {"mlp": "swiglu"}, {"mlp": "geglu"}, {"post_norm": True}):
            assert resolve(config.replace(**other), torch.float32, CPU) is chunked
        for options in GATED:
            assert resolve(config.replace(**options), torch.float32, CPU, "cpp") is cpp_gated
        assert resolve(config.replace(mlp="gelu_erf"), torch.float32, CPU) is cpp
        assert resolve(config.replace(mlp="swiglu", d_model=12), torch.float32, CPU, "cpp") is chunked
    assert resolve(config.replace(mlp="swiglu"), torch.float32, CPU, "cpp") is chunked
    assert resolve(config, torch.float32, CPU) is cpp_training and resolve(
        config, torch.float32, CPU, inner=True
    ) is cpp
    for other in ({"d_model": 12}, {"mlp": "swiglu"}, {"norm": "layernorm"}, {"post_norm": True}):
        assert resolve(config.replace(**other), torch.float32, CPU) is chunked
    assert torch.func.grad(lambda x: x * (resolve(config, torch.float32, CPU) is chunked))(torch.ones(())) == 1
