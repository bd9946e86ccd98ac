"""The drop-in class against the package it stands in for (nested-learning 0.2.0), in fp64."""

import itertools

import pytest
import torch
from numerics import relative

from hope_kernels.compat import nested_learning as ours

oracle = pytest.importorskip("nested_learning.titan.self_modifying")

D = 5
FIELDS = ("w1", "w2", "w_skip", "m_w1", "m_w2", "m_w_skip")


def pair(**options):
    """The same layer in both packages; weights large enough and steps long enough that the memories really move."""
    torch.manual_seed(0)
    options = {"dim": D, "eta_scale": 0.1, **options}
    theirs = oracle.SelfModifyingTitans(oracle.SelfModifyingTitansConfig(**options)).double()
    mine = ours.SelfModifyingTitans(ours.SelfModifyingTitansConfig(**options)).double()
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def worst(state, expected) -> float:
    error = 0.0
    for name, field in itertools.product(ours.NAMES, FIELDS):
        a, b = getattr(getattr(state, name), field), getattr(getattr(expected, name), field)
        assert (a is None) == (b is None), (name, field)
        if a is not None:
            assert a.shape == b.shape
            error = max(error, relative(a, b))
    return error


def response(layer, state, expected, xs, out) -> float:
    """How far the oracle itself moves under input noise of 1e-15."""
    moved = layer.init_fast_state()
    for x in xs:
        y, moved = layer.forward_with_updates(x * (1 + 1e-15), moved)
    return max(worst(moved, expected), relative(y, out))


CHUNKS = [(1, 1), (4, 8), (8, 64), (4, 6)]
SWITCHES = list(itertools.product((True, False), (True, False), (True, False), (True, False), (4, None)))
# every pair of two switches' values occurs in some of these
PAIRWISE = [(True, True, True, True, 4), (True, True, False, False, None), (True, False, True, False, None),
            (True, False, False, True, 4), (False, True, True, False, 4), (False, True, False, True, None),
            (False, False, True, True, None), (False, False, False, False, 4)]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(("objective", "momentum"), [("l2", 0.0), ("dot", 0.9)])
def test_updates_equal_the_package(objective, momentum, chunks):
    compare(objective, momentum, chunks, PAIRWISE[::1 if max(chunks) < 10 else 3])


@pytest.mark.slow
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_updates_equal_the_package_full_sweep(objective, momentum, chunks):
    compare(objective, momentum, chunks, SWITCHES)


def compare(objective, momentum, chunks, switches):
    T = 70 if 64 in chunks else 13
    for skip, rank1, alpha, adaptive, conv in switches:
        mine, theirs = pair(objective=objective, momentum=momentum, chunk_size_other=chunks[0], chunk_size_memory=chunks[1], use_skip=skip,
                            use_rank1_precond=rank1, use_alpha=alpha, adaptive_q=adaptive, local_conv_window=conv)
        whole = 0.5 * torch.randn(3, T, D, dtype=torch.float64)
        for xs in ([whole], [whole[:, :7], whole[:, 7:]]):
            a, b = mine.init_fast_state(), theirs.init_fast_state()
            for x in xs:
                y, a = mine.forward_with_updates(x, a)
                z, b = theirs.forward_with_updates(x, b)
            assert relative(b.memory.w2, theirs.init_fast_state().memory.w2.expand(3, -1, -1)) > 1e-3
            if not b.memory.w2.abs().max() < 1e6:
                continue
            error = max(relative(y, z), worst(a, b))
            assert error <= 1e-12 or error <= 10 * response(theirs, a, b, xs, z), (skip, rank1, alpha, adaptive, conv, len(xs), error)


def test_state_is_advanced_in_place_and_sizes_can_be_given():
    mine, theirs = pair()
    x = torch.randn(2, 20, D, dtype=torch.float64)
    _, a = mine.forward_with_updates(x, mine.init_fast_state(), chunk_size_other=3, chunk_size_memory=9)
    _, b = theirs.forward_with_updates(x, theirs.init_fast_state(), chunk_size_other=3, chunk_size_memory=9)
    assert worst(a, b) < 1e-12
    copy = a.clone()
    _, same = mine.forward_with_updates(x, a)
    assert same is a and worst(copy, b) < 1e-12 and relative(a.memory.w2, copy.memory.w2) > 1e-6


@pytest.mark.parametrize("adaptive", [False, True])
def test_reads_and_their_gradients(adaptive):
    mine, theirs = pair(adaptive_q=adaptive)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    assert relative(mine(x), theirs(x)) < 1e-13
    _, a = mine.forward_with_updates(x, mine.init_fast_state())
    _, b = theirs.forward_with_updates(x, theirs.init_fast_state())
    u, v = x.clone().requires_grad_(), x.clone().requires_grad_()
    first, second = mine.forward_with_state(u, a), theirs.forward_with_state(v, b)
    assert relative(first, second) < 1e-12
    first.square().sum().backward()
    second.square().sum().backward()
    assert relative(u.grad, v.grad) < 1e-12
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert relative(p.grad, q.grad) < 1e-12, name


def test_apply_updates_in_place():
    mine, theirs = pair(use_alpha=False)
    x = torch.randn(3, 12, D, dtype=torch.float64)
    before = mine.m_k.w2.weight.clone()
    mine.apply_updates_inplace(x, chunk_size_other=4)
    theirs.apply_updates_inplace(x, chunk_size_other=4)
    assert relative(mine.m_k.w2.weight, before) > 1e-6
    for name, value in theirs.state_dict().items():
        assert relative(mine.state_dict()[name], value) < 1e-12, name


def test_errors_and_same_defaults():
    mine, theirs = ours.SelfModifyingTitansConfig(8), oracle.SelfModifyingTitansConfig(8)
    assert vars(mine) == vars(theirs)
    for bad in ({"dim": 0}, {"objective": "l1"}, {"momentum": 1.0}, {"chunk_size_other": 0}, {"eta_scale": 0.0}, {"local_conv_window": 0}):
        with pytest.raises(ValueError, match="SelfModifyingTitansConfig: "):
            ours.SelfModifyingTitansConfig(**{"dim": 8, **bad})
    with pytest.raises(ValueError, match="stopgrad_vhat"):
        ours.SelfModifyingTitansConfig(8, stopgrad_vhat=False)
    layer = ours.SelfModifyingTitans(mine)
    with pytest.raises(ValueError, match=r"expected \[B, T, 8\]"):
        layer.forward_with_updates(torch.zeros(1, 3, 7), layer.init_fast_state())
    _, state = layer.forward_with_updates(torch.zeros(2, 3, 8), layer.init_fast_state())
    with pytest.raises(ValueError, match="has 2 rows, expected 3"):
        layer.forward_with_updates(torch.zeros(3, 3, 8), state)
