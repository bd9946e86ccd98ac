"""Projections and norms: C++ against fp64 and PyTorch, its bits in any company, and who serves a call."""

import pytest
import torch
import torch.nn.functional as F
from numerics import within_yardstick

from hope_kernels import HopeConfig, TitansConfig
from hope_kernels.backend import BY_ALL, NO_GRADIENT, Request
from hope_kernels.ops.linear import cpp, forward
from hope_kernels.ops.linear.backends import resolve
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

# (tokens, inputs, outputs): whole strips, those of 32 and 16, outputs that fill none, several depths, one of each
SHAPES = [(1, 8, 8), (3, 5, 1), (7, 64, 64), (29, 100, 77), (2, 600, 131), (100, 1100, 112), (193, 40, 48), (0, 16, 16)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, K, R", SHAPES)
def test_a_projection_is_as_exact_as_pytorchs(n, K, R):
    x, w, more = draw(n, K), draw(R, K, seed=1), draw(n, R, seed=2)
    within_yardstick(cpp.linear(x, w), forward.linear(x, w), forward.linear(x.double(), w.double()), "y")
    assert torch.equal(cpp.linear(x, w, more), cpp.linear(x, w) + more)
    bias = draw(R, seed=3)
    assert torch.equal(cpp.linear(x, w, bias=bias), cpp.linear(x, w) + bias)


@pytest.mark.parametrize("n, K, R", SHAPES)
def test_a_number_is_one_chain_of_fmas(n, K, R):
    """fma(x, w, sum) over the inputs in order, rounded once each: fp64 holds the products of fp32 exactly, and the sum
    of one of them and a number of fp32, rounded to fp32, is all but never rounded twice."""
    x, w = draw(n, K), draw(R, K, seed=1)
    y = torch.zeros(n, R)
    for k in range(K):
        y = (y.double() + x[:, k, None].double() * w[None, :, k].double()).float()
    assert torch.equal(cpp.linear(x, w), y)


@pytest.mark.parametrize("K, R", [(40, 48), (600, 131), (1100, 64)])
def test_bits_of_a_token_do_not_depend_on_company_threads_or_vectors(K, R):
    x, w = draw(210, K), draw(R, K, seed=1)
    gain, whole = draw(K // 8 * 8, seed=3), cpp.linear(x, w)
    rows = x[:, : gain.numel()]
    normed, centred = cpp.rms_norm(rows, gain, 1e-6), cpp.layer_norm(rows, gain, rows[0], 1e-6)
    for a, b in ((0, 1), (1, 3), (3, 8), (17, 80), (80, 210)):
        assert torch.equal(cpp.linear(x[a:b], w), whole[a:b])
        assert torch.equal(cpp.rms_norm(rows[a:b], gain, 1e-6), normed[a:b])
        assert torch.equal(cpp.layer_norm(rows[a:b], gain, rows[0], 1e-6), centred[a:b])
    assert torch.equal(cpp.linear(x.view(2, 105, K), w), whole.view(2, 105, R))
    threads, width = torch.get_num_threads(), cpu_library.library().hope_cpu_width
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(cpp.linear(x.repeat(6, 1), w), whole.repeat(6, 1))
        for bits in (256, 512):
            width(bits)
            assert torch.equal(cpp.linear(x, w), whole) and torch.equal(cpp.rms_norm(rows, gain, 1e-6), normed)
            assert torch.equal(cpp.layer_norm(rows, gain, rows[0], 1e-6), centred)
    finally:
        torch.set_num_threads(threads)
        width(512)


def test_a_token_that_is_not_finite_stays_alone():
    x, w = draw(20, 24), draw(40, 24, seed=1)
    clean = cpp.linear(x, w)
    x[7] = float("nan")
    y = cpp.linear(x, w)
    assert y[7].isnan().all() and torch.equal(y[:7], clean[:7]) and torch.equal(y[8:], clean[8:])


@pytest.mark.parametrize("n, d", [(1, 8), (5, 40), (8, 128), (19, 256)])
def test_a_norm_is_as_exact_as_pytorchs(n, d):
    x, gain = draw(n, d), draw(d, seed=1)
    exact = forward.rms_norm(x.double(), gain.double(), 1e-6)
    within_yardstick(cpp.rms_norm(x, gain, 1e-6), forward.rms_norm(x, gain, 1e-6), exact, "y")
    assert torch.equal(cpp.rms_norm(0 * x, gain, 1e-6), 0 * x)


@pytest.mark.parametrize("n, d", [(1, 8), (5, 40), (8, 128), (19, 256)])
def test_a_layer_norm_is_as_exact_as_pytorchs(n, d):
    x, gain, shift = 3 + draw(n, d), draw(d, seed=1), draw(d, seed=2)
    exact = F.layer_norm(x.double(), (d,), gain.double(), shift.double(), 1e-6)
    within_yardstick(cpp.layer_norm(x, gain, shift, 1e-6), F.layer_norm(x, (d,), gain, shift, 1e-6), exact, "y")
    assert torch.equal(cpp.layer_norm(0 * x, gain, shift, 1e-6), shift.expand(n, d))
    with pytest.raises(ValueError, match=f"shape .{d - 1}. .* expected {d} numbers"):
        cpp.layer_norm(x, gain, shift[:-1], 1e-6)


@pytest.mark.parametrize("softplus", [False, True])
def test_a_gate_is_as_exact_as_pytorchs(softplus):
    raw, bias = 8 * draw(3, 7, 5), draw(5, seed=1)
    exact = forward.gate(raw.double(), bias.double(), softplus, 0.5)
    y = cpp.gate(raw, bias, softplus, 0.5)
    within_yardstick(y, forward.gate(raw, bias, softplus, 0.5), exact, "y")
    assert torch.equal(torch.cat([cpp.gate(raw[:, t : t + 1], bias, softplus, 0.5) for t in range(7)], 1), y)


def test_weights_that_change_in_place_are_seen():
    x, w = draw(3, 16), draw(24, 16, seed=1)
    before = cpp.linear(x, w)
    w.mul_(2)
    assert torch.equal(cpp.linear(x, w), 2 * before)
    assert torch.equal(cpp.linear(x, w.t().contiguous().t()), 2 * before)  # however it lies in memory


def test_a_tensor_of_a_class_of_its_own_computes_for_itself():
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                return 2 * function(*args, **(kwargs or {}))

    x, w = draw(3, 16), draw(24, 16, seed=1)
    assert torch.equal(cpp.linear(x, w.as_subclass(Doubled)), 2 * forward.linear(x, w))


def test_who_serves():
    config, cpu = TitansConfig(16, 2), torch.device("cpu")
    assert resolve(Request(config, torch.float32, cpu, NO_GRADIENT)) is cpp
    for request in (
        Request(config, torch.float32, cpu, BY_ALL), Request(config, torch.float64, cpu, NO_GRADIENT),
        Request(config, torch.float32, torch.device("meta"), NO_GRADIENT),
        Request(TitansConfig(12, 2), torch.float32, cpu, NO_GRADIENT),
    ):
        assert resolve(request) is forward
    attention = HopeConfig(8, 16, 1, num_heads=2, mixer="attention")
    assert resolve(Request(attention, torch.float32, cpu, NO_GRADIENT)) is cpp
    converted = Request(attention.replace(rope_dtype="float32"), torch.float32, cpu, NO_GRADIENT)
    assert resolve(converted) is forward and resolve(converted, "cpp") is cpp
    assert resolve(Request(config, torch.float32, cpu, NO_GRADIENT), "chunked") is forward
    with torch.autocast("cpu"):
        assert resolve(Request(config, torch.float32, cpu, NO_GRADIENT)) is forward


def test_what_does_not_fit_is_refused():
    x, w = draw(3, 16), draw(24, 16, seed=1)
    with pytest.raises(ValueError, match="expected 48 numbers"):
        cpp.linear(x.double(), w)
    with pytest.raises(ValueError, match="expected 72 numbers"):
        cpp.linear(x, w, draw(3, 16))
