"""The refresh engine: what a draft leaves alone, pending factors, matrices by rows, schedules, detaching and
consolidating a level."""

import itertools
import math

import pytest
import torch
from cms_stream import D, Stream, make

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig, available_backends, load_state
from hope_kernels.ops import cms_refresh, cms_refresh_
from hope_kernels.ops.cms import chain, low_rank, schedule
from hope_kernels.ops.cms import level as chunked
from hope_kernels.ops.cms.matrix import Matrix, times, times_transposed

F64 = torch.float64


def matrix(batch: int, own: str, rank: int) -> Matrix:
    """own: "none", "all" or "some" of the rows have their own."""
    shared, mine = torch.randn(6, 4, dtype=F64), torch.randn(batch, 6, 4, dtype=F64)
    rows = tuple(own == "all" or b % 2 == 1 for b in range(batch))
    left, right = (torch.randn(batch, rank, n, dtype=F64) if rank else None for n in (6, 4))
    return Matrix(shared, None if own == "none" else mine, () if own == "none" else rows, left, right, -0.3)


@pytest.mark.parametrize("batch, own, rank", itertools.product((1, 4), ("none", "some", "all"), (0, 3)))
def test_products_with_a_matrix_by_rows(batch, own, rank):
    torch.manual_seed(0)
    W = matrix(batch, own, rank)
    x, e, bias = (torch.randn(*s, dtype=F64) for s in ((batch, 5, 4), (batch, 5, 6), (6,)))
    for b in range(batch):
        dense = W.own[b] if W.own is not None and W.rows[b] else W.shared
        if rank:
            dense = dense - 0.3 * W.left[b].T @ W.right[b]
        torch.testing.assert_close(W.dense(batch)[b], dense, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(times_transposed(x, W, bias)[b], x[b] @ dense.T + bias, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(times(e, W)[b], e[b] @ dense, rtol=1e-12, atol=1e-12)
    if batch > 1:
        torch.testing.assert_close(W.take([3, 1]).dense(2), W.dense(batch)[[3, 1]], rtol=1e-13, atol=1e-13)


def test_pending_rows_hold_factors_until_they_do_not_fit():
    layer = make(1, chunks=(2, 4), lr=0.1)
    layer.pending = 4
    stream = Stream(layer, 2, 8)
    with torch.no_grad():
        for step, (rank, own) in enumerate(
            [([2, 2], [0, 0]), ([4, 4], [0, 0]), ([2, 2], [1, 1]), ([4, 4], [1, 1])]
        ):
            stream.read([2, 2])
            stream.deliver([2, 2])
            assert (stream.state.rank[0], stream.state.own[0]) == (rank, own), step
            assert stream.state.rank[1] == [0, 0]  # a slower level waits in its accumulator
            left = stream.state.left[0]["up"]
            assert left[:, : rank[0]].any(-1).all() and not left[:, rank[0] :].any()
    stream.check()


def test_a_state_with_pending_factors_goes_on_under_another_limit(tmp_path):
    layer = make(2, chunks=(2,), lr=0.1)
    stream = Stream(layer, 2, 12)
    with torch.no_grad():
        for pending in (6, 6, 4, 0, 2, 6):
            layer.pending = pending
            stream.read([2, 2])
            stream.deliver([2, 1])
            stream.deliver([0, 1])
            stream.state.save(tmp_path / "s.safetensors")
            stream.state = load_state(tmp_path / "s.safetensors")
    stream.check()


def test_rows_with_pending_factors_are_constants_of_the_outer_graph():
    layer = make(3, chunks=(2,), lr=0.1)
    layer.pending = 4
    x = torch.randn(2, 2, D, dtype=F64)
    with torch.no_grad():
        _, state = layer(x, lengths=[2, 1])
        state = layer.refresh(state, torch.randn_like(x), lengths=[2, 0])
        want, _ = layer(x[:, :1], state.clone())
    y, _ = layer(x[:, :1], state)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-13)
    up = layer.levels[0]["up"]
    (learned,) = torch.autograd.grad(y[0].sum(), up, retain_graph=True)
    (shared,) = torch.autograd.grad(y[1].sum(), up)
    assert not learned.any() and shared.any()


@pytest.mark.parametrize("optimizer, pending, rho", [
    ("gd", 0, None), ("gd", 8, None), ("momentum", 0, None), ("muon", 0, None), ("adam", 0, None),
    ("gd", 0, 0.5), ("gd", 8, 0.5),
])
def test_a_call_that_fails_has_learned_nothing(optimizer, pending, rho):
    """The last segment's logits are not finite, after two refreshes of the same call."""
    torch.manual_seed(0)
    cms = CMSConfig(8, (4, 8), lr=0.05, optimizer=optimizer, precondition=rho)
    model = HopeForCausalLM(HopeConfig(16, 8, 1, titans=TitansConfig(8), cms=cms, tie_embeddings=False), dtype=F64)
    model.blocks[0].cms.pending = pending
    with torch.no_grad():
        model.embed.weight[15] = torch.nan
    ids = torch.randint(0, 15, (2, 30))
    with torch.no_grad():
        _, state = model(ids[:, :17], learn="next_token")
        before, counters = [t.clone() for t in state.tensors()], [list(c) for c in state._counters()]
        bad = torch.cat([ids[:, 17:], torch.full((2, 1), 15)], 1)
        with pytest.raises(ValueError, match="logits"):
            model(bad, state, learn="next_token", check_finite=True)
        assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))
        assert counters == [list(c) for c in state._counters()]
        a, _ = model(ids[:, 17:], state, learn="next_token")
        b, _ = model(ids, learn="next_token")
    torch.testing.assert_close(a, b[:, 17:], rtol=1e-10, atol=1e-10)


def test_who_steps_when():
    """Levels with periods 16, 64 and 65536, and nested resets, over every boundary of 2 * 65536 tokens."""
    for variant in ("sequential", "nested"):
        config = CMSConfig(4, (16, 64, 65536), variant=variant)
        steps, resets = [0, 0, 0], [0, 0, 0]
        for count in range(16, 2 * 65536 + 1, 16):
            for l in range(3):
                step, reset, wait = schedule.due(config, l, [0, 2], [count, 5, count + 3])
                assert 2 in wait and sorted(step + reset + wait) == [0, 2]
                steps[l] += 0 in step
                resets[l] += 0 in reset
        nested = variant == "nested"
        assert steps == [8192 - nested * 2048, 2048 - nested * 2, 2] and resets == [nested * 2048, nested * 2, 0]
    assert schedule.due(config, 0, [1], None) == ([], [], [1])


@pytest.mark.slow
def test_long_periods_equal_the_token_loop():
    layer = make(4, chunks=(16, 1024, 65536), lr=(1e-3, 1e-4, 1e-6))
    stream = Stream(layer, 1, 65536 + 16)
    with torch.no_grad():
        for _ in range(65536 // 16 + 1):
            stream.read([16])
            stream.deliver([16])
    assert stream.state.own == [[1], [1], [1]]
    stream.check()


@pytest.mark.parametrize("optimizer, pending, rho", [
    ("gd", 0, None), ("gd", 6, None), ("momentum", 0, None), ("momentum", 6, None), ("adam", 0, None),
    ("gd", 0, 0.5), ("gd", 6, 0.5),
])
def test_consolidation_leaves_every_output_as_it_was(optimizer, pending, rho):
    layer = make(5, chunks=(2, 4), lr=0.1, optimizer=optimizer, precondition=rho)
    layer.pending = pending
    streams = [Stream(layer, 3, 12, seed=3) for _ in range(2)]
    with torch.no_grad():
        for s in streams:  # row 0 has learned in both levels, row 1 in one, row 2 in none
            s.read([2, 2, 1])
            s.deliver([2, 2, 1])
            s.read([2, 0, 0])
            s.deliver([2, 0, 0])
        parameters = {n: p.clone() for n, p in layer.named_parameters()}
        want = Stream(layer, 3, 12, seed=3)
        want.state = streams[0].state.clone()
        finish(want)
        probe = torch.randn(1, 2, D, dtype=F64)
        row0 = layer(probe, streams[1].state.select([0]), learn=False)[0]
        layer.consolidate(streams[1].state)
        assert streams[1].state.own[0][0] == 0 and not torch.equal(layer.levels[0]["up"], parameters["levels.0.up"])
        torch.testing.assert_close(layer(probe, learn=False)[0], row0, rtol=1e-12, atol=1e-13)
        finish(streams[1])
    torch.testing.assert_close(streams[1].y[:, 4:], want.y[:, 4:], rtol=1e-11, atol=1e-12)


def finish(stream) -> None:
    while min(stream.state.pos) < stream.tokens:
        n = [min(2 - p % 2, stream.tokens - p) for p in stream.state.pos]
        stream.read(n)
        stream.deliver(stream.owed())


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_detached_level_is_what_was_learned(optimizer):
    layer = make(6, chunks=(2, 4), lr=0.1, optimizer=optimizer)
    stream = Stream(layer, 2, 8)
    with torch.no_grad():
        for _ in range(2):
            stream.read([2, 2])
            stream.deliver([2, 2])
        other = stream.state.select([1])
        learned = stream.state.weights[0]["up"][0].clone()
        taken = stream.state.detach_level(0)
        assert torch.equal(taken["up"], learned) and taken["down"].shape == layer.levels[0]["down"].shape
        assert stream.state.own == [[0, 1], [1, 1]] and not stream.state.moments[0]["up"][0].any()
        assert all(torch.equal(a, b) for a, b in zip(stream.state.select([1]).tensors(), other.tensors()))
        for call, wrong in ((layer.detach_level, (2,)), (layer.detach_level, (0, -1)), (layer.consolidate, (2,)),
                            (layer.consolidate, (0, [2]))):
            with pytest.raises(ValueError, match="expected 0 to 1"):
                call(stream.state, *wrong)


def test_a_model_consolidated_goes_on_alike_and_others_start_from_it(tmp_path):
    torch.manual_seed(0)
    cms = CMSConfig(8, (4, 8), lr=0.05)
    model = HopeForCausalLM(HopeConfig(16, 8, 2, titans=TitansConfig(8, num_heads=2), cms=cms), dtype=F64)
    ids = torch.randint(0, 16, (1, 40))
    with torch.no_grad():
        _, state = model(ids[:, :22], learn="next_token")
        state.save(tmp_path / "before.safetensors")
        want, _ = model(ids[:, 22:], state.clone(), learn="next_token")
        fresh, _ = model(ids[:, :4])
        model.consolidate(state)
        got, _ = model(ids[:, 22:], state, learn="next_token")
        assert not torch.allclose(model(ids[:, :4])[0], fresh)
        with pytest.raises(ValueError, match="weights"):
            model(ids[:, :1], load_state(tmp_path / "before.safetensors"))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_what_is_detached_has_the_masters_precision():
    layer = make(8, dtype=torch.bfloat16, chunks=(2,), lr=0.1)
    stream = Stream(layer, 1, 4)
    with torch.no_grad():
        stream.read([2])
        stream.deliver([2])
        master = stream.state.weights[0]["up"][0].clone()
        assert not torch.equal(master, master.bfloat16().float())
        assert torch.equal(layer.effective_levels(stream.state)[0]["up"].own[0], master.bfloat16())
        assert torch.equal(stream.state.detach_level(0)["up"], master)


def test_bytes_of_a_state_by_formula():
    for optimizer, pending, dtype, rho, *relative in (
        ("gd", None, torch.float32, None, True), ("gd", 16, torch.float32, None, True),
        ("gd", None, torch.float32, 1.0),
        ("momentum", None, torch.bfloat16, None), ("gd", 16, torch.bfloat16, None),
        ("adam", None, torch.bfloat16, None), ("muon", None, torch.float32, 1.0),
    ):
        layer = make(
            7, dtype=dtype, chunks=(8, 16, 32), lr=(0.1, 0.1, 0.0), optimizer=optimizer, precondition=rho,
            relative=bool(relative))
        layer.pending = pending
        stream = Stream(layer, 3, 64)
        with torch.no_grad():
            finish(stream)
        found = [stream.state.level_bytes(l) for l in range(3)]
        assert found == [sum(parts.values()) for parts in layer.state_bytes(3)] and found[2] == 0
        kept = sum(t.numel() * t.element_size() for t in (stream.state.inputs, stream.state.errors))
        assert stream.state.nbytes() == sum(found) + kept


def test_the_refresh_operator():
    torch.manual_seed(0)
    w, left, right = torch.randn(3, 6, 4), torch.randn(3, 5, 6), torch.randn(3, 5, 4)
    total, moment, g = torch.randn(3, 6, 4), torch.randn(3, 6, 4), torch.einsum("bcr,bcs->brs", left, right)
    gd, momentum, muon, adam = (
        CMSConfig(4, (2,), lr=0.1, optimizer=o, momentum=0.8) for o in ("gd", "momentum", "muon", "adam")
    )
    torch.testing.assert_close(cms_refresh(gd, 0, w, left, right)[0], w - 0.1 * g)
    new, m = cms_refresh(momentum, 0, w, left, right, moment=moment, total=total)
    torch.testing.assert_close(m, 0.8 * moment + g + total)
    torch.testing.assert_close(new, w - 0.1 * m)
    square, mean = torch.rand(3, 6, 4), (g + total) / 12
    new, m, v = cms_refresh(adam, 0, w, left, right, moment=moment, square=square, total=total, step=3, tokens=12)
    torch.testing.assert_close(m, 0.9 * moment + 0.1 * mean)
    torch.testing.assert_close(v, 0.999 * square + 0.001 * mean**2)
    torch.testing.assert_close(new, w - 0.1 * m / (1 - 0.9**3) / ((v / (1 - 0.999**3)).sqrt() + 1e-8))
    step = 0.1 * 0.2 * 6**0.5 * torch.stack([chunked.newton_schulz(t) for t in g])
    torch.testing.assert_close(cms_refresh(muon, 0, w, left, right)[0], w - step)
    before, kept, copy = w.clone(), total.clone(), w.half()
    cms_refresh_(gd, 0, w, left, right, total=total, rows=[2, 0])
    torch.testing.assert_close(w[::2], (before - 0.1 * (g + kept))[::2])
    assert torch.equal(w[1], before[1]) and torch.equal(total[1], kept[1]) and not total[::2].any()
    cms_refresh_(gd, 0, w, left.half(), right.half(), copy=copy)
    assert torch.equal(copy, w.half())
    for words, call in {
        r"left has shape \[3, 5, 6\], expected \[3, C, 4\]": lambda: cms_refresh(gd, 0, w.mT, left, right),
        "weight has dtype": lambda: cms_refresh(gd, 0, w.half(), left, right),
        "moment is None": lambda: cms_refresh(momentum, 0, w, left, right),
        "square is None": lambda: cms_refresh(adam, 0, w, left, right, moment=moment),
        "square is a tensor": lambda: cms_refresh(momentum, 0, w, left, right, moment=moment, square=square),
        "step is 0, expected a positive": lambda: cms_refresh(
            adam, 0, w, left, right, moment=moment, square=square, step=0),
        "tokens is 0": lambda: cms_refresh(adam, 0, w, left, right, moment=moment, square=square, tokens=0),
        "level is 1, expected 0 to 0": lambda: cms_refresh(gd, 1, w, left, right),
        "level is '0', expected": lambda: cms_refresh(gd, "0", w, left, right),
        "row 3 does not exist in a batch of 3": lambda: cms_refresh(gd, 0, w, left, right, rows=[3]),
        "one boolean for each of 3 rows": lambda: cms_refresh(gd, 0, w, left, right, rows=[True, False]),
        "argument level is True": lambda: cms_refresh(gd, True, w, left, right),
        "unknown backend": lambda: cms_refresh(gd, 0, w, left, right, backend="cpu"),
        "size is 1.0, expected None": lambda: cms_refresh(gd, 0, w, left, right, size=1.0),
        "size is None, expected the RMS": lambda: cms_refresh(gd.replace(relative=True), 0, w, left, right),
        "size is nan, expected a finite": lambda: cms_refresh(
            gd.replace(relative=True), 0, w, left, right, size=math.nan),
        "precondition=2.0, expected None": lambda: cms_refresh(gd.replace(precondition=2.0), 0, w, left, right),
        r"shape \[3, 6, 4\], expected L, \[B, r, 2\]": lambda: cms_refresh(gd.replace(rank=2), 0, w, left, right),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="argument left is a NoneType"):
        cms_refresh_(gd, 0, w, None, right)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("optimizer", ["gd", "momentum", "muon", "adam"])
def test_the_refresh_operator_takes_the_steps_of_a_layer(optimizer, rank):
    """Relative rates, and L in a matrix's place: two steps from the factors that a layer's pass gives."""
    layer = make(3, chunks=(4,), optimizer=optimizer, lr=0.02, relative=True, rank=rank, mlp="swiglu")
    config, state, given = layer.config, layer.init_state(2), {}

    def sink(l, factors):
        given.update(factors if rank is None else low_rank.projected(config, l, factors))

    sizes = {n: float(layer.levels[0][n].detach().square().mean().sqrt()) for n in ("up", "gate", "down")}
    zeros = {n: torch.zeros(2, *t.shape, dtype=t.dtype) for n, t in layer.start(0).items()}
    weights = {n: z + layer.start(0)[n] for n, z in zeros.items()}
    kept = {n: {"momentum": {"moment": z}, "adam": {"moment": z, "square": z}}.get(optimizer, {})
            for n, z in zeros.items()}
    for step in (1, 2):
        x, error = torch.randn(2, 2, 4, D, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        chain.pass_back(x, error, layer.effective_levels(state), config, sink)
        with torch.no_grad():
            _, state = layer(x, state)
            layer.refresh(state, error)
        for n, factors in given.items():
            count = {"step": step} if optimizer == "adam" else {}
            weights[n], *new = cms_refresh(config, 0, weights[n], *factors, size=sizes[n], **kept[n], **count)
            kept[n] = dict(zip(kept[n], new))
            torch.testing.assert_close(weights[n], state.weights[0][n], rtol=1e-10, atol=1e-14)


def _backends():
    yield pytest.param(chunked, torch.float64, id="chunked-fp64")
    yield pytest.param(chunked, torch.float32, id="chunked-fp32")
    reason = available_backends()["triton"]
    skip = pytest.mark.skipif(reason is not None, reason=f"triton: {reason}")
    yield pytest.param("triton", torch.float32, id="triton", marks=skip)


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("ops, dtype", _backends())
def test_numbers_of_adams_step_from_the_device_make_the_same_bits(ops, dtype, total):
    """Of a step that is recorded to be taken again."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if ops == "triton":
        from hope_kernels.ops.cms.triton import operator as ops
    g = torch.Generator().manual_seed(0)
    weight, moment, sums, left, right = (
        torch.randn(s, generator=g).to(device, dtype)
        for s in ((2, 24, 40), (2, 24, 40), (2, 24, 40), (2, 16, 24), (2, 16, 40))
    )
    for step, lr in ((1, 0.3), (3, 1e-3), (400, 1e-5), (7, 1e-30), (7, 1e-44)):
        adam = chunked.Adam(moment.square(), (0.9, 0.999), step, 50)
        found = []
        for late in (None, torch.tensor(adam.numbers(lr), dtype=dtype, device=device)):
            of = adam._replace(square=adam.square.clone(), late=late, step=step if late is None else 99)
            w, m, t = weight.clone(), moment.clone(), sums.clone() if total else None
            ops.refresh_(w, None, left, right, [0, 1], lr, moment=m, total=t, adam=of)
            found.append((w, m, of.square))
        assert all(torch.equal(a, b) for a, b in zip(*found)), (step, lr)
        assert torch.isfinite(found[0][0]).all() and (lr < 1e-20) == torch.equal(found[0][0], weight)
