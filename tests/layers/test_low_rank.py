"""Levels whose sequences learn W + L S: against dense NumPy in fp64, autograd, and the same contract as any other."""

import itertools

import numpy as np
import pytest
import torch
from cms_stream import D, Stream, make
from small_model import ids, tiny

from hope_kernels import CMSConfig, ContinuumMemory, available_backends, load_state
from hope_kernels.engine import guard
from hope_kernels.engine.decoder import Decoder
from hope_kernels.ops.cms import low_rank, reference
from hope_kernels.ops.cms.matrix import Matrix

VARIANTS = ("sequential", "independent", "nested")
OPTIMIZERS = ("gd", "momentum", "muon", "adam")
GRID = list(itertools.product(VARIANTS, ("gelu", "swiglu", "geglu"), OPTIMIZERS))
CMS = CMSConfig(8, (4, 8), expansion=2.0, lr=(0.05, 0.02), rank=3)
EXACT = dict(rtol=0, atol=1e-12)
CLOSE = dict(rtol=0, atol=1e-10)  # of a whole model's logits


@pytest.mark.parametrize("case", range(len(GRID)))
def test_layer_equals_the_dense_token_loop_over_random_splits(case):
    """y, L, accumulators and averages of ragged rows, some of whose tokens are read with learn=False."""
    variant, mlp, optimizer = GRID[case]
    layer = make(case, variant=variant, mlp=mlp, optimizer=optimizer, chunks=[(2,), (2, 4, 8), (3, 6)][case % 3],
                 rank=1 + case % D, lr=0.03, bias=case % 2 == 1, relative=case % 3 == 1,
                 precondition=2.0 if case % 4 > 1 else None)
    stream, rng = Stream(layer, 3, 19, seed=case), np.random.default_rng(case)
    with torch.no_grad():
        stream.finish(lambda low, high: int(rng.integers(low, high + 1)))
    stream.check()


def test_a_step_is_the_gradient_of_L():
    """Two steps of gradient descent on L by autograd, through matrices written out as W + L S."""
    layer = make(1, chunks=(4,), lr=0.1, rank=2, mlp="swiglu")
    names = ("up", "gate", "down")
    S = {n: low_rank.signs(layer.config, 0, n, layer.levels[0][n]) for n in names}
    L = {n: torch.zeros(len(layer.levels[0][n]), 2, dtype=torch.float64) for n in names}
    dense = ContinuumMemory(layer.config.replace(rank=None, lr=0.0), dtype=torch.float64)
    dense.load_state_dict(layer.state_dict())
    state = layer.init_state(1)
    for seed in range(2):
        x, error = torch.randn(2, 1, 4, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        held = {n: t.requires_grad_() for n, t in L.items()}
        now = {f"levels.0.{n}": layer.levels[0][n].detach() + held[n] @ S[n] for n in names}
        want, _ = torch.func.functional_call(dense, now, (x,))
        found = torch.autograd.grad((want * error).sum(), list(held.values()))
        L = {n: (t - 0.1 * g).detach() for (n, t), g in zip(held.items(), found)}
        with torch.no_grad():
            y, state = layer(x, state)
            state = layer.refresh(state, error)
        torch.testing.assert_close(y, want.detach(), **EXACT)
        for n in names:
            torch.testing.assert_close(state.weights[0][n][0], L[n], **EXACT)


def test_signs_are_a_hash_of_their_place():
    """The same as in NumPy's 32-bit integers; balanced, uncorrelated, other ones for every level and input."""
    config = CMSConfig(96, (4, 8), rank=64, intermediate_size=200)
    like, found = torch.zeros(0, dtype=torch.float64), []
    for l, name in itertools.product(range(2), ("up", "down")):
        S = low_rank.signs(config, l, name, like)
        np.testing.assert_array_equal(S.numpy(), reference.signs(64, S.shape[1], 2 * l + (name == "down")))
        assert (S.abs() == 1 / 8).all() and abs(float(S.sum())) < 4 * 64**-0.5 * S.numel() ** 0.5
        rows = S @ S.T * 64 / S.shape[1] - torch.eye(64)
        assert rows.abs().max() < 5 / S.shape[1] ** 0.5
        found.append(S[:, :96])
    assert low_rank.signs(config, 0, "gate", like) is low_rank.signs(config, 0, "up", like)
    for a, b in itertools.combinations(found, 2):
        assert abs(float((a * b).mean())) * 64 < 5 / a.numel() ** 0.5
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        other = low_rank.signs(config, 0, "up", like.to(dtype))
        assert other.dtype == dtype and torch.equal(other, found[0].to(dtype))
    fewer = low_rank.signs(config.replace(rank=16), 0, "up", like)
    assert torch.equal(fewer, found[0][:16] * 2)


def test_signs_keep_lengths_and_angles_on_average():
    """x^T S^T S y = <x, y> in the mean, with an error of about |x||y| / sqrt(rank)."""
    config = CMSConfig(1024, (4,), rank=256)
    S = low_rank.signs(config, 0, "up", torch.zeros(0, dtype=torch.float64))
    x, y = torch.randn(2, 200, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
    errors = ((x @ S.T) * (y @ S.T)).sum(1) - (x * y).sum(1)
    assert errors.abs().max() < 5 / 256**0.5 and abs(float(errors.mean())) < 5 / (256 * 200) ** 0.5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_changes_a_matrix_as_much_at_every_rank(optimizer):
    """Of the first one, at a relative rate: the RMS of the change of W = W_0 + L S, by that of the whole matrix."""
    changes = []
    for rank in (None, 1, 4, 16):
        torch.manual_seed(0)
        config = CMSConfig(256, (512,), intermediate_size=320, optimizer=optimizer, lr=1e-3, relative=True, rank=rank,
                           mlp="swiglu")
        layer = ContinuumMemory(config, dtype=torch.float64)
        x, error = torch.randn(2, 1, 512, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            _, state = layer(x)
            after = layer.detach_level(layer.refresh(state, error), 0)
        changes.append({n: float((t - layer.levels[0][n].detach()).square().mean().sqrt()) for n, t in after.items()})
    for found in changes[1:]:
        # Newton-Schulz leaves singular values between 0.7 and 1.2, and with rank 1 there is one
        assert found == pytest.approx(changes[0], rel=0.25 if optimizer == "muon" else 0.05), changes


def read(model, tokens, state, cuts=(), lengths=None):
    logits, at = [], 0
    with torch.no_grad():
        for to in (*cuts, tokens.shape[1]):
            rows = None if lengths is None else [min(max(n - at, 0), to - at) for n in lengths]
            y, state = model(tokens[:, at:to], state, rows, learn="next_token")
            logits, at = [*logits, y], to
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_model_keeps_the_contract(mixer, optimizer, tmp_path):
    model, tokens = tiny(mixer, cms=CMS.replace(optimizer=optimizer)), ids(2, 37)
    whole, end = read(model, tokens, model.init_state(2))
    assert not torch.equal(whole, read(tiny(mixer, cms=CMS.replace(lr=0.0)), tokens, None)[0])
    split, _ = read(model, tokens, model.init_state(2), (3, 8, 9, 30))
    torch.testing.assert_close(split, whole, **CLOSE)
    ragged, _ = read(model, tokens, model.init_state(2), (11, 20), [37, 18])
    torch.testing.assert_close(ragged[0], whole[0], **CLOSE)
    torch.testing.assert_close(ragged[1, :18], whole[1, :18], **CLOSE)
    _, state = read(model, tokens[:, :21], model.init_state(2))
    state.save(tmp_path / "s")
    rest, state = read(model, tokens[:, 21:], load_state(tmp_path / "s"))
    torch.testing.assert_close(rest, whole[:, 21:], **CLOSE)
    alone, _ = read(model, tokens[1:], model.init_state(1))
    torch.testing.assert_close(alone[0], whole[1], **CLOSE)
    end.validate("after", values=True)


@pytest.mark.parametrize("margin", [guard.MARGIN, -10.0])
def test_under_a_guard_and_asleep(margin, tmp_path, monkeypatch):
    """Kept weights and replays of thin matrices; and with a guard that is never content, rollbacks."""
    monkeypatch.setattr(guard, "MARGIN", margin)
    monkeypatch.setattr(guard, "ERRORS", margin)  # the larger of the two decides
    model, tokens = tiny("attention", cms=CMS.replace(optimizer="gd")), ids(2, 61)
    ends = []
    for cuts in ((61,), (3, 24, 40, 61)):
        state, at = model.init_state(2), 0
        with torch.no_grad():
            for to in cuts:
                model(tokens[:, at:to], state, learn="next_token", guard=True)
                state.save(tmp_path / "s")
                state, at = load_state(tmp_path / "s"), to
            state = model.read(tokens, state, replay=4, passes=2, seed=1).state
            ends.append(model(tokens[:, :9], state)[0])
    torch.testing.assert_close(*ends, **CLOSE)
    assert any(state.rollbacks) == (margin < 0) and torch.isfinite(ends[0]).all()


def test_tokens_decoded_one_by_one():
    model, tokens = tiny(cms=CMS), ids(2, 30)
    whole, _ = read(model, tokens, model.init_state(2))
    _, state = read(model, tokens[:, :13], model.init_state(2))
    decoder = Decoder(model, state, learn="next_token")
    steps = [decoder.step(tokens[:, t : t + 1]) for t in range(13, 30)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 13:], **CLOSE)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_backends_agree(backend, optimizer):
    if backend not in available_backends():
        pytest.skip(f"{backend} is not available")
    device = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    torch.manual_seed(0)
    layer = ContinuumMemory(CMSConfig(16, (8, 16), rank=4, lr=0.05, optimizer=optimizer), device=device)
    x, e = torch.randn(2, 3, 24, 16, device=device)
    ends = []
    for name in ("chunked", backend):
        state, out = layer.init_state(3), []
        with torch.no_grad():
            for t in range(0, 24, 8):
                lengths = [8, 8, 8 if t == 16 else 0]  # the last row shares what the others have learned on top of
                y, state = layer(x[:, t : t + 8], state, lengths, backend=name)
                layer.refresh(state, e[:, t : t + 8], lengths, backend=name)
                out.append(y)
        ends.append((torch.cat(out, 1), [w["up"] for w in state.weights]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_bfloat16_learns_what_float32_does(optimizer, rank):
    """Masters in fp32 from factors in bf16, at ranks that fill no vector; a step's rounding is that of the factors."""
    torch.manual_seed(0)
    config = CMSConfig(32, (8,), rank=rank, lr=0.02, optimizer=optimizer, mlp="swiglu")
    wide = ContinuumMemory(config)
    layers = [wide, ContinuumMemory(config, dtype=torch.bfloat16)]
    with torch.no_grad():
        for p in wide.parameters():
            p.copy_(p.bfloat16())
        layers[1].load_state_dict(wide.state_dict())
        x, e = torch.randn(2, 2, 8, 32).bfloat16()
        learned = []
        for layer in layers:
            dtype = layer.levels[0]["up"].dtype
            _, state = layer(x.to(dtype))
            learned.append(layer.refresh(state, e.to(dtype)).weights[0])
    for name, L in learned[0].items():
        off = (learned[1][name] - L).norm() / L.norm()
        assert off < (0.02 if optimizer == "gd" else 0.2), name  # Adam's first step keeps the signs alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer, tensors", [("gd", 1), ("momentum", 2), ("adam", 3)])
def test_a_session_costs_rank_numbers_an_output(dtype, optimizer, tensors):
    torch.manual_seed(0)
    layer = ContinuumMemory(CMSConfig(64, (4,), rank=2, optimizer=optimizer, lr=0.01, mlp="swiglu"), dtype=dtype)
    with torch.no_grad():
        y, state = layer(torch.randn(3, 4, 64, dtype=dtype))
        layer.refresh(state, y)
    numbers = 3 * 2 * (256 + 256 + 64)
    copies = 0 if dtype == torch.float32 else 2 * numbers
    assert state.level_bytes(0) == 4 * tensors * numbers + copies == sum(layer.state_bytes(3)[0].values())


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_consolidation_writes_the_dense_weights_and_leaves_every_row_as_it_reads(optimizer, dtype, close):
    torch.manual_seed(0)
    model = tiny("attention", cms=CMS.replace(optimizer=optimizer)).to(dtype)
    _, state = read(model, ids(3, 19), model.init_state(3), (), [19, 13, 3])  # the last row has not learned
    tokens = ids(3, 25, 5)
    want, _ = read(model, tokens, state.clone())
    levels = [[Matrix.of(level["up"]).dense(3)[0] for level in block] for block in model.levels(state)]
    with torch.no_grad():
        model.consolidate(state, row=0)
    assert [c.own[0] for c in state.cms] == [[0, 1, 1]] * 2
    for block, dense in zip(model.blocks, levels):
        for level, w in zip(block.cms.levels, dense):
            torch.testing.assert_close(level["up"], w, rtol=0, atol=close)
    got, _ = read(model, tokens, state)
    torch.testing.assert_close(got, want, rtol=0, atol=100 * close)


def test_detached_levels_are_whole_matrices():
    layer = make(2, chunks=(2,), rank=2, lr=0.1)
    stream = Stream(layer, 2, 4)
    with torch.no_grad():
        stream.finish(lambda low, high: high)
        L = stream.state.weights[0]["down"][1].clone()
        found = layer.detach_level(stream.state, 0, 1)
    S = low_rank.signs(layer.config, 0, "down", L)
    torch.testing.assert_close(found["down"], layer.levels[0]["down"].detach() + L @ S, **EXACT)
    assert stream.state.own == [[1, 0]]


def test_parameters_get_gradients_beneath_what_was_learned():
    """The row's own part is a constant; the matrix beneath it is the parameter still."""
    layer = make(3, chunks=(2,), rank=2, lr=0.1)
    stream = Stream(layer, 1, 2)
    with torch.no_grad():
        stream.read([2])
        stream.deliver([2])
    x = torch.randn(1, 1, D, dtype=torch.float64)
    y, _ = layer(x, stream.state, learn=False)
    (got,) = torch.autograd.grad(y.sum(), layer.levels[0]["up"])
    dense = make(3, chunks=(2,), lr=0.0)
    with torch.no_grad():
        for name in ("up", "down"):
            dense.levels[0][name].copy_(Matrix.of(layer.effective_levels(stream.state)[0][name]).dense(1)[0])
    (want,) = torch.autograd.grad(dense(x)[0].sum(), dense.levels[0]["up"])
    torch.testing.assert_close(got, want, **EXACT)


def test_gradients_may_be_delivered_whole():
    layer = make(4, chunks=(2,), rank=2, lr=0.1)
    g = {n: torch.randn(1, *layer.levels[0][n].shape, dtype=torch.float64) for n in ("up", "down")}
    state = layer.commit(layer.accumulate(layer.init_state(1).replace(pos=type(layer.init_state(1).pos)([2])),
                                          [g], [True]), [True])
    for n, t in g.items():
        S = low_rank.signs(layer.config, 0, n, t)
        torch.testing.assert_close(state.weights[0][n], -0.1 * t @ S.T, **EXACT)


@pytest.mark.parametrize("rank", [0, -1, 9, True, 2.0])
def test_ranks_that_do_not_fit_are_refused(rank):
    with pytest.raises(ValueError, match="CMSConfig: rank is"):
        CMS.replace(rank=rank)


def test_a_state_of_another_rank_is_refused_by_name():
    with pytest.raises(ValueError, match=r"belongs to HopeConfig\(cms.rank=3, ...\) and not to .*cms.rank=2"):
        tiny(cms=CMS.replace(rank=2))(ids(1, 2), tiny(cms=CMS).init_state(1))
    state = read(tiny(cms=CMS), ids(1, 9), None)[1]
    state.cms[0].weights[0]["up"] = state.cms[0].weights[0]["up"][..., :2].clone()
    with pytest.raises(ValueError, match=r"weights\[0\].up has shape"):
        state.validate("x")
