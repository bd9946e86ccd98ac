import numpy as np
import optimizer_rules as rules
import pytest
import torch

from hope_kernels.optim import DeepMomentum, DeltaMomentum
from hope_kernels.optim.delta_momentum import unit

SHAPES = ((7, 4), (4, 7), (7, 4))


def matrices(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in SHAPES]


def noise(step):
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES]


@pytest.mark.parametrize("a, b", [(0.95, 1.0), (0.5, 1.4), (0.0, 0.3)])
def test_it_equals_the_loop(a, b):
    params = matrices()
    optimizer = DeltaMomentum(params, lr=0.2, a=a, b=b)
    for step in range(6):
        for p, n in zip(params, noise(step)):
            p.grad = 0.3 * p.detach() + n
        optimizer.step()
    for i, (p, start) in enumerate(zip(params, matrices())):
        gradient = lambda w, t, i=i: 0.3 * w + noise(t)[i].numpy()
        want = rules.delta_momentum(start.detach().numpy(), gradient, 6, 0.2, a, b)
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=0, atol=1e-12)


def test_without_erasing_it_is_momentum():
    """The mean of the gradients that torch.optim.SGD keeps with dampening = momentum, from zero."""
    ours, theirs = matrices(), matrices()
    optimizer = DeltaMomentum(ours, lr=0.2, a=0.9, b=0.0)
    sgd = torch.optim.SGD(theirs, lr=0.2, momentum=0.9, dampening=0.9)
    for p in theirs:
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for step in range(6):
        for params in (ours, theirs):
            for p, n in zip(params, noise(step)):
                p.grad = 0.3 * p.detach() + n
        optimizer.step()
        sgd.step()
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_direction_is_that_of_any_size(dtype):
    info = torch.finfo(dtype)
    g = torch.tensor([[1.0, -0.5, 0.0], [0.25, 1.0, -1.0]], dtype=dtype)
    wanted = g.double() / torch.linalg.matrix_norm(g.double())
    for size in (info.tiny, 8 * info.tiny, info.tiny ** 0.5, 1.0, info.max**0.5, info.max):
        torch.testing.assert_close(unit((g * size)[None])[0].double(), wanted, rtol=0, atol=4 * info.eps)
    assert torch.equal(unit(torch.zeros(1, 2, 3, dtype=dtype)), torch.zeros(1, 2, 3, dtype=dtype))


@pytest.mark.parametrize("size", [1e-18, 1e-24, 1e-28, 1e-33, 1e-39])
@pytest.mark.parametrize("make", [DeltaMomentum, lambda p, **o: DeepMomentum(p, memory="linear", **o)])
def test_a_gradient_that_almost_vanishes_only_forgets(make, size):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 5))
    optimizer = make([p], lr=0.1, orthogonalize=False)
    p.grad = torch.randn(6, 5)
    optimizer.step()
    before = next(iter(optimizer.state[p].values())).norm()
    for _ in range(6):
        p.grad = size * torch.randn(6, 5)
        optimizer.step()
        after = next(iter(optimizer.state[p].values())).norm()
        assert after < before
        before = after


def test_a_gradient_of_rank_1_replaces_what_is_there():
    """With b = a the memory holds along a direction the last gradient alone, once however often it was
    written, and across it what it held before, weaker by a."""
    torch.manual_seed(0)
    a, (u, v, other) = 0.9, torch.randn(3, 6, dtype=torch.float64)
    other -= v * (other @ v) / (v @ v)  # across v
    first, across = torch.outer(u, v), torch.outer(u.flip(0), other)
    p = torch.nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    optimizer = DeltaMomentum([p], a=a, b=a)
    plain = DeltaMomentum([torch.nn.Parameter(torch.zeros_like(p))], a=a, b=0.0)

    def write(g):
        for o in (optimizer, plain):
            o.param_groups[0]["params"][0].grad = g.clone()
            o.step()
        return optimizer.state[p]["momentum"]

    write(across)
    write(3 * first)  # something else along v, to be replaced
    once = write(first).clone()
    twice = write(first)
    x, y = v / (v @ v), other / (other @ other)
    for m in (once, twice):
        torch.testing.assert_close(m @ x, (1 - a) * u, rtol=0, atol=1e-14)
    torch.testing.assert_close(twice @ y, (1 - a) * a**3 * u.flip(0), rtol=0, atol=1e-14)
    added = plain.state[plain.param_groups[0]["params"][0]]["momentum"]
    torch.testing.assert_close(added @ x, (1 - a) * (1 + a + 3 * a * a) * u, rtol=0, atol=1e-14)


def test_the_default_overshoots_by_one_minus_a():
    """b = 1 leaves a - b = -0.05 of what was there: written twice, it is held 0.95 times."""
    torch.manual_seed(0)
    g = torch.outer(*torch.randn(2, 5, dtype=torch.float64))
    p = torch.nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
    optimizer = DeltaMomentum([p])
    for _ in range(2):
        p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum"], 0.05 * 0.95 * g, rtol=0, atol=1e-15)


def test_it_stays_bounded_where_the_papers_form_diverges():
    """Gradients a thousand times as large as the weights, 300 steps, b near its limit."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    optimizer = DeltaMomentum([p], lr=0.0, a=0.9, b=1.89)
    for _ in range(300):
        p.grad = 1000 * torch.randn(6, 5, dtype=torch.float64)
        optimizer.step()
    assert optimizer.state[p]["momentum"].norm() < 1000 * 30**0.5 * 3


def test_a_gradient_of_zero_only_forgets():
    p = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = DeltaMomentum([p], a=0.5)
    for g in (torch.ones(3, 4), torch.zeros(3, 4)):
        p.grad = g
        optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum"], torch.full((3, 4), 0.25))


def test_orthogonal_steps_are_muons_of_this_momentum():
    """b = 0 and orthogonalize: torch's Muon without Nesterov, bit for bit."""
    ours, theirs = matrices(), matrices()
    optimizer = DeltaMomentum(ours, lr=0.1, a=0.95, b=0.0, orthogonalize=True, ns_dtype=torch.bfloat16)
    muon = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, nesterov=False)
    for step in range(5):
        for params in (ours, theirs):
            for p, n in zip(params, noise(step)):
                p.grad = n
        optimizer.step()
        muon.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
