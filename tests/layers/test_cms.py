"""The Continuum Memory System: layer and PyTorch ops against the NumPy token loop, and the properties a
stream must have."""

import itertools
import math

import numpy as np
import pytest
import torch
from cms_stream import D, Stream, make, reference_row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hope_kernels.config import CMSConfig, TitansConfig
from hope_kernels.layers.cms import ContinuumMemory
from hope_kernels.ops import cms_refresh
from hope_kernels.ops.cms import chain, reference
from hope_kernels.ops.cms import level as chunked
from hope_kernels.ops.cms.state import CMSState
from hope_kernels.state_file import load_state

CHUNKS = [(2,), (2, 4, 8), (3, 6)]
VARIANTS = ("sequential", "independent", "nested")
OPTIMIZERS = ("gd", "momentum", "muon", "adam")
GRID = list(itertools.product(VARIANTS, ("gelu", "swiglu", "geglu"), ("rmsnorm", "layernorm"), OPTIMIZERS))


def picker(seed):
    rng = np.random.default_rng(seed)
    return lambda low, high: int(rng.integers(low, high + 1))


@pytest.mark.parametrize("case", range(len(GRID)))
def test_layer_equals_the_token_loop_over_random_splits(case):
    variant, mlp, norm, optimizer = GRID[case]
    layer = make(
        case, variant=variant, mlp=mlp, norm=norm, optimizer=optimizer, chunks=CHUNKS[case % 3],
        bias=case % 2 == 1, post_norm=case % 5 < 2, precondition=0.5 if case // 4 % 2 else None,
    )
    stream = Stream(layer, 3, 19, seed=case)
    with torch.no_grad():
        stream.finish(picker(case))
    stream.check()


def chooser(choices):
    """pick(low, high) from a short list of small integers, which shrinks well; the whole range's end once the
    list is used up."""
    rest = iter(choices)
    return lambda low, high: low + next(rest, high - low) % (high - low + 1)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    choices=st.lists(st.integers(0, 11), max_size=60), variant=st.sampled_from(VARIANTS),
    chunks=st.sampled_from(CHUNKS), batch=st.integers(1, 3), grad=st.booleans(),
    pending=st.sampled_from([None, 2, 6, 7]), averaged=st.sampled_from(["momentum", "adam"]),
    rho=st.sampled_from([None, 0.5]),
)
def test_any_split_any_raggedness(choices, variant, chunks, batch, grad, pending, averaged, rho):
    optimizer = averaged if pending is None else "gd"
    layer = make(1, variant=variant, chunks=chunks, optimizer=optimizer, precondition=rho)
    layer.pending = pending
    stream = Stream(layer, batch, 14, seed=2)
    with torch.set_grad_enabled(grad):
        stream.finish(chooser(choices))
    stream.y = stream.y.detach()
    stream.check()


@pytest.mark.parametrize("variant", ["sequential", "independent"])
@pytest.mark.parametrize("mlp,norm,post_norm", [
    ("gelu", "rmsnorm", False), ("gelu", "layernorm", True), ("swiglu", "layernorm", False),
    ("geglu", "rmsnorm", True), ("gelu_erf", "layernorm", False),
])
def test_hand_written_gradients_equal_autograd(variant, mlp, norm, post_norm):
    layer = make(3, variant=variant, mlp=mlp, norm=norm, post_norm=post_norm, chunks=(2, 4, 8), bias=True)
    x = torch.randn(1, 1, D, dtype=torch.float64, requires_grad=True)
    error = torch.randn(1, 1, D, dtype=torch.float64)
    row = reference_row(layer)
    y, pullback = reference.forward(x.detach().numpy()[0, 0], row.levels, layer.config, row.mix)
    dx, grads = pullback(error.numpy()[0, 0])
    out = chain.cms_forward(x, list(layer.levels), layer.config, layer.mix)
    torch.testing.assert_close(out[0, 0].detach(), torch.from_numpy(y), rtol=1e-12, atol=1e-13)
    wanted = [x] + [layer.levels[l][n] for l in range(3) for n in row.names]
    found = torch.autograd.grad(out, wanted, error)
    for have, want in zip(found, [dx] + [grads[l][n] for l in range(3) for n in row.names]):
        torch.testing.assert_close(
            have.squeeze() if have.dim() == 3 else have, torch.from_numpy(want), rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_cms_gradients_in_every_mode_and_with_weights_per_row(mode):
    layer = make(4, chunks=(3, 6), lr=(0.1, 0.0))
    with mode():
        x, error = torch.randn(2, 3, D, dtype=torch.float64), torch.randn(2, 3, D, dtype=torch.float64)
        levels = [
            {n: p * 1.1 if p.dim() == 1 else torch.stack([p, 1.3 * p]) for n, p in level.items()}
            for level in layer.levels
        ]
        grads = chain.cms_gradients(x, error, levels, layer.config)
    assert grads[1] is None and not any(g.requires_grad for g in grads[0].values())
    x, error = x.clone(), error.clone()
    for b in range(2):
        own = [{n: (t if t.dim() == 1 else t[b]).detach().numpy() for n, t in level.items()} for level in levels]
        want = {n: 0 for n in grads[0]}
        for t in range(3):
            _, pullback = reference.forward(x[b, t].numpy(), own, layer.config)
            want = {n: want[n] + g for n, g in pullback(error[b, t].numpy())[1][0].items()}
        for n, g in grads[0].items():
            np.testing.assert_allclose(g[b].numpy(), want[n], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_nested_reset_returns_to_the_shared_weights_and_zero_averages(optimizer):
    layer = make(5, variant="nested", chunks=(2, 4, 8), optimizer=optimizer)
    stream = Stream(layer, 2, 8)
    with torch.no_grad():
        for step in range(4):
            stream.read([2, 2])
            stream.deliver([2, 2])
            own = [o[0] for o in stream.state.own]
            assert own == [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]][step]
            for l, o in enumerate(own[:2]):
                for average in (stream.state.moments[l], stream.state.squares[l]):
                    assert average is None or bool(average["up"].any()) == bool(o)
                assert stream.state.steps[l][0] == (o if optimizer == "adam" else 0)
                if not o:
                    assert layer.effective_levels(stream.state)[l]["up"] is layer.levels[l]["up"]
    stream.check()


def test_a_frozen_level_keeps_the_clock_of_a_nested_chain():
    layer = make(5, variant="nested", chunks=(2, 4), lr=(0.1, 0.0))
    stream = Stream(layer, 1, 4)
    with torch.no_grad():
        for own in (1, 0):
            stream.read([2])
            stream.deliver([2])
            assert stream.state.own == [[own], [0]] and stream.state.weights[1] is None
    stream.check()


def test_copy_on_write():
    layer = make(6, chunks=(2, 4))
    shared = {n: p.detach().clone() for n, p in layer.named_parameters()}
    stream = Stream(layer, 2, 4)
    with torch.no_grad():
        stream.read([2, 2])
        stream.deliver([1, 1])
        assert stream.state.weights == [None, None] and stream.state.grads == [None, None]
        stream.deliver([1, 0])
        assert stream.state.weights[1] is None and stream.state.weights[0]["up"].shape == (2, 8, D)
        assert stream.state.own == [[1, 0], [0, 0]]
        assert torch.equal(stream.state.weights[0]["up"][1], layer.levels[0]["up"])
        stream.deliver([0, 1])
    assert all(torch.equal(p, shared[n]) for n, p in layer.named_parameters())


def test_rows_that_never_refreshed_follow_the_shared_weights_and_carry_gradients():
    layer = make(7, chunks=(2,))
    x = torch.randn(2, 2, D, dtype=torch.float64)
    _, state = layer(x, lengths=[2, 1])
    state = layer.refresh(state, torch.randn_like(x), lengths=[2, 0])
    y, _ = layer(x[:, :1], state)
    up = layer.levels[0]["up"]
    (own,) = torch.autograd.grad(y[0].sum(), up, retain_graph=True)
    (shared,) = torch.autograd.grad(y[1].sum(), up)
    assert not own.any() and shared.any()
    with torch.no_grad():
        up.add_(1.0)
        moved, _ = layer(x[:, :1], state.clone())
        assert torch.equal(moved[0], y[0]) and not torch.allclose(moved[1], y[1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lr_zero_is_untouched_bit_for_bit_even_by_nan(optimizer):
    layer = make(8, chunks=(2, 4, 8), lr=(0.1, 0.0, 0.1), optimizer=optimizer)
    x, error = torch.randn(1, 8, D, dtype=torch.float64), torch.full((1, 2, D), math.nan, dtype=torch.float64)
    state = None
    with torch.no_grad():
        for t in range(0, 8, 2):
            _, state = layer(x[:, t : t + 2], state)
            state = layer.refresh(state, error)
        assert state.weights[1] is None and state.grads[1] is None and state.moments[1] is None
        assert layer.effective_levels(state)[1]["up"] is layer.levels[1]["up"]
        assert state.weights[0]["up"].isnan().any() and state.weights[2]["up"].isnan().any()


@pytest.mark.parametrize("optimizer, rho", [("muon", None), ("adam", None), ("gd", 1.0)])
def test_nan_stays_in_its_row(optimizer, rho):
    layer = make(9, chunks=(2, 4), optimizer=optimizer, precondition=rho)
    clean, dirty = Stream(layer, 3, 8, seed=3), Stream(layer, 3, 8, seed=3)
    dirty.x[1], dirty.e[1] = math.nan, math.nan
    with torch.no_grad():
        clean.finish(picker(5))
        dirty.finish(picker(5))
    for b in (0, 2):
        assert torch.equal(clean.y[b], dirty.y[b])
        assert all(
            torch.equal(p, q) for p, q in zip(clean.state.select([b]).tensors(), dirty.state.select([b]).tensors())
        )


@pytest.mark.parametrize("lr", [0.0, (0.0, 0.0)])
def test_all_lr_zero_learn_is_off(lr):
    layer = make(10, lr=lr)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    with torch.no_grad():
        on, state = layer(x, learn=True)
        off, _ = layer(x, learn=False)
        assert torch.equal(on, off) and state.tensors() == []
        assert layer.refresh(state, x) is state and state.pos == [9, 9]


def test_learn_off_never_changes_weights_and_delays_commits():
    layer = make(11, chunks=(2, 4))
    stream = Stream(layer, 1, 8)
    with torch.no_grad():
        stream.read([2])
        stream.deliver([2])
        before = [t.clone() for t in stream.state.tensors()]
        stream.read([1])
        stream.read([1], learn=False)
        assert stream.state.own == [[1], [0]]
        stream.deliver([1])  # ignored
        assert all(torch.equal(a, b) for a, b in zip(before[:4], stream.state.tensors()[:4]))
        stream.read([2])
        stream.deliver([2])
        # count 6: level 2 is not due; count 4 ended a segment without learning
        assert stream.state.own == [[1], [0]]
        stream.read([2])
        stream.deliver([2])
        assert stream.state.own == [[1], [1]]
    stream.check()


def test_learning_may_resume_in_a_segment_that_owes_nothing_and_run_into_the_next():
    layer = make(12, chunks=(3, 6))
    stream = Stream(layer, 1, 6)
    with torch.no_grad():
        stream.read([1], learn=False)
        stream.read([5])
        stream.deliver([3])
    assert stream.state.own == [[1], [1]]
    stream.check()


def test_accumulate_and_commit_for_a_model_with_its_own_gradients():
    layer = make(24, chunks=(2, 4), optimizer="momentum", lr=(0.1, 0.0))
    state = layer.init_state(3)
    grads = [
        {n: torch.randn(3, *layer.levels[l][n].shape, dtype=torch.float64) for n in ("up", "down")}
        for l in range(2)
    ]
    grads[0]["up"][1] = math.nan
    rows = [True, False, True]
    new = layer.accumulate(layer.accumulate(state, grads, rows), [grads[0], None], [False, False, True])
    assert state.grads == [None, None] and new.grads[1] is None and not new.grads[0]["up"][1].any()
    state.assign(new)
    committed = layer.commit(state, rows, [2, 2, 3])
    assert state.own == [[0, 0, 0]] * 2 and committed.own == [[1, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(
        committed.weights[0]["up"][0], layer.levels[0]["up"].detach() - 0.1 * grads[0]["up"][0]
    )
    torch.testing.assert_close(committed.grads[0]["up"][2], 2 * grads[0]["up"][2])
    # a whole batch, in place: the first momentum must not be the accumulator that is zeroed beside it
    total = {n: g.clone() for n, g in state.grads[0].items()}
    state.assign(layer.commit(state, [True] * 3, [4, 4, 4]))
    for n, g in total.items():
        assert torch.equal(state.moments[0][n], g) and not state.grads[0][n].any()
    assert layer.commit(state, [False] * 3, [4, 4, 4]) is state


def test_accumulate_and_commit_under_other_rates():
    """Factors that wait are folded at the rate they were read with; gradients count at the layer's."""
    first, second = (make(25, chunks=(2,), lr=lr) for lr in (0.1, 0.3))
    first.pending = 2
    grads = [{n: torch.randn(1, *first.levels[0][n].shape, dtype=torch.float64) for n in ("up", "down")}]
    x, error = torch.randn(2, 1, 2, D, dtype=torch.float64)
    with torch.no_grad():
        state = first.refresh(first(x)[1], error)
    assert state.rank == [[2]]
    before = first.effective_levels(state)[0]
    found = second.commit(second.accumulate(state, grads, [True]), [True], [4])
    assert found.config == second.config and state.config == first.config and state.rank == [[2]]
    for n, g in grads[0].items():
        torch.testing.assert_close(found.weights[0][n], before[n].dense(1) - 0.3 * g)
    with pytest.raises(ValueError, match=r"precondition=1.0, expected None: gradients do not say"):
        make(25, chunks=(2,), precondition=1.0).accumulate(state, grads, [True])


@pytest.mark.parametrize("optimizer, rho", [("momentum", None), ("adam", None), ("momentum", 2.0)])
def test_select_reorder_save_load_mid_segment(optimizer, rho, tmp_path):
    layer = make(13, chunks=(2, 4, 8), optimizer=optimizer, variant="nested", precondition=rho)
    order = [2, 0, 1]
    straight, moved = Stream(layer, 3, 16, seed=1), Stream(layer, 3, 16, seed=1)

    def half(stream, perm):
        for n in ([2, 2, 1], [2, 1, 0]):
            stream.read([n[p] for p in perm])
            stream.deliver(stream.owed())
        stream.read([[1, 1, 1][p] for p in perm])
        stream.deliver([[1, 0, 1][p] for p in perm])

    with torch.no_grad():
        half(straight, [0, 1, 2])
        half(moved, [0, 1, 2])
        moved.state.select(order).save(tmp_path / "s.safetensors")
        moved.state = load_state(tmp_path / "s.safetensors")
        moved.x, moved.e = moved.x[order], moved.e[order]
        for _ in range(5):
            left = straight.owed()
            straight.deliver(left)
            moved.deliver([left[b] for b in order])
            n = [min(2 - p % 2, 16 - p) for p in straight.state.pos]
            straight.read(n)
            moved.read([n[b] for b in order])
    assert moved.state.pos == [straight.state.pos[b] for b in order]
    picked = straight.state.select(order)
    assert len(picked.tensors()) == len(moved.state.tensors()) > 10
    for a, b in zip(picked.tensors(), moved.state.tensors()):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_a_state_is_refused_by_other_weights(tmp_path):
    layer = make(14)
    layer.init_state(1).save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="weights"):
        make(15)(torch.randn(1, 1, D, dtype=torch.float64), load_state(tmp_path / "s.safetensors"))


def test_grad_mode_leaves_the_given_state_and_no_grad_advances_it():
    layer = make(16, chunks=(2,))
    x, error = torch.randn(
        2, 2, D, dtype=torch.float64, requires_grad=True
    ), torch.randn(2, 2, D, dtype=torch.float64)
    y, s1 = layer(x)
    s2 = layer.refresh(s1, error)
    assert s1.pos == s2.pos == [2, 2] and s1.seen == [2, 2] and s2.seen == [0, 0] and s1.weights == [None]
    kept = [t.clone() for t in s2.tensors()]
    y2, s3 = layer(x[:, :1], s2)
    with torch.no_grad():
        y4, s4 = layer(x[:, :1], s3)
        assert s4 is s3 and torch.equal(y2, layer(x[:, :1], s2.clone())[0])
        layer.refresh(s4, error)
    assert s2.pos == [2, 2] and all(torch.equal(a, b) for a, b in zip(kept, s2.tensors()))
    assert not any(t.requires_grad for t in s2.tensors() + s3.tensors())
    grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert all(g.isfinite().all() and g.any() for g in grads)


@pytest.mark.parametrize("optimizer, rho", [("momentum", None), ("adam", None), ("gd", 0.5)])
def test_a_state_moves_between_modes(optimizer, rho):
    layer = make(17, chunks=(2, 4), optimizer=optimizer, precondition=rho)
    modes = [
        torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.enable_grad,
        torch.no_grad
    ]
    stream = Stream(layer, 2, 8)
    for i in range(8):
        with modes[i % len(modes)]():
            stream.read([1, 1])
        stream.y = stream.y.detach().clone()
        with modes[(i + 1) % len(modes)]():
            stream.deliver([1, 1])
    stream.check()


def test_weights_learned_in_inference_mode_serve_autograd():
    layer = make(25, chunks=(2,))
    with torch.inference_mode():
        _, state = layer(torch.randn(2, 2, D, dtype=torch.float64))
        state = layer.refresh(state, torch.randn(2, 2, D, dtype=torch.float64))
    x = torch.randn(2, 1, D, dtype=torch.float64, requires_grad=True)
    chain.cms_forward(x, layer.effective_levels(state), layer.config).sum().backward()
    assert x.grad.any() and not layer.levels[0]["up"].grad


def test_padding_cannot_poison_outer_gradients():
    layer = make(18)
    x = torch.randn(2, 2, D, dtype=torch.float64)
    x[1, 1] = math.nan
    x.requires_grad_()
    y, _ = layer(x, lengths=torch.tensor([2, 1]))
    grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert all(g.isfinite().all() for g in grads) and not grads[0][1, 1].any()


def test_zero_length_rows_and_empty_calls():
    layer = make(19)
    stream = Stream(layer, 2, 4)
    with torch.no_grad():
        stream.read([1, 0], learn=False)
        assert stream.state.pos == [1, 0] and stream.state.tainted == [1, 0]
        y, state = layer(torch.zeros(2, 0, D, dtype=torch.float64), stream.state)
        assert y.shape == (2, 0, D) and layer.refresh(state, y) is state
        y, state = layer(torch.zeros(0, 3, D, dtype=torch.float64), learn=False)
        assert y.shape == (0, 3, D) and state.batch == 0


@pytest.mark.parametrize("optimizer, held_by_two_levels", [("momentum", 10), ("adam", 14)])
def test_bf16_and_fp32_masters(optimizer, held_by_two_levels):
    for dtype in (torch.bfloat16, torch.float32):
        layer = make(20, dtype=dtype, chunks=(2, 4), optimizer=optimizer, lr=1e-3)
        stream = Stream(layer, 2, 8)
        with torch.no_grad():
            stream.finish(lambda low, high: high)
        s = stream.state
        assert s.inputs.dtype == s.errors.dtype == dtype
        assert s.grads[0] is None  # a level that steps at every segment's end never has a gradient
        held = [
            t for part in (s.weights, s.grads, s.moments, s.squares) for level in part if level is not None
            for t in level.values()
        ]
        assert len(held) == held_by_two_levels and {t.dtype for t in held} == {torch.float32}
        for l in range(2):
            for name, w in s.weights[l].items():
                assert torch.equal(
                    s.copies[l][name], w.to(dtype)
                ) if dtype == torch.bfloat16 else s.copies[l] is None
        stream.check(tol=0.15 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("shape", [(1, 6, 4), (2, 4, 6), (3, 5, 5)])
def test_newton_schulz(shape):
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    ours = chunked.newton_schulz(g)
    for b in range(shape[0]):
        np.testing.assert_allclose(ours[b].numpy(), reference.newton_schulz(g[b].numpy()), rtol=1e-11, atol=1e-12)
    muon = pytest.importorskip("torch.optim._muon")
    assert (muon.DEFAULT_A, muon.DEFAULT_B, muon.DEFAULT_C, muon.DEFAULT_NS_STEPS, muon.EPS) == (
        *chunked.NS_COEFFICIENTS, chunked.NS_STEPS, chunked.NS_EPS)
    for b in range(shape[0]):  # theirs runs in bf16, and 5 steps of slope 3.4 amplify its rounding
        theirs = muon._zeropower_via_newtonschulz(
            g[b].clone(), chunked.NS_COEFFICIENTS, chunked.NS_STEPS, chunked.NS_EPS
        )
        assert (ours[b] - theirs.double()).norm() < 0.1 * ours[b].norm()
    assert not chunked.newton_schulz(torch.zeros(1, 3, 4)).any()


def test_refresh_equals_torch_optim():
    torch.manual_seed(1)
    w, left, right = (torch.randn(*s, dtype=torch.float64) for s in ((2, 4, 3), (3, 2, 5, 4), (3, 2, 5, 3)))
    for optimizer, build in (
        ("gd", lambda p: torch.optim.SGD([p], 0.1)), ("momentum", lambda p: torch.optim.SGD([p], 0.1, momentum=0.8))
    ):
        config = CMSConfig(D, (2,), lr=0.1, optimizer=optimizer, momentum=0.8)
        p = torch.nn.Parameter(w.clone())
        theirs, mine, moment = build(p), w, torch.zeros_like(w) if optimizer == "momentum" else None
        for l, r in zip(left, right):
            p.grad = torch.einsum("bcr,bcs->brs", l, r)
            theirs.step()
            mine, moment = cms_refresh(config, 0, mine, l, r, moment=moment)
        torch.testing.assert_close(mine, p.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunks", [(3,), (3, 6)])
def test_a_level_equals_torch_optim_adam(chunks):
    """The slowest level of a layer against torch.optim.Adam on the mean loss of its period, by autograd: for
    rows that learn at different times, one of which pauses."""
    layer = make(30, chunks=chunks, optimizer="adam", lr=(0.0,) * (len(chunks) - 1) + (0.01,), betas=(0.8, 0.95))
    last, period = len(chunks) - 1, chunks[-1]
    x, error = (torch.randn(2, 24, D, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        state = None
        for step in range(8):
            for lengths in ([3, 3 * (step % 4 < 2)], [0, 3 * (step % 4 >= 2)]):
                part = [torch.stack([t[b, p : p + 3] if n else t[b, :3] for b, (n, p) in enumerate(
                    zip(lengths, state.pos if state else [0, 0]))]) for t in (x, error)]
                _, state = layer(part[0], state, lengths=lengths)
                state = layer.refresh(state, part[1], lengths=lengths)
    for b in range(2):
        mine = [{n: p.detach().clone().requires_grad_(n in ("up", "down")) for n, p in layer.levels[l].items()}
                for l in range(len(chunks))]
        theirs = torch.optim.Adam([mine[last][n] for n in ("up", "down")], 0.01, betas=(0.8, 0.95))
        for start in range(0, 24, period):
            piece = slice(start, start + period)
            y = chain.cms_forward(x[b : b + 1, piece], mine, layer.config)
            theirs.zero_grad()
            (y * error[b, piece]).sum(-1).mean().backward()
            theirs.step()
        assert state.steps[last][b] == 24 // period
        for n in ("up", "down"):
            torch.testing.assert_close(state.weights[last][n][b], mine[last][n].detach(), rtol=1e-11, atol=1e-12)


def test_the_mean_is_over_the_tokens_that_contributed():
    """A segment read with learn=False leaves a level's sum for its next commit, which is then over fewer tokens
    than the time that has passed, or more than a period."""
    layer = make(31, chunks=(2, 4), optimizer="adam", lr=1e-3)
    stream = Stream(layer, 1, 12)
    with torch.no_grad():
        for learn, tokens in ((True, 2), (False, 2), (True, 4), (True, 0), (True, 2), (True, 0)):
            stream.read([2], learn)
            stream.deliver([0 if stream.state.tainted[0] else n for n in stream.owed()])
            assert stream.state.tokens[1] == [tokens]
    assert stream.state.steps == [[5], [2]]
    stream.check()


def test_initial_scale():
    torch.manual_seed(0)
    layer = ContinuumMemory(CMSConfig(64, (2, 4), variant="independent", mlp="swiglu", bias=True))
    for level in layer.levels:
        assert abs(level["up"].std().item() * 8 - 1) < 0.05 and abs(level["gate"].std().item() * 8 - 1) < 0.05
        assert abs(
            level["down"].std().item() * 16 - 1
        ) < 0.05 and (level["norm_gain"] == 1).all() and not level["up_bias"].any()
    assert layer.mix.shape == (2,) and not layer.mix.any()
    assert {"levels.0.up", "levels.1.down_bias", "mix"} <= set(layer.state_dict())


def z(*shape, dtype=torch.float64):
    return torch.zeros(*shape, dtype=dtype)


def errors():
    """name -> (call on (layer, state that has read 1 of 2 tokens in 2 rows), the words its message must hold)."""
    other = CMSConfig(D, (2, 8))
    return {
        "rank": (lambda c, s: c(z(2, D), s), r"argument x has shape \[2, 5\], expected \[B, T, 5\]"),
        "width": (lambda c, s: c(z(2, 1, 4), s), r"argument x has shape \[2, 1, 4\], expected \[B, T, 5\]"),
        "dtype": (lambda c, s: c(z(2, 1, D, dtype=torch.float32), s),
            "argument x has dtype torch.float32, expected torch.float64"),
        "batch": (lambda c, s: c(z(3, 1, D), s), "state has 2 rows, expected 3"),
        "config": (lambda c, s: c(z(2, 1, D), ContinuumMemory(other).init_state(2)), "state belongs to"),
        "state dtype": (lambda c, s: c(z(2, 1, D), s.to(dtype=torch.float32)),
            "state.inputs has dtype torch.float32"),
        "lengths count": (lambda c, s: c(z(2, 1, D), s, lengths=[1]), "lengths has 1 entries"),
        "lengths range": (lambda c, s: c(z(2, 1, D), s, lengths=[0, 2]),
            "lengths has 2 for row 1, expected 0 to 1"),
        "lengths float": (lambda c, s: c(z(2, 1, D), s, lengths=torch.ones(2)), "lengths has dtype"),
        "lengths type": (lambda c, s: c(z(2, 1, D), s, lengths=[0.5, 1]), "expected 2 integers"),
        "across": (lambda c, s: c(z(2, 2, D), s, lengths=[1, 2]),
            "x has 2 tokens for row 1 at token 1, expected at most 1"),
        "more errors": (lambda c, s: c.refresh(s, z(2, 2, D)), "error has 2 tokens for row 0, expected at most 1"),
        "error width": (lambda c, s: c.refresh(s, z(2, 2, 4)),
            r"ContinuumMemory.refresh: argument error has shape"),
        "error dtype": (lambda c, s: c.refresh(s, z(2, 1, D, dtype=torch.float32)), "argument error has dtype"),
        "refresh without state": (lambda c, s: c.refresh(None, z(2, 1, D)), "argument state is None"),
        "batch of a state": (lambda c, s: c.init_state(-1), "argument batch is -1"),
        "levels": (lambda c, s: chain.cms_forward(z(2, 1, D), [], c.config), "levels has 0 entries, expected 2"),
        "mix": (lambda c, s: chain.cms_forward(z(2, 1, D), [{}, {}], c.config.replace(variant="independent")),
            "mix is None"),
    }


@pytest.mark.parametrize("case", list(errors()))
@pytest.mark.parametrize("grad", [False, True])
def test_errors_say_what_is_wrong_and_change_nothing(case, grad):
    layer = make(21)
    with torch.no_grad():
        _, state = layer(torch.randn(2, 1, D, dtype=torch.float64))
    before = state.clone()
    call, words = errors()[case]
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=words):
        call(layer, state)
    assert all(getattr(before, n) == getattr(state, n) for n in ("pos", "seen", "delivered", "tainted", "own"))
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), state.tensors()))


@pytest.mark.parametrize("learn", [False, True])
def test_reading_past_outstanding_errors(learn):
    layer = make(22)
    x = torch.randn(1, 2, D, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer(x)
        state = layer.refresh(state, x[:, :1])
        with pytest.raises(ValueError, match="1 of its 2 errors are outstanding"):
            layer(x, state, learn=learn)
        layer(x, state, lengths=[0], learn=learn)
        assert state.pos == [2] and state.seen == [2] and state.delivered == [1]
        layer(x, layer.refresh(state, x[:, 1:]), learn=learn)
        assert state.pos == [4]


def test_wrong_types():
    layer = make(23)
    with pytest.raises(TypeError, match="argument x is a list"):
        layer([[0.0]])
    with pytest.raises(TypeError, match="expected a CMSState"):
        layer(z(1, 1, D), TitansConfig(D))
    assert isinstance(layer.init_state(2), CMSState)


def test_default_rates_are_relative_and_adams():
    config = CMSConfig(8, (16, 64, 256, 65536))
    assert config.optimizer == "adam" and config.relative
    np.testing.assert_allclose(config.learning_rates, (1.25e-4, 2.5e-4, 5e-4, 5e-4), rtol=1e-12)
    given = CMSConfig(8, (16,), lr=0.1)
    assert given.optimizer == "gd" and not given.relative
    assert CMSConfig(8, (16,), optimizer="muon").relative
    assert CMSConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="relative is False, expected True where lr is None"):
        CMSConfig(8, (16,), relative=False)


@pytest.mark.parametrize("optimizer", ["gd", "momentum", "muon", "adam"])
def test_relative_rates_do_not_depend_on_the_scale_of_weights_and_errors(optimizer):
    """A model whose matrices are twice as large, and whose loss is 1/4 of the other's, moves them by twice
    as much; the first step has the RMS that the rate says (Muon's singular values: about)."""
    for scale, loss in ((1.0, 1.0), (2.0, 0.25)):
        layer = make(31, chunks=(4,), optimizer=optimizer, relative=True, lr=1e-3)
        with torch.no_grad():
            for name in ("up", "down"):
                layer.levels[0][name].mul_(scale)
            before = {n: layer.levels[0][n].clone() for n in ("up", "down")}
            x = torch.randn(1, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            e = loss * torch.randn(1, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
            _, state = layer(x)
            state = layer.refresh(state, e)
        for n, w in before.items():
            move = state.weights[0][n][0] - w
            move = move[move != 0] if optimizer == "adam" else move  # a hidden unit that is off has no gradient
            step = move.square().mean().sqrt() / w.square().mean().sqrt()
            assert float(step) == pytest.approx(1e-3, rel=0.5 if optimizer == "muon" else 1e-5), n
