import math

import pytest
import torch

from hope_kernels.optim import DeepMomentum, DeltaMomentum
from hope_kernels.optim.deep_momentum import first_weights

SHAPES = ((7, 4), (4, 7), (7, 4))


def matrices():
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in SHAPES]


def give(params, step):
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = 0.3 * p.detach() + torch.randn(p.shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("b", [0.0, 1.0])
def test_a_linear_memory_is_momentum_or_delta_momentum(b, orthogonalize):
    deep, delta = matrices(), matrices()
    options = dict(lr=0.1, a=0.9, b=b, orthogonalize=orthogonalize)
    optimizers = DeepMomentum(deep, memory="linear", **options), DeltaMomentum(delta, **options)
    for step in range(6):
        for params, optimizer in zip((deep, delta), optimizers):
            give(params, step)
            optimizer.step()
    for x, y in zip(deep, delta):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("hidden", [None, 11])
def test_two_layers_descend_their_loss(hidden, power):
    """Against autograd of the loss in the docstring, matrix by matrix."""
    a, b, lr = 0.9, 0.7, 0.1
    params = matrices()
    optimizer = DeepMomentum(params, lr, a, b, hidden=hidden, power=power, orthogonalize=False, seed=3)
    mine = [p.detach().clone() for p in params]
    memories = []
    for w in mine:
        r, c = w.shape
        h = hidden or min(r, c)
        memories.append([first_weights(h, c, 3).double(), torch.zeros(r, h, dtype=torch.float64)])
    for step in range(5):
        give(params, step)
        grads = [p.grad.clone() for p in params]
        optimizer.step()
        for w, memory, g in zip(mine, memories, grads):
            start = first_weights(len(memory[0]), w.shape[1], 3).double()
            A, B = (t.clone().requires_grad_() for t in memory)
            answer = lambda x, A, B: B @ torch.tanh(A @ x) / math.sqrt(len(A))
            k = g.sign() * g.abs() ** power
            k = k / k.norm()
            y = answer(k.T, A, B)
            loss = -(1 - a) * y.trace() + b / 2 * y.square().sum()
            dA, dB = torch.autograd.grad(loss, (A, B))
            memory[:] = start + a * (memory[0] - start) - dA, a * memory[1] - dB
            w -= lr * answer(torch.eye(w.shape[1], dtype=torch.float64), *memory)
    for p, w in zip(params, mine):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-12)


def test_two_layers_answer_along_the_gradient():
    """A memory that has read one gradient many times descends along it, with either sign alike."""
    torch.manual_seed(0)
    g = torch.randn(12, 9, dtype=torch.float64)
    moved = []
    for sign in (1, -1):
        p = torch.nn.Parameter(torch.zeros(12, 9, dtype=torch.float64))
        optimizer = DeepMomentum([p], lr=1.0, hidden=64)
        for _ in range(20):
            p.grad = sign * g
            optimizer.step()
        moved.append(p.detach())
    torch.testing.assert_close(moved[0], -moved[1], rtol=0, atol=1e-12)
    assert torch.nn.functional.cosine_similarity(-moved[0].flatten(), g.flatten(), 0) > 0.5


def test_the_scale_of_gradients_does_not_matter_to_two_layers():
    found = []
    for scale in (1.0, 2.0**20):
        p = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
        optimizer = DeepMomentum([p], lr=0.1)
        for step in range(4):
            g = torch.Generator().manual_seed(step)
            p.grad = scale * torch.randn(6, 5, generator=g, dtype=torch.float64)
            optimizer.step()
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
