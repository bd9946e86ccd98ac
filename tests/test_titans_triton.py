"""The memory's Triton kernels, interpreted: against the fp64 closed form by the yardstick, and bit for bit against themselves."""

import pytest
import torch
from numerics import within_yardstick
from problems import part, problem, results, rows_of, run, same

from hope_kernels import SelfModifyingTitans, TitansConfig, available_backends

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(available_backends()["triton"] is not None, reason=f"triton: {available_backends()['triton']}")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [
    TitansConfig(32, 1), TitansConfig(64, 2, hidden_mult=2, chunk_memory=32, chunk_other=16, activation="silu"),
    TitansConfig.preset("nested_learning", d_model=32, chunk_memory=16, chunk_other=16),
    TitansConfig(32, 1, chunk_memory=16, chunk_other=32, target_norm=False, own_values=False, retention=False),
    TitansConfig(32, 1, objective="dot", step_clip=False, qk_l2norm=False, scalar_skip=True, eta_scale=0.1),
    TitansConfig.preset("titans", d_model=64, num_heads=2, momentum=None, dgd=True, chunk_memory=32),
]


def cast(found, dtype):
    return type(found)(*(None if t is None else t.to(DEVICE, dtype) for t in found))


def meets_yardstick(config, w_init, inputs, dtype, lengths=None):
    exact = results(*run(config, w_init, inputs, "chunked", lengths))
    w, i = cast(w_init, dtype), cast(inputs, dtype)
    ours, peer = (results(*run(config, w, i, backend, lengths)) for backend in ("triton", "chunked"))
    for name, t in ours.items():
        within_yardstick(t.cpu(), peer[name].cpu(), exact[name], name)


@pytest.mark.parametrize("config", NARROW, ids=range(len(NARROW)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_meets_the_yardstick(config, dtype):
    meets_yardstick(config, *problem(config, 2, 39, 0.5), dtype, [39, 18])


@pytest.mark.parametrize("correlation", [0.0, 0.9, 1.0])
def test_correlated_and_repeated_keys(correlation):
    meets_yardstick(NARROW[0], *problem(NARROW[0], 1, 37, correlation), torch.float32)


@pytest.mark.parametrize("alpha", [[0.0] * 50, [1.0] * 50, [1e-30, 0.999] * 25, [1.0] * 20 + [0.0] + [0.999] * 29])
def test_extreme_retention(alpha):
    config = TitansConfig.preset("titans", d_model=32, dgd=True, momentum=None, chunk_memory=32, chunk_other=32)
    meets_yardstick(config, *problem(config, 1, 50, 0.5, alpha=torch.tensor(alpha, dtype=torch.float64)), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width, mult, chunk", [(64, 1, 16), (64, 4, 64), (64, 4, 256), (128, 4, 64)])
def test_full_sizes(width, mult, chunk, dtype):
    config = TitansConfig(8 * width, 8, hidden_mult=mult, chunk_memory=chunk, chunk_other=chunk)
    meets_yardstick(config, *problem(config, 2, 1100, 0.5), dtype)


@pytest.mark.parametrize("config", [NARROW[0], NARROW[3], NARROW[5]], ids=range(3))
def test_bit_identical_however_the_call_is_cut(config):
    w_init, inputs = (cast(t, torch.float32) for t in problem(config, 2, 37))
    whole, end = run(config, w_init, inputs, "triton")
    for cuts in ([0, 1, 17, 37], [0, 16, 32, 37]):
        state, outputs = None, []
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
        assert torch.equal(layer(x)[0], layer(x, backend="cpp" if DEVICE == "cpu" and not available_backends()["cpp"] else "chunked")[0])
