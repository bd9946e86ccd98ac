"""What a step asks of its gradient as a whole, in C++ against PyTorch in fp64: Newton-Schulz and gradients of RMS 1,
for shapes that leave rests everywhere; bits that depend on the matrix alone."""

import pytest
import torch
from numerics import within_yardstick

from hope_kernels.ops.cms import cpp_step
from hope_kernels.ops.cms import level as chunked
from hope_kernels.ops.cms.relative import TINY, normalise_
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=str(cpu_library.unavailable()))

SHAPES = [(1, 1), (3, 5), (5, 3), (8, 8), (16, 40), (40, 16), (24, 33), (47, 24), (48, 200), (300, 130), (256, 256)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ways():
    """Runs something at every width of vectors, and on one thread and more."""
    ask, threads = cpu_library.library().hope_cpu_width, torch.get_num_threads()
    most = ask(0)

    def found(f):
        results = []
        for bits, team in ((most, 1), (256, 1), (most, 2), (256, 3)):
            ask(bits)
            torch.set_num_threads(team)
            results.append(f())
        return results

    yield found
    ask(most)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz(shape):
    g = draw(2, *shape)
    ours, peer, exact = cpp_step.newton_schulz(g), chunked.newton_schulz(g), chunked.newton_schulz(g.double())
    within_yardstick(ours, peer, exact, "x")
    assert ours.is_contiguous() and torch.equal(g, draw(2, *shape))
    if min(shape) > 1:
        sizes = torch.linalg.svdvals(ours)
        assert sizes.max() < 1.3 and (sizes.min() > 0.5 or shape[0] == shape[1])


def test_newton_schulz_of_no_matrices_and_of_views():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert cpp_step.newton_schulz(torch.zeros(shape)).shape == shape
    g = draw(20, 33)
    assert torch.equal(cpp_step.newton_schulz(g), cpp_step.newton_schulz(g[None, None])[0, 0])
    assert torch.equal(cpp_step.newton_schulz(g.mT.contiguous().mT), cpp_step.newton_schulz(g))


def test_newton_schulz_takes_each_matrix_on_its_own():
    """Beside a NaN; a zero matrix stays zero, and a norm below 1e-7 counts as 1e-7."""
    g, spoiled = draw(9, 20, seed=1), draw(9, 20, seed=2)
    spoiled[3, 4] = float("nan")
    found = cpp_step.newton_schulz(torch.stack([spoiled, g, g * 0, g * 1e-10, spoiled.nan_to_num(float("inf"))]))
    assert found[0].isnan().all() and found[4].isnan().all() and not found[2].any()
    assert torch.equal(found[1], cpp_step.newton_schulz(g))
    torch.testing.assert_close(found[3], chunked.newton_schulz(g * 1e-10), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(33, 70), (128, 300), (300, 128), (200, 200)])
def test_bits_of_newton_schulz_are_those_of_any_width_and_number_of_threads(shape, ways):
    g = draw(2, *shape)
    first, *others = ways(lambda: cpp_step.newton_schulz(g))
    assert all(torch.equal(first, other) for other in others)


def test_a_gradient_through_newton_schulz_is_pytorchs():
    g = draw(6, 9).requires_grad_()
    cpp_step.newton_schulz(g).square().sum().backward()
    ours, g.grad = g.grad, None
    chunked.newton_schulz(g).square().sum().backward()
    assert torch.equal(ours, g.grad)


@pytest.mark.parametrize("n", [1, 7, 4095, 4096, 4097, 50_000])
def test_gradients_of_rms_one(n, ways):
    given = 3e-5 * draw(3, 1, n)
    ours, peer, exact = given.clone(), given.clone(), given.double()
    cpp_step.normalise_(ours, [0, 2])
    for t in (peer, exact):
        normalise_(t, [0, 2], chunked)
    assert torch.equal(ours[1], given[1])
    within_yardstick(ours[[0, 2]], peer[[0, 2]], exact[[0, 2]], "g")

    def again():
        t = given.clone()
        normalise_(t, [0, 2], cpp_step)
        return t

    assert all(torch.equal(t, ours) for t in ways(again))


def test_gradients_that_have_no_size():
    g = torch.stack([torch.zeros(3, 5), draw(3, 5), draw(3, 5)])
    g[1, 0, 0], g[2, 2, 4] = float("nan"), float("inf")
    strided = torch.full((3, 5, 3), TINY / 2).mT
    cpp_step.normalise_(g, [0, 1, 2])
    cpp_step.normalise_(strided, [0, 1, 2])
    assert not g[0].any() and g[1].isnan().all() and g[2, 2, 4].isnan() and not g[2, :2].any()
    assert (strided == 0.5).all()
