"""The drop-in class against the package it stands in for (nested-learning 0.2.0), in fp64."""

import contextlib
import io
import itertools

import pytest
import torch
from drop_in import D, moved, oracle, pair, read_all, relative, tensors, worst

from hope_kernels.compat import nested_learning as ours

# objective, momentum, use_skip, use_rank1_precond, use_alpha, adaptive_q, local_conv_window, stopgrad_vhat
BOTH = (True, False)
SWITCHES = list(itertools.product(("l2", "dot"), (0.0, 0.9), BOTH, BOTH, BOTH, BOTH, (4, None), BOTH))
# 16 runs in which every three switches take all eight combinations of their values
TRIPLES = [SWITCHES[int("".join(map(str, (a, b, c, d, b ^ c ^ d, a ^ c ^ d, a ^ b ^ c, a ^ b ^ d))), 2)]
           for a, b, c, d in itertools.product((0, 1), repeat=4)]
CHUNKS = [(1, 1), (4, 8), (8, 64), (4, 6)]


def compare(chunks, switches):
    """Outputs and final states, for one call and for several; draws where the oracle itself explodes do not
    count."""
    # odd: the last chunks stay open
    T, eta_scale = (71, 0.02) if 64 in chunks else (9 if chunks == (1, 1) else 13, 0.1)
    judged = 0
    for objective, momentum, skip, rank1, alpha, adaptive, conv, constant in switches:
        mine, theirs = pair(
            objective=objective, momentum=momentum, chunk_size_other=chunks[0], chunk_size_memory=chunks[1],
            use_skip=skip,
            use_rank1_precond=rank1, use_alpha=alpha, adaptive_q=adaptive, local_conv_window=conv,
            stopgrad_vhat=constant, eta_scale=eta_scale,
        )
        whole = 0.5 * torch.randn(3, T, D, dtype=torch.float64)
        for xs in ([whole], list(whole.split((7, 1, T - 8), 1))):
            z, b = read_all(theirs, xs)
            if not all(t.abs().max() < 1e6 for t in (z, *tensors(b).values())):
                continue
            judged += 1
            assert moved(theirs, b) > 1e-3
            y, a = read_all(mine, xs)
            error = max(relative(y, z), worst(a, b))
            if error > 1e-12:
                noisy, state = read_all(theirs, [x * (1 + 1e-15 * torch.randn_like(x)) for x in xs])
                response = max(relative(noisy, z), worst(state, b))
                assert error <= 10 * response, (
                    objective, momentum, skip, rank1, alpha, adaptive, conv, constant, len(xs), error
                )
    assert judged >= 1.8 * len(switches)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_updates_equal_the_package(chunks):
    compare(chunks, TRIPLES)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", CHUNKS)
def test_updates_equal_the_package_full_sweep(chunks):
    compare(chunks, SWITCHES)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "adaptive_q": True}, {"stopgrad_vhat": False}, {"use_skip": False}]
)
def test_dim_1(options):
    mine, theirs = pair(dim=1, chunk_size_other=3, chunk_size_memory=4, qk_l2_norm=False, **options)
    x = torch.randn(2, 11, 1, dtype=torch.float64)
    (y, a), (z, b) = read_all(mine, [x]), read_all(theirs, [x])
    assert moved(theirs, b) > 1e-3 and relative(y, z) < 1e-12 and worst(a, b) < 1e-12
    assert relative(mine(x), theirs(x)) < 1e-12


def test_a_row_reads_the_same_alone_and_in_company():
    mine, _ = pair(momentum=0.9, chunk_size_other=4, chunk_size_memory=6)
    x = torch.randn(3, 13, D, dtype=torch.float64)
    y, state = read_all(mine, [x])
    alone, own = read_all(mine, [x[1:2]])
    assert relative(alone, y[1:2]) < 1e-13
    assert all(relative(t, tensors(state)[key][1:2]) < 1e-13 for key, t in tensors(own).items())


def test_state_is_advanced_in_place_and_sizes_can_be_given():
    mine, theirs = pair()
    x = torch.randn(2, 20, D, dtype=torch.float64)
    _, a = mine.forward_with_updates(x, mine.init_fast_state(), chunk_size_other=3, chunk_size_memory=9.5)
    _, b = theirs.forward_with_updates(x, theirs.init_fast_state(), chunk_size_other=3, chunk_size_memory=9.5)
    assert worst(a, b) < 1e-12
    copy, held = a.clone(), a.memory.w2
    _, same = mine.forward_with_updates(x, a)
    assert same is a and worst(copy, b) < 1e-12 and relative(a.memory.w2, copy.memory.w2) > 1e-6
    assert torch.equal(held, copy.memory.w2)  # a tensor of the old state stays as it was
    unbatched = mine.init_fast_state()
    _, batched = mine.forward_with_updates(x, unbatched)
    assert batched is not unbatched and worst(unbatched, mine.init_fast_state()) == 0


def test_momentum_buffers_appear_with_their_first_use_and_outlive_it():
    mine, theirs = pair(momentum=0.9, chunk_size_other=4)
    still, their_still = pair(chunk_size_other=4)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    a, b = mine.init_fast_state(), theirs.init_fast_state()
    assert a.k.m_w1 is None
    for layer, other in ((mine, theirs), (still, their_still), (mine, theirs)):
        _, a = layer.forward_with_updates(x, a)
        _, b = other.forward_with_updates(x, b)
        a.k.m_w1 = b.k.m_w1 = None  # one missing buffer starts again at zero
        assert worst(a, b) < 1e-12
    assert a.memory.m_w2 is not None and a.q.m_w2 is None


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_reads_and_their_gradients(adaptive, batched):
    mine, theirs = pair(adaptive_q=adaptive)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    a, b = mine.init_fast_state(), theirs.init_fast_state()
    if batched:
        (_, a), (_, b) = mine.forward_with_updates(x, a), theirs.forward_with_updates(x, b)
    calls = (
        (lambda z: mine(z), lambda z: theirs(z)),
        (lambda z: mine.forward_with_state(z, a), lambda z: theirs.forward_with_state(z, b))
    )
    for call, expected in calls:
        mine.zero_grad()
        theirs.zero_grad()
        u, v = x.clone().requires_grad_(), x.clone().requires_grad_()
        first, second = call(u), expected(v)
        assert relative(first, second) < 1e-12
        first.square().sum().backward()
        second.square().sum().backward()
        assert relative(u.grad, v.grad) < 1e-12
        for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or relative(p.grad, q.grad) < 1e-12, name
        assert mine.m_memory.w2.weight.grad.abs().max() > 0
    flat = ours.SelfModifyingTitans(ours.SelfModifyingTitansConfig(D, local_conv_window=None))
    assert flat(torch.zeros(D)).shape == (D,)


@pytest.mark.parametrize("options", [{"use_alpha": False}, {"adaptive_q": True, "stopgrad_vhat": False}])
def test_apply_updates_in_place(options):
    mine, theirs = pair(**options)
    x = torch.randn(3, 12, D, dtype=torch.float64)
    before = {name: t.clone() for name, t in mine.state_dict().items()}
    mine.apply_updates_inplace(x, chunk_size_other=4)
    theirs.apply_updates_inplace(x, chunk_size_other=4)
    changed = {name for name, t in mine.state_dict().items() if not torch.equal(t, before[name])}
    assert {"m_k.w2.weight", "m_eta.w_skip.weight"} <= changed
    assert ("m_q.w1.weight" in changed) == mine.config.adaptive_q and (
        "m_alpha.w1.weight" in changed
    ) == mine.config.use_alpha
    for name, value in theirs.state_dict().items():
        assert relative(mine.state_dict()[name], value) < 1e-12, name


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]
)
@pytest.mark.parametrize("options", [{}, {"adaptive_q": True, "local_conv_window": None, "momentum": 0.9}])
def test_low_precision_is_no_worse_than_the_package(dtype, autocast, options):
    mine, theirs = pair(dtype, dim=32, eta_scale=0.02, chunk_size_other=4, chunk_size_memory=8, **options)
    exact = oracle.SelfModifyingTitans(theirs.config).double()
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 21, 32).to(dtype)
    truth, final = read_all(exact, [x.double()])
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        (y, a), (z, b) = read_all(mine, [x]), read_all(theirs, [x])
    assert y.dtype == z.dtype
    assert [t.dtype for t in tensors(a).values()] == [t.dtype for t in tensors(b).values()]

    def error(got, want):
        return float((got.double() - want).square().mean() ** 0.5)

    assert error(y, truth) <= 1.1 * error(z, truth)
    assert all(
        error(t, tensors(final)[key]) <= 1.1 * error(tensors(b)[key], tensors(final)[key]) + 1e-12
        for key, t in tensors(a).items()
    )


def test_checkpoints_move_both_ways():
    mine, theirs = pair()
    stored = io.BytesIO()
    torch.save(theirs.state_dict(), stored)
    stored.seek(0)
    fresh = ours.SelfModifyingTitans(ours.SelfModifyingTitansConfig(D)).double()
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    x = torch.randn(1, 6, D, dtype=torch.float64)
    assert torch.equal(fresh(x), mine(x))
    mine.apply_updates_inplace(x)
    theirs.load_state_dict(mine.state_dict())
    assert relative(theirs(x), mine(x)) < 1e-13
    torch.manual_seed(3)
    first = ours.SelfModifyingTitans(ours.SelfModifyingTitansConfig(D)).state_dict()
    torch.manual_seed(3)
    second = oracle.SelfModifyingTitans(oracle.SelfModifyingTitansConfig(D)).state_dict()
    assert all(torch.equal(first[name], t) for name, t in second.items())  # the same seed gives the same layer


def test_same_defaults_and_ranges():
    for options in ({}, {"chunk_size_other": 7}, {"chunk_size_other": 2.5}, {"chunk_size_memory": 3}):
        assert vars(ours.SelfModifyingTitansConfig(8, **options)) == vars(
            oracle.SelfModifyingTitansConfig(8, **options)
        )
    for bad in ({"dim": 0}, {"objective": "l1"}, {"momentum": 1.0}, {"momentum": -0.1},
                {"chunk_size_other": 0}, {"chunk_size_memory": 0},
                {"eta_scale": 0.0}, {"local_conv_window": 0}, {"local_conv_window": 0.5}):
        with pytest.raises(ValueError):
            oracle.SelfModifyingTitansConfig(**{"dim": 8, **bad})
        with pytest.raises(ValueError, match=f"SelfModifyingTitansConfig: {next(iter(bad))} is "):
            ours.SelfModifyingTitansConfig(**{"dim": 8, **bad})


def test_errors():
    layer = ours.SelfModifyingTitans(ours.SelfModifyingTitansConfig(8))
    for read in (layer, lambda x: layer.forward_with_state(x, layer.init_fast_state()),
                 lambda x: layer.forward_with_updates(x, layer.init_fast_state())):
        for shape in ((1, 3, 7), (3, 8)):
            with pytest.raises(ValueError, match=r"expected \[B, T, 8\]"):
                read(torch.zeros(shape))
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="has dtype torch.float64, expected torch.float32"):
        layer.forward_with_updates(x.double(), layer.init_fast_state())
    for size in (0, -1, 0.5):
        with pytest.raises(ValueError, match="expected positive integers"):
            layer.forward_with_updates(x, layer.init_fast_state(), chunk_size_memory=size)
    _, state = layer.forward_with_updates(x, layer.init_fast_state())
    with pytest.raises(ValueError, match="has 2 rows, expected 3"):
        layer.forward_with_updates(torch.zeros(3, 3, 8), state)
    state.k.w1 = state.k.w1[None]
    with pytest.raises(ValueError, match="4 dimensions, expected 2 or 3"):
        layer.forward_with_state(x, state)
    plain = ours.SelfModifyingTitans(ours.SelfModifyingTitansConfig(8, use_skip=False))
    with pytest.raises(ValueError, match="state.eta.w_skip is given, but the layer's m_eta has none"):
        plain.forward_with_updates(x, layer.init_fast_state())
    with pytest.raises(ValueError, match="state.eta.w_skip is None, but the layer's m_eta has one"):
        layer.forward_with_updates(x, plain.init_fast_state())
