import numpy as np
import optimizer_rules as rules
import pytest
import torch

from hope_kernels.optim import M3
from hope_kernels.optim.orthogonal import orthogonalised

SHAPES = ((12, 7), (7, 12), (12, 7), (9, 9))


def matrices(dtype=torch.float32, seed=0, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]


def give(params, step):
    """The gradients of a fixed quadratic with noise of its own in every step."""
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = 0.3 * p.detach() + torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


def gradient(index, shapes=SHAPES):
    def of(w, t):
        g = torch.Generator().manual_seed(100 + t)
        noise = [torch.randn(s, generator=g, dtype=torch.float64).numpy() for s in shapes]
        return 0.3 * w + noise[index]
    return of


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_without_a_slow_momentum_it_is_torchs_muon(adjust, nesterov):
    """Bit for bit, with decay and a rate that changes."""
    ours, theirs = matrices(), matrices()
    options = dict(lr=0.03, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust)
    optimizers = [
        M3(ours, alpha=0.0, ns_dtype=torch.bfloat16, **options), torch.optim.Muon(theirs, **options)
    ]
    for step in range(7):
        for params, optimizer in zip((ours, theirs), optimizers):
            give(params, step)
            optimizer.param_groups[0]["lr"] = 0.03 / (1 + step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert all(set(s) == {"fast"} for s in optimizers[0].state.values())  # no memory for what is not used


def test_in_fp32_it_is_muon_up_to_bf16():
    """Five steps of slope 3.4 amplify the rounding of bf16 (2^-9) to a few per cent of a step."""
    ours, theirs = matrices(), matrices()
    start = matrices()
    optimizers = M3(ours, lr=0.03, alpha=0.0), torch.optim.Muon(theirs, lr=0.03, weight_decay=0.0)
    for step in range(7):
        for params, optimizer in zip((ours, theirs), optimizers):
            give(params, step)
            optimizer.step()
    for a, b, s in zip(ours, theirs, start):
        assert 0 < (a - b).norm() < 0.06 * (b - s).norm()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("f", [1, 3])
def test_averages_equal_the_loop(f, nesterov):
    params = matrices(torch.float64)
    options = dict(lr=0.05, betas=(0.9, 0.99, 0.8), alpha=0.4, f=f, nesterov=nesterov, weight_decay=0.1)
    optimizer = M3(params, **options)
    for step in range(8):
        give(params, step)
        optimizer.step()
    for i, (p, start) in enumerate(zip(params, matrices(torch.float64))):
        want = rules.m3_ema(start.detach().numpy(), gradient(i), 8, **options)
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("f", [1, 3])
def test_algorithm_1_equals_the_loop(f):
    params = matrices(torch.float64)
    options = dict(lr=0.05, betas=(0.9, 0.5, 0.8), alpha=0.4, f=f, eps=1e-3)
    optimizer = M3(params, accumulate="paper", **options)
    for step in range(8):
        give(params, step)
        optimizer.step()
    for i, (p, start) in enumerate(zip(params, matrices(torch.float64))):
        want = rules.m3_paper(start.detach().numpy(), gradient(i), 8, **options)
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=0, atol=1e-12)


def test_the_slow_momentum_is_a_mean_of_means():
    """Newton-Schulz does not see its size; whoever reads the state, or changes f, does."""
    p = matrices(torch.float64)[0]
    optimizer, given = M3([p], betas=(0.9, 0.9, 0.75), f=2), []
    for step in range(5):
        give([p], step)
        given.append(p.grad.clone())
        optimizer.step()
    first, second = (given[0] + given[1]) / 2, (given[2] + given[3]) / 2
    state = optimizer.state[p]
    torch.testing.assert_close(state["slow"], 0.25 * (0.75 * first + second), rtol=0, atol=1e-14)
    assert torch.equal(state["sum"], given[4])


def test_matrices_count_their_own_rounds():
    """One without a gradient in some steps has a round of its own f gradients."""
    params = matrices(torch.float64, shapes=((5, 4), (5, 4)))
    alone = matrices(torch.float64, shapes=((5, 4), (5, 4)))[1:]
    optimizers = M3(params, lr=0.1, f=2), M3(alone, lr=0.1, f=2)
    for step in range(7):
        give(params, step)
        alone[0].grad = 0.3 * alone[0].detach() + params[1].grad - 0.3 * params[1].detach()
        if step == 3:
            params[1].grad = alone[0].grad = None
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].state[params[0]]["step"] == 1 and optimizers[0].state[params[1]]["step"] == 0
    torch.testing.assert_close(params[1], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpp", "triton", "chunked"])
def test_backends(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    found = []
    for chosen in (backend, None):
        params = matrices(shapes=((6, 5), (6, 5)))
        optimizer = M3(params, lr=0.1, f=1, backend=chosen)
        for step in range(2):
            give(params, step)
            optimizer.step()
        found.append(params)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_backend_that_cannot_serve_is_not_replaced():
    params = matrices(torch.float64)
    optimizer = M3(params, backend="triton")
    give(params, 0)
    with pytest.raises(ValueError, match="triton"):
        optimizer.step()


def test_stacks_are_bounded(monkeypatch):
    """More matrices than are stacked at once: the same steps."""
    from hope_kernels.optim import orthogonal

    given = [torch.randn(6, 5, dtype=torch.float64) for _ in range(5)]
    want = orthogonalised(given)
    monkeypatch.setattr(orthogonal, "BATCH", 60)
    for a, b in zip(orthogonalised(given), want):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
