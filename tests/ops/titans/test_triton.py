"""The memory's Triton kernels, interpreted: against the fp64 closed form by the yardstick, and bit for bit
against themselves."""

from itertools import product

import pytest
import torch
from problems import DEVICE, cast, meets_yardstick, part, problem, rows_of, run, same

from hope_kernels import (
    CMSConfig,
    HopeConfig,
    HopeForCausalLM,
    SelfModifyingTitans,
    TitansConfig,
    available_backends,
    load_state,
)
from hope_kernels.ops import TokenInputs, init_titans_state, titans_advance_

pytest.importorskip("triton")
from hope_kernels.ops.titans.triton.operator import arguments  # noqa: E402
from hope_kernels.ops.titans.triton.tiles import CHUNKS, MULTIPLES, WIDTHS  # noqa: E402

pytestmark = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"triton: {available_backends()['triton']}"
)

NARROW = [
    TitansConfig(32, 1), TitansConfig(64, 2, hidden_mult=2, chunk_memory=32, chunk_other=16, activation="silu"),
    TitansConfig.preset("nested_learning", d_model=32, chunk_memory=16, chunk_other=16),
    TitansConfig(32, 1, chunk_memory=16, chunk_other=32, target_norm=False, own_values=False, retention=False),
    TitansConfig(32, 1, objective="dot", step_clip=False, qk_l2norm=False, scalar_skip=True, eta_scale=0.1),
    TitansConfig.preset("titans", d_model=64, num_heads=2, momentum=None, dgd=True, chunk_memory=32),
]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Scratch starts as NaN: bytes of ones are one in every floating type."""
    fresh = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: t.fill_(255) if (t := fresh(*a, **k)).dtype == torch.uint8 else t
    )


@pytest.mark.parametrize("dtype, config", [
    pytest.param(dtype, c, id=f"{str(dtype)[6:]}-{i}",
        marks=pytest.mark.slow if dtype == torch.float16 and i not in (1, 5) else ())
    for dtype in (torch.float32, torch.float16) for i, c in enumerate(NARROW)
])
def test_meets_the_yardstick(config, dtype):
    tokens = max(config.chunk_memory, config.chunk_other) + 7
    meets_yardstick(config, *problem(config, 2, tokens, 0.5), dtype, [tokens, 18])


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
def test_any_number_of_tokens(tokens):
    meets_yardstick(NARROW[0], *problem(NARROW[0], 2, tokens, 0.5), torch.float32, [tokens, tokens // 2])


@pytest.mark.parametrize("correlation", [*(pytest.param(c, marks=pytest.mark.slow) for c in (0.0, 0.9)), 1.0])
def test_correlated_and_repeated_keys(correlation):
    meets_yardstick(NARROW[0], *problem(NARROW[0], 1, 37, correlation), torch.float32)


@pytest.mark.parametrize("alpha", [
    pytest.param([0.0] * 50, marks=pytest.mark.slow), pytest.param([1.0] * 50, marks=pytest.mark.slow),
    [1e-30, 0.999] * 25, [1.0] * 20 + [0.0] + [0.999] * 29,
])
def test_extreme_retention(alpha):
    config = TitansConfig.preset("titans", d_model=32, dgd=True, momentum=None, chunk_memory=32, chunk_other=32)
    meets_yardstick(
        config, *problem(config, 1, 50, 0.5, alpha=torch.tensor(alpha, dtype=torch.float64)), torch.float32
    )


SHAPES = list(product(WIDTHS, MULTIPLES, CHUNKS, (torch.bfloat16, torch.float16, torch.float32)))
# each shape is a kernel to compile: the others are slow
USUAL = list(product((32, 64, 128), (1, 4), (16, 64), (torch.bfloat16,)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "width, mult, chunk, dtype", USUAL
    + [pytest.param(*s, marks=pytest.mark.slow) for s in SHAPES if s not in USUAL]
)
def test_every_shape(width, mult, chunk, dtype):
    config = TitansConfig(2 * width, 2, hidden_mult=mult, chunk_memory=chunk, chunk_other=chunk)
    meets_yardstick(config, *problem(config, 3, 4 * chunk + 5, 0.5), dtype, [4 * chunk + 5, chunk, 3])


@pytest.mark.gpu
@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("chunk, other", [(16, 16), (64, 64), (16, 64), (64, 16)])
def test_long_and_wide(chunk, other, correlation):
    config = TitansConfig(512, 8, hidden_mult=4, chunk_memory=chunk, chunk_other=other)
    meets_yardstick(config, *problem(config, 2, 1100, correlation), torch.bfloat16, [1100, 777])


@pytest.mark.parametrize("chunks", [
    pytest.param(300, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.gpu)
])
def test_long_sequences(chunks):
    meets_yardstick(NARROW[0], *problem(NARROW[0], 1, 16 * chunks, 0.5), torch.float32)


@pytest.mark.parametrize(
    "config", [pytest.param(NARROW[0], marks=pytest.mark.slow), NARROW[3], NARROW[5]], ids=range(3)
)
def test_bit_identical_however_the_call_is_cut(config):
    w_init, inputs = (cast(t, torch.float32) for t in problem(config, 2, 37))
    whole, end = run(config, w_init, inputs, "triton")
    # inside chunks, over a boundary, up to one and on from there
    cuts, state, outputs = [0, 1, 17, 32, 37], None, []
    for a, b in zip(cuts, cuts[1:]):
        o, state = run(config, w_init, part(inputs, a, b), "triton", state=state)
        outputs.append(o)
    assert torch.equal(torch.cat(outputs, 1), whole) and same(state, end)
    o, ragged = run(config, w_init, inputs, "triton", [37, 20])
    alone, state = run(config, w_init, part(rows_of(inputs, [1]), 0, 20), "triton")
    assert torch.equal(o[1:, :20], alone) and same(ragged.select([1]), state)
    assert torch.equal(o[:1], whole[:1])


def test_token_by_token_is_bit_identical():
    w_init, inputs = (cast(t, torch.float32) for t in problem(NARROW[0], 1, 19))
    whole, end = run(NARROW[0], w_init, inputs, "triton")
    state, outputs = None, []
    for t in range(19):
        o, state = run(NARROW[0], w_init, part(inputs, t, t + 1), "triton", state=state)
        outputs.append(o)
    assert torch.equal(torch.cat(outputs, 1), whole) and same(state, end)


def test_padding_may_hold_anything_and_reads_change_nothing():
    w_init, inputs = (cast(t, torch.float32) for t in problem(NARROW[0], 2, 20))
    clean, end = run(NARROW[0], w_init, inputs, "triton", [20, 9])
    inputs.q[1, 9:] = inputs.x[1, 9:] = float("nan")
    o, state = run(NARROW[0], w_init, inputs, "triton", [20, 9])
    assert torch.equal(o, clean) and same(state, end)


@pytest.mark.parametrize("change, reason", [
    ({"memory": "linear"}, 'serves memory="mlp", not memory="linear"'), ({"d_model": 48}, "head widths"),
    ({"chunk_memory": 8}, "chunks of"),
])
def test_refuses_by_name_what_it_does_not_serve(change, reason):
    layer = SelfModifyingTitans(TitansConfig(**{"d_model": 32, **change})).to(DEVICE)
    with torch.no_grad(), pytest.raises(ValueError, match=reason):
        layer(torch.randn(1, 20, layer.config.d_model, device=DEVICE), backend="triton")


def test_never_the_default():
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(TitansConfig(32)).to(DEVICE), torch.randn(1, 20, 32, device=DEVICE)
    with torch.no_grad():
        default = "cpp" if DEVICE == "cpu" and not available_backends()["cpp"] else "chunked"
        assert torch.equal(layer(x)[0], layer(x, backend=default)[0])


STATIC, QUERY = TitansConfig.preset("titans", d_model=32), TitansConfig(32, adaptive_q=True, retain_to="zero")


@pytest.mark.parametrize("config, update", [
    (NARROW[0], True), (NARROW[0], False), (STATIC, True), (QUERY, True),
    *(pytest.param(c, False, marks=pytest.mark.slow) for c in (STATIC, QUERY)),
], ids=range(6))
def test_opcheck(config, update):
    w_init, inputs = (cast(t, torch.float32) for t in problem(config, 2, 5))
    state = init_titans_state(config, w_init, 2, DEVICE)
    given = arguments(config, w_init, inputs, state, state.count, torch.tensor([5, 3], device=DEVICE), update)
    torch.library.opcheck(torch.ops.hope_kernels.titans_scan.default, given)


@pytest.mark.parametrize("lengths", [[21, 21], [21, 6]])
def test_in_place_without_the_host(lengths):
    """The device alone knows where the rows stand: positions on the host are wrong here, and nobody looks at
    them."""
    w_init, inputs = (cast(t, torch.float32) for t in problem(NARROW[3], 2, 21))
    whole, end = run(NARROW[3], w_init, inputs, "triton", lengths)
    with torch.no_grad():
        state = init_titans_state(NARROW[3], w_init, 2, DEVICE)
        state.pos[:] = [-7, 1000]
        outputs = [
            titans_advance_(
                NARROW[3], w_init, part(inputs, t, t + 1), state,
                (torch.tensor(lengths, device=DEVICE) > t).long(),
            )
            for t in range(21)
        ]
    assert torch.equal(torch.cat(outputs, 1) * real(lengths, 21), whole)
    assert state.synchronize() is state
    assert same(state, end) and state.count.tolist() == lengths


def test_a_state_advanced_on_the_device_is_read_on_saved_and_loaded_where_it_stands(tmp_path):
    """Chunk boundaries, spans of the backward and files go by the host's positions."""
    w_init, inputs = (cast(t, torch.float32) for t in problem(NARROW[0], 2, 36))
    whole, end = run(NARROW[0], w_init, inputs, "triton", [36, 31])
    state = init_titans_state(NARROW[0], w_init, 2, DEVICE)
    with torch.no_grad():
        titans_advance_(NARROW[0], w_init, part(inputs, 0, 30), state, torch.tensor([30, 25], device=DEVICE))
    assert list(state.pos) == [0, 0]
    state.save(tmp_path / "s")
    loaded = load_state(tmp_path / "s", DEVICE)
    assert list(loaded.pos) == list(state.pos) == [30, 25]
    later = TokenInputs(
        *(t if t is None or t.dim() == 1 else torch.stack([t[0, 30:36], t[1, 25:31]]) for t in inputs)
    )
    o, ours = run(NARROW[0], w_init, later, "triton", state=loaded)  # both rows fill a chunk
    assert torch.equal(o, torch.stack([whole[0, 30:], whole[1, 25:31]])) and same(ours, end)


def test_a_model_follows_memories_that_a_replayed_graph_has_moved():
    torch.manual_seed(0)
    model = HopeForCausalLM(
        HopeConfig(50, 32, 2, titans=NARROW[0], cms=CMSConfig(32, chunks=(16, 32), lr=0.1))
    ).to(DEVICE).eval()
    ids = torch.randint(0, 50, (2, 40), device=DEVICE)
    with torch.no_grad():
        _, state = model(ids[:, :10], learn="next_token", backend="chunked")
        _, want = model(ids[:, 10:20], state.clone(), lengths=[10, 3], backend="chunked")
        # as a replay leaves them: all tensors, nothing on the host
        for mixer, moved in zip(state.mixers, want.mixers):
            stood = list(mixer.pos)
            mixer.assign(moved).pos[:] = stood
        state.synchronize()
        assert [list(s.pos) for s in state.states()] == [list(s.pos) for s in want.states()]
        assert list(state.pos) == [20, 13] and list(state.seen) == list(want.seen)
        assert torch.equal(
            *(model(ids[:, 20:], s, learn="next_token", backend="chunked")[0] for s in (state, want))
        )
    state.mixers[1].count += 1
    with pytest.raises(ValueError, match=r"different positions, \[40, 33\], \[41, 34\]"):
        state.synchronize()


def real(lengths, tokens):
    return (
        torch.arange(tokens, device=DEVICE) < torch.tensor(lengths, device=DEVICE).unsqueeze(1)
    )[..., None, None]


def test_compiled_layer_is_one_graph_with_the_same_bits():
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(NARROW[0]).to(DEVICE), torch.randn(1, 18, 32, device=DEVICE)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        plain, ours = (layer(x[:, :12], backend="triton")[1] for _ in range(2))
        for t in range(12, 18):
            y, plain = layer(x[:, t : t + 1], plain, backend="triton")
            z, ours = compiled(x[:, t : t + 1], ours, backend="triton")
            assert torch.equal(y, z)
    # the first position as a constant, then any position without a commit, then with one
    assert same(plain, ours) and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_compiled_decode_step_of_a_model():
    torch.manual_seed(0)
    cms = CMSConfig(32, chunks=(16, 32))
    model = HopeForCausalLM(HopeConfig(50, 32, 1, titans=NARROW[0], cms=cms)).to(DEVICE).eval()
    ids = torch.randint(0, 50, (1, 18), device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        plain, ours = model.init_state(1), model.init_state(1)
        for state, step in ((plain, model), (ours, model)):
            step(ids[:, :14], state, backend="triton")
        for t in range(14, 18):
            want, plain = model(ids[:, t : t + 1], plain, backend="triton")
            got, ours = compiled(ids[:, t : t + 1], ours, backend="triton")
            assert torch.equal(want, got)
    assert list(ours.pos) == [18]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [NARROW[0], NARROW[3]], ids=range(2))
def test_one_cuda_graph_replayed_for_every_token(config):
    """Boundaries included: the captured launch decides on the device whether a chunk is full."""
    w_init, inputs = (cast(t, torch.float32) for t in problem(config, 2, 70))
    whole, end = run(config, w_init, inputs, "triton")
    with torch.no_grad():
        token = TokenInputs(*(t if t is None or t.dim() == 1 else t[:, :1].clone() for t in inputs))
        one, warm = torch.ones(2, dtype=torch.int64, device=DEVICE), init_titans_state(config, w_init, 2, DEVICE)
        titans_advance_(config, w_init, token, warm, one)
        state, graph = init_titans_state(config, w_init, 2, DEVICE), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = titans_advance_(config, w_init, token, state, one)
        outputs = []
        for t in range(70):
            for mine, theirs in zip(token, part(inputs, t, t + 1)):
                if mine is not None and mine.dim() > 1:
                    mine.copy_(theirs)
            graph.replay()
            outputs.append(o.clone())
    assert torch.equal(torch.cat(outputs, 1), whole) and same(state.synchronize(), end)


@pytest.mark.gpu
def test_bit_identical_run_to_run():
    config = TitansConfig(512, 8, hidden_mult=2)
    w_init, inputs = (cast(t, torch.bfloat16) for t in problem(config, 4, 500, 0.5))
    o, state = run(config, w_init, inputs, "triton")
    for _ in range(20):
        again, end = run(config, w_init, inputs, "triton")
        assert torch.equal(again, o) and same(end, state)


def test_lengths_out_of_range_stay_inside_the_row():
    w_init, inputs = (cast(t, torch.float32) for t in problem(NARROW[0], 2, 5))
    _, end = run(NARROW[0], w_init, inputs, "triton", [5, 0])
    state = init_titans_state(NARROW[0], w_init, 2, DEVICE)
    with torch.no_grad():
        titans_advance_(NARROW[0], w_init, inputs, state, torch.tensor([9, -3], device=DEVICE))
    assert torch.equal(
        state.pending_k, end.pending_k
    ) and not state.pending_k[1].any() and state.count.tolist() == [5, 0]
