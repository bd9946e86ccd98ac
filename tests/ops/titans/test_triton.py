"""The memory's Triton kernels, on a GPU if there is one, else interpreted: the contract of a backend, and what
is their own."""

from itertools import product

import pytest
import torch
from contract import Accurate, Backend, Case, OnTheDevice, Partial, Streaming
from problems import DEVICE, cast, meets_yardstick, part, problem, rows_of, run, same

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig, available_backends, load_state
from hope_kernels.ops import TokenInputs, init_titans_state, titans_advance_

pytest.importorskip("triton")
from hope_kernels.ops.titans.triton import operator  # noqa: E402
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


ERASING = TitansConfig.preset("titans", d_model=32, dgd=True, momentum=None, chunk_memory=32, chunk_other=32)
STATIC, QUERY = TitansConfig.preset("titans", d_model=32), TitansConfig(32, adaptive_q=True, retain_to="zero")
# on a GPU each of these is a kernel to compile: all but USUAL are slow
SHAPES = list(product(WIDTHS, MULTIPLES, CHUNKS, (torch.bfloat16, torch.float16, torch.float32)))
USUAL = list(product((32, 64, 128), (1, 4), (16, 64), (torch.bfloat16,)))


def slowly(case):
    return pytest.param(case, marks=pytest.mark.slow)


def on_a_gpu(case, *marks):
    return pytest.param(case, marks=(pytest.mark.gpu, *marks))


def narrow(i, dtype):
    config = NARROW[i]
    tokens = max(config.chunk_memory, config.chunk_other) + 7
    return Case(config, tokens, (tokens, 18), dtype=dtype, correlation=0.5)


def whole(width, mult, chunk, dtype):
    config = TitansConfig(2 * width, 2, hidden_mult=mult, chunk_memory=chunk, chunk_other=chunk)
    lengths = (4 * chunk + 5, chunk, 3)
    return Case(config, lengths[0], lengths, 3, dtype, 0.5)


def wide(chunk, other, correlation):
    config = TitansConfig(512, 8, hidden_mult=4, chunk_memory=chunk, chunk_other=other)
    return Case(config, 1100, (1100, 777), dtype=torch.bfloat16, correlation=correlation)


def decaying(alpha):
    return Case(ERASING, 50, rows=1, correlation=0.5, alpha=tuple(alpha))


CUT = [Case(c, 37, (37, 20), cuts=((0, 1, 17, 32, 37),)) for c in (NARROW[0], NARROW[3], NARROW[5])]


class TestContract(Accurate, Streaming, Partial, OnTheDevice):
    backend = Backend(
        "triton", torch.float32, costly=True,
        cuts=[slowly(CUT[0]), *CUT[1:]],
        steps=[Case(NARROW[0], 19, rows=1)],
        neighbours=[Case(NARROW[0], 20, (20, 9))],
        reads=[Case(NARROW[0], 20, (17, 3))],
        empty=NARROW[0],
        yardstick=[
            *(narrow(i, torch.float32) for i in range(len(NARROW))),
            *(narrow(i, torch.float16) for i in (1, 5)), *(slowly(narrow(i, torch.float16)) for i in (0, 2, 3, 4)),
            *(Case(NARROW[0], T, (T, T // 2), correlation=0.5) for T in (1, 15, 16, 17, 33)),
            *(on_a_gpu(whole(*s), *[pytest.mark.slow] * (s not in USUAL)) for s in SHAPES),
            *(on_a_gpu(wide(*clocks, share)) for clocks in product((16, 64), (16, 64)) for share in (0.0, 0.9)),
            slowly(Case(NARROW[0], 16 * 300, rows=1, correlation=0.5)),
            on_a_gpu(Case(NARROW[0], 16 * 10_000, rows=1, correlation=0.5)),
        ],
        keys=[
            Case(NARROW[0], 37, rows=1, correlation=1.0),
            *(slowly(Case(NARROW[0], 37, rows=1, correlation=share)) for share in (0.0, 0.9)),
        ],
        decays=[
            decaying([1e-30, 0.999] * 25), decaying([1.0] * 20 + [0.0] + [0.999] * 29),
            slowly(decaying([0.0] * 50)), slowly(decaying([1.0] * 50)),
        ],
        default=TitansConfig(32), refused=[
            ({"memory": "linear"}, torch.float32, 'serves memory="mlp", not memory="linear"'),
            ({"d_model": 48}, torch.float32, "head widths"), ({"chunk_memory": 8}, torch.float32, "chunks of"),
        ],
        advances=[Case(NARROW[3], 21, (21, 6))],
        operator=lambda: torch.ops.hope_kernels.titans_scan.default, arguments=arguments,
        operands=[
            (NARROW[0], True), (NARROW[0], False), (STATIC, True), (QUERY, True),
            *(pytest.param(c, False, marks=pytest.mark.slow) for c in (STATIC, QUERY)),
        ],
        compiled=NARROW[0],
        models=[HopeConfig(50, 32, 1, titans=NARROW[0], cms=CMSConfig(32, chunks=(16, 32)))],
        replayed=[Case(NARROW[0], 70), Case(NARROW[3], 70)],
        repeated=[Case(TitansConfig(512, 8, hidden_mult=2), 500, rows=4, dtype=torch.bfloat16, correlation=0.5)],
    )


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_tiles_of_an_architecture_keep_bits_over_cuts_and_company(arch, monkeypatch):
    """Chunks of 64 in 16 bits, whose tiles are others on sm_90: cut inside a tile, and a row alone."""
    monkeypatch.setattr(operator, "architecture", lambda device: arch)
    config = TitansConfig(64, 1, chunk_memory=64, chunk_other=64)
    w_init, exact = problem(config, 2, 70)
    w_half, inputs = cast(w_init, torch.float16), cast(exact, torch.float16)
    whole, end = run(config, w_half, inputs, "triton")
    state, outputs = None, []
    for start, stop in (0, 40), (40, 70):
        o, state = run(config, w_half, part(inputs, start, stop), "triton", state=state)
        outputs.append(o)
    assert torch.equal(torch.cat(outputs, 1), whole) and same(state, end)
    alone, mine = run(config, w_half, rows_of(inputs, [1]), "triton")
    assert torch.equal(alone, whole[1:]) and same(mine, end.select([1]))
    meets_yardstick(config, w_init, exact, torch.float16, [70, 20])


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
