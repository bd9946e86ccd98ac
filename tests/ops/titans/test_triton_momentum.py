"""Momentum and adaptive_q in the memory's Triton kernel, interpreted: the yardstick in fp64, and bit for bit
against itself."""

import pytest
import torch
from problems import DEVICE, cast, meets_yardstick, part, problem, rows_of, run, same

from hope_kernels import SelfModifyingTitans, TitansConfig, available_backends
from hope_kernels.ops import init_titans_state, titans_chunk

pytestmark = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"triton: {available_backends()['triton']}"
)

titans = lambda **kw: TitansConfig.preset("titans", **{"d_model": 32, "chunk_memory": 16, **kw})
CONFIGS = {
    "titans": titans(d_model=64, num_heads=2),
    "titans, erasing": titans(dgd=True, chunk_memory=32),
    "titans, drifting": titans(retain_to="zero", step_clip=False, momentum=0.6, objective="dot"),
    "learned targets": TitansConfig(32, 1, momentum="learned"),
    "two clocks, the memory faster": TitansConfig(
        32, 1, momentum=0.5, chunk_memory=16, chunk_other=32, retain_to="zero", scalar_skip=True,
        eta_scale=0.1, step_clip=False,
    ),
    "two clocks, the memory slower": TitansConfig(
        32, 1, momentum="learned", chunk_memory=32, chunk_other=16, retention=False, dgd=False,
        scalar_skip=True, eta_scale=0.1,
    ),
    "adaptive_q": TitansConfig(32, 1, adaptive_q=True, scalar_skip=True, eta_scale=0.1),
    "adaptive_q, momentum, two clocks": TitansConfig(32, 1, adaptive_q=True, momentum="learned",
        chunk_memory=32, chunk_other=16),
}
# between them every path; each of the others is slow in what is not its own
USUAL = ["titans", "adaptive_q, momentum, two clocks"]
HALF = [(torch.float16, name) for name in CONFIGS if name in USUAL]
SLOW_HALF = [pytest.param(torch.float16, name, marks=pytest.mark.slow) for name in CONFIGS if name not in USUAL]


@pytest.mark.parametrize("dtype, name", [*((torch.float32, name) for name in CONFIGS), *HALF, *SLOW_HALF])
def test_meets_the_yardstick(name, dtype):
    config = CONFIGS[name]
    meets_yardstick(config, *problem(config, 2, 35, 0.5), dtype, [35, 18])


EXTREMES = [([0.0], [0.0]), ([0.0], [1.0]), ([1.0], [0.0])]


@pytest.mark.parametrize("alpha, beta", [
    *(pytest.param(*e, marks=pytest.mark.slow) for e in EXTREMES), ([1.0], [1.0]),
    ([1e-30, 0.999], [0.999, 0.999, 1e-30, 0.0, 1.0]), ([0.999] * 20 + [0.0], [1.0] * 17 + [0.0]),
])
def test_extreme_retention_and_momentum(alpha, beta):
    config = titans(dgd=True, chunk_memory=32)
    of = lambda values: torch.tensor((values * 50)[:50], dtype=torch.float64)
    meets_yardstick(config, *problem(config, 1, 50, 0.5, alpha=of(alpha), beta=of(beta)), torch.float32)


@pytest.mark.parametrize("correlation", [pytest.param(0.9, marks=pytest.mark.slow), 1.0])
def test_correlated_and_repeated_keys(correlation):
    config = titans(dgd=True, chunk_memory=32)
    meets_yardstick(config, *problem(config, 1, 33, correlation), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [
    TitansConfig.preset("titans", d_model=512, num_heads=8),
    TitansConfig.preset("titans", d_model=512, num_heads=8, chunk_memory=64),
    TitansConfig(512, 8, hidden_mult=4, chunk_memory=64, chunk_other=64, momentum="learned"),
    TitansConfig(512, 8, adaptive_q=True),
], ids=range(4))
def test_full_sizes(config, dtype):
    meets_yardstick(config, *problem(config, 2, 1100, 0.5), dtype)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == USUAL[1] else pytest.mark.slow) for n in CONFIGS]
)
def test_bit_identical_however_the_call_is_cut(name):
    config = CONFIGS[name]
    w_init, inputs = (cast(t, torch.float32) for t in problem(config, 2, 37))
    whole, end = run(config, w_init, inputs, "triton")
    state, outputs = None, []
    for a, b in zip([0, 1, 17, 32], [1, 17, 32, 37]):
        o, state = run(config, w_init, part(inputs, a, b), "triton", state=state)
        outputs.append(o)
    assert torch.equal(torch.cat(outputs, 1), whole) and same(state, end)
    o, ragged = run(config, w_init, inputs, "triton", [37, 20])
    alone, state = run(config, w_init, part(rows_of(inputs, [1]), 0, 20), "triton")
    assert torch.equal(o[1:, :20], alone) and same(ragged.select([1]), state)
    assert torch.equal(o[:1], whole[:1])


@pytest.mark.parametrize(
    "name", ["titans", pytest.param("adaptive_q, momentum, two clocks", marks=pytest.mark.slow)]
)
def test_token_by_token_is_bit_identical(name):
    w_init, inputs = (cast(t, torch.float32) for t in problem(CONFIGS[name], 1, 19))
    whole, end = run(CONFIGS[name], w_init, inputs, "triton")
    state, outputs = None, []
    for t in range(19):
        o, state = run(CONFIGS[name], w_init, part(inputs, t, t + 1), "triton", state=state)
        outputs.append(o)
    assert torch.equal(torch.cat(outputs, 1), whole) and same(state, end)


@pytest.mark.parametrize("name", ["titans", "adaptive_q, momentum, two clocks"])
def test_pure_reads_use_what_was_learned_and_change_nothing(name):
    """Whole chunks of a first call, then a read with that state: as the fp64 closed form reads, and as a call
    that also learns does."""
    config = CONFIGS[name]
    w_init, inputs = problem(config, 2, 44)
    before, after = part(inputs, 0, 32), part(inputs, 32, 44)
    exact = titans_chunk(
        config, w_init, after, run(config, w_init, before, "chunked")[1], update=False, backend="chunked"
    )[0]
    w_init, before, after = (cast(t, torch.float32) for t in (w_init, before, after))
    _, state = run(config, w_init, before, "triton")
    saved = state.clone()
    with torch.no_grad():
        o, read = titans_chunk(config, w_init, after, state, update=False, backend="triton")
    assert same(read, saved) and list(read.pos) == [32, 32]
    assert torch.equal(o, run(config, w_init, after, "triton", state=state)[0])
    assert (o.double().cpu() - exact).abs().max() < 1e-3 * exact.abs().max()


def test_no_momentum_is_momentum_zero():
    """beta = 0: s is the last increment, and the deviations are those without momentum to rounding."""
    plain, with_s = titans(dgd=True, momentum=None, chunk_memory=32), titans(dgd=True, chunk_memory=32)
    w_init, inputs = (cast(t, torch.float32) for t in problem(plain, 1, 32, 0.5))
    state = run(plain, w_init, inputs, "triton")[1]
    ours = run(with_s, w_init, inputs._replace(beta=torch.zeros_like(inputs.eta)), "triton")[1]
    for name in ("delta2", "delta1"):
        assert torch.allclose(getattr(state, name), getattr(ours, name), rtol=1e-4, atol=1e-6)
    assert torch.linalg.matrix_rank(ours.s2[0, 0], rtol=1e-4) == 1 == torch.linalg.matrix_rank(
        ours.s1[0, 0, 0], rtol=1e-4
    )


def test_a_row_without_a_commit_keeps_its_momentum():
    config = titans()
    w_init, inputs = (cast(t, torch.float32) for t in problem(config, 2, 20))
    state = init_titans_state(config, w_init, 2, DEVICE)
    for t in (state.s2, state.s1):
        t.normal_()
    _, new = run(config, w_init, inputs, "triton", [20, 9], state)
    for name in ("s2", "s1"):
        old, ours = getattr(state, name), getattr(new, name)
        assert torch.equal(ours[1], old[1]) and not torch.equal(ours[0], old[0])


@pytest.mark.parametrize("change", [{"momentum": 0.9}, {"momentum": "learned", "adaptive_q": True}])
def test_a_layer_of_it(change):
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(TitansConfig(32, **change)).to(DEVICE), torch.randn(1, 20, 32, device=DEVICE)
    with torch.no_grad():
        (y, ours), (peer, theirs) = layer(x, backend="triton"), layer(x, backend="chunked")
    torch.testing.assert_close(y, peer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.delta2, theirs.delta2, rtol=1e-4, atol=1e-5)
