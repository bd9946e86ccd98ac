"""The closed form against the NumPy token loop, gradients, and the streaming contract of the layer."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from contract import Accurate, Backend, Case, Streaming
from hypothesis import given, settings
from numerics import correlated, random_layer, reference_params, reference_run, relative, state_errors
from problems import results, run

from hope_kernels import SelfModifyingTitans, TitansConfig, load_state
from hope_kernels.ops.titans import reference
from hope_kernels.ops.titans.scan import eta_gate

FLAGS = (
    "own_values", "target_norm", "step_clip", "dgd", "retention", "qk_l2norm", "out_norm", "gate", "out_proj",
    "scalar_skip"
)


@st.composite
def configs(draw):
    small = draw(st.sampled_from([1, 2, 3, 4, 8]))
    large = small * draw(st.sampled_from([1, 1, 2, 4]))
    memory, other = draw(st.permutations([small, large]))
    modifying = draw(st.booleans())
    return TitansConfig(
        d_model=6, num_heads=draw(st.sampled_from([1, 2])), hidden_mult=draw(st.sampled_from([1, 2])),
        memory=draw(st.sampled_from(["mlp", "mlp", "linear"])),
        activation=draw(st.sampled_from(["gelu_tanh", "gelu", "silu"])),
        chunk_memory=memory, chunk_other=other, self_modifying=modifying,
        objective=draw(st.sampled_from(["l2", "dot"])),
        grad_scale=draw(st.sampled_from([1.0, 2.0])), retain_to=draw(st.sampled_from(["init", "zero"])),
        momentum=draw(st.sampled_from([None, 0.0, 0.9, "learned"])), adaptive_q=modifying and draw(st.booleans()),
        conv_window=draw(st.sampled_from([None, 1, 4])),
        eta_activation=draw(st.sampled_from(["sigmoid", "softplus"])),
        eta_scale=draw(st.sampled_from([0.1, 0.5])), alpha_bias=draw(st.sampled_from([None, 2.0, 40.0, -69.0])),
        **{flag: draw(st.booleans()) for flag in FLAGS},
    )


def agree(config: TitansConfig, x: torch.Tensor, seed: int, lengths=None) -> None:
    """Outputs and all final states equal to 1e-12, or to ten times the reference's own response to noise of
    1e-15 where it amplifies."""
    layer = random_layer(config, seed)
    with np.errstate(all="ignore"):
        theirs, rows = reference_run(layer, x, lengths)
    if not diverged(theirs, rows):
        compare(config, layer, x, lengths, theirs, rows)


def diverged(theirs, rows) -> bool:
    """Draws that leave 1e6 say nothing about exactness (the literal presets may)."""
    learned = [abs(w).max() for row in rows for head in row.heads for m in head.delta.values() for w in m.values()]
    return not max(abs(theirs).max(), *learned) < 1e6


def compare(config, layer, x, lengths, theirs, rows) -> None:
    """The response is the largest of up to four: noise of one pattern of signs may meet none."""
    with torch.no_grad():
        y, state = layer(x, lengths=lengths)
    error, state_error, response, spread = relative(y, theirs), state_errors(layer, state, rows), 0.0, 0.0
    for seed in range(4):
        if error <= max(1e-12, 10 * response) and state_error <= max(1e-12, 10 * max(spread, response)):
            return
        # noise of random sign: a common factor would be hidden by the normalisation of keys
        noise = 1e-15 * np.random.default_rng(seed).choice([-1.0, 1.0], x.shape)
        noisy, noisy_rows = reference.layer(
            config, reference_params(layer), x.numpy() * (1 + noise), lengths=lengths
        )
        response = max(response, relative(noisy, theirs))
        spread = max(spread, max(
            (abs(a.delta[m][n] - b.delta[m][n]).max() / max(1, abs(b.delta[m][n]).max())
             for r, s in zip(noisy_rows, rows)
             for a, b in zip(r.heads, s.heads) for m in b.delta for n in b.delta[m]), default=0.0))
    assert error <= max(1e-12, 10 * response)
    assert state_error <= max(1e-12, 10 * max(spread, response))


@settings(max_examples=60, deadline=None)
@given(configs(), st.sampled_from([1, 5, 13, 17, 33]), st.sampled_from([0.0, 0.5, 0.9]), st.integers(0, 10**6))
def test_closed_form_equals_token_loop(config, tokens, correlation, seed):
    torch.manual_seed(seed)
    agree(config, correlated(torch.randn(2, tokens, 6, dtype=torch.float64), correlation), seed)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(configs(), st.integers(1, 70), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(0, 10**6))
def test_closed_form_equals_token_loop_full_sweep(config, tokens, correlation, seed):
    torch.manual_seed(seed)
    agree(config, correlated(torch.randn(2, tokens, 6, dtype=torch.float64), correlation), seed)


def test_softplus_gate_is_exact_for_large_arguments():
    config = TitansConfig(8, eta_activation="softplus", eta_scale=1.0)
    raw = torch.linspace(-50, 60, 1000, dtype=torch.float64)
    assert relative(
        eta_gate(raw, 0.0, config) / raw.abs(), np.logaddexp(0, raw.numpy()) / raw.abs().numpy()
    ) < 1e-15


@pytest.mark.parametrize("preset", ["default", "paper", "nested_learning", "titans", "recall", "delta"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
def test_presets(preset, tokens):
    torch.manual_seed(tokens)
    config = TitansConfig.preset(preset, d_model=8, chunk_memory=16, chunk_other=16)
    agree(config, 0.3 * torch.randn(2, tokens, 8, dtype=torch.float64), 1)


def test_decay_extremes():
    """alpha exactly 0, exactly 1, 1e-30 beside 0.999: ratios of decays are products, never quotients of long
    products."""
    from hope_kernels.ops.titans.commit import products

    alpha = torch.tensor([[0.999, 1e-30, 0.999, 1.0, 0.0, 0.5, 1.0, 0.999]])
    P = products(alpha)[0].double()
    for s in range(9):
        want = 1.0
        for t in range(s, 9):
            want = want if t == s else want * float(alpha[0, t - 1])
            assert float(P[t, s]) == pytest.approx(want, rel=1e-6, abs=0)
    for bias in (-800.0, 800.0):
        config = TitansConfig(8, 2, chunk_memory=4, chunk_other=4, alpha_bias=bias)
        agree(config, torch.randn(2, 21, 8, dtype=torch.float64), 3)


def test_ragged_rows_equal_reference():
    config = TitansConfig(6, 2, chunk_memory=4, chunk_other=8, momentum=0.9)
    agree(config, torch.randn(3, 29, 6, dtype=torch.float64), 5, lengths=[29, 0, 13])


@pytest.mark.parametrize("overrides", [
    {}, {"chunk_other": 4, "momentum": "learned"}, {"memory": "linear"},
    {"self_modifying": False, "own_values": False},
    {"retain_to": "zero", "step_clip": False, "scalar_skip": True, "activation": "gelu", "eta_scale": 0.05},
    {"adaptive_q": True, "objective": "dot"}, {"activation": "silu"},
])
def test_gradcheck(overrides):
    """Outer gradients through the writes: to x, to all initial fast weights, gates, biases and projections."""
    config = TitansConfig(
        4, 1 if overrides else 2, **{"chunk_memory": 2, "chunk_other": 2, "eta_activation": "softplus", **overrides}
    )
    layer = random_layer(config, 2, spread=0.5)
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in layer.named_parameters()]

    def run(x, *params):
        y, state = torch.func.functional_call(layer, dict(zip(names, params)), (x,))
        return y, state.delta2

    torch.autograd.gradcheck(
        run, (x, *[p.detach().clone().requires_grad_() for p in layer.parameters()]), fast_mode=True
    )


def test_gradient_flows_across_calls():
    config = TitansConfig(4, 1, chunk_memory=2, chunk_other=2)
    layer = random_layer(config, 4)
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    whole = torch.autograd.grad(layer(x)[0].square().sum(), x)[0]
    first, state = layer(x[:, :3])
    kept = [t.clone() for t in state.tensors()]
    second, _ = layer(x[:, 3:], state)
    assert all(torch.equal(a, b) for a, b in zip(kept, state.tensors()))
    split = torch.autograd.grad(torch.cat([first, second], 1).square().sum(), x)[0]
    assert relative(split, whole) < 1e-12


STREAMED = [
    TitansConfig(6, 2), TitansConfig(6, 2, chunk_memory=4, chunk_other=8, momentum=0.9),
    TitansConfig(6, 1, chunk_memory=8, chunk_other=2, momentum="learned", adaptive_q=True, scalar_skip=True),
    TitansConfig.preset("titans", d_model=6, num_heads=2, chunk_memory=4),
    TitansConfig(6, 1, memory="linear", retain_to="zero", eta_scale=0.1),
]


@pytest.mark.parametrize("config", STREAMED)
@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 10**6))
def test_any_split_equals_one_call(config, cuts, seed):
    layer = random_layer(config, 7)
    torch.manual_seed(seed)
    x = torch.randn(2, 40, 6, dtype=torch.float64)
    edges = sorted({0, 40, *cuts})
    with torch.no_grad():
        whole, end = layer(x)
        state, parts = None, []
        for a, b in zip(edges, edges[1:]):
            y, state = layer(x[:, a:b], state)
            parts.append(y)
    assert relative(torch.cat(parts, 1), whole) < 1e-10
    assert all(relative(a, b) < 1e-10 for a, b in zip(state.tensors(), end.tensors()))
    assert state.pos == end.pos == [40, 40]


@pytest.mark.parametrize("config", STREAMED)
def test_token_by_token_and_restored(config, tmp_path):
    layer = random_layer(config, 8)
    x = torch.randn(2, 37, 6, dtype=torch.float64)
    with torch.no_grad():
        whole, _ = layer(x)
        state, parts = layer.init_state(2), []
        for t in range(37):
            if t == 19:
                state.save(tmp_path / "s.safetensors")
                state = load_state(tmp_path / "s.safetensors")
            y, state = layer(x[:, t : t + 1], state)
            parts.append(y)
    assert relative(torch.cat(parts, 1), whole) < 1e-10


@pytest.mark.parametrize("config", STREAMED)
@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 11)] * 3), min_size=1, max_size=5), st.integers(0, 10**6))
def test_ragged_company_equals_rows_alone(config, calls, seed):
    """Rows at different positions, reading different numbers of tokens; then permuted. Each equals the row
    alone."""
    layer = random_layer(config, 9)
    torch.manual_seed(seed)
    streams = torch.randn(3, 60, 6, dtype=torch.float64)
    order = [0, 1, 2]
    with torch.no_grad():
        state, outs, at = layer.init_state(3), [[], [], []], [0, 0, 0]
        for lengths in calls:
            T = max(max(lengths), 1)
            x = torch.full((3, T, 6), float("nan"), dtype=torch.float64)
            for slot, row in enumerate(order):
                n = lengths[slot]
                x[slot, :n] = streams[row, at[row] : at[row] + n]
                at[row] += n
            y, state = layer(x, state, lengths=torch.tensor(lengths))
            for slot, row in enumerate(order):
                outs[row].append(y[slot, : lengths[slot]])
                assert not y[slot, lengths[slot] :].any()
            order = [order[i] for i in (2, 0, 1)]
            state = state.select([2, 0, 1])
        for slot, row in enumerate(order):
            if at[row] == 0:
                continue
            alone, end = layer(streams[row : row + 1, : at[row]])
            assert relative(torch.cat(outs[row]).unsqueeze(0), alone) < 1e-10
            assert all(relative(a, b) < 1e-10 for a, b in zip(state.select([slot]).tensors(), end.tensors()))


def test_nan_in_padding_reaches_nothing():
    layer = random_layer(TitansConfig(6, 2, chunk_memory=4, chunk_other=4), 13)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    clean = x.clone()
    x[1, 5:], clean[1, 5:] = float("nan"), 0.0
    grads = []
    for padded in (x, clean):
        layer.zero_grad()
        y, state = layer(padded, lengths=[9, 5])
        (y.square().sum() + state.delta2.sum()).backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(*grads))


def test_update_false_reads_and_changes_nothing():
    layer = random_layer(TitansConfig(6, 2, chunk_memory=4, chunk_other=4), 10)
    x = torch.randn(1, 30, 6, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer(x[:, :10])
        before = [t.clone() for t in state.tensors()]
        y, same = layer(x[:, 10:], state, update=False)
        want, _ = reference.layer(layer.config, reference_params(layer), x[:, :10].numpy())
        _, rows = reference.layer(layer.config, reference_params(layer), x[:, :10].numpy())
    assert same is state and all(torch.equal(a, b) for a, b in zip(before, state.tensors()))
    # the convolution still sees the call's own tokens; only the first token's window is the same in the
    # reference's read
    first, _ = reference.layer(layer.config, reference_params(layer), x[:, 10:11].numpy(), rows, update=False)
    assert relative(y[:, :1], first) < 1e-12


def test_no_grad_advances_in_place_and_inference_mode_states_go_on():
    layer = random_layer(TitansConfig(6, 1, chunk_memory=4, chunk_other=4), 11)
    x = torch.randn(1, 20, 6, dtype=torch.float64)
    with torch.no_grad():
        whole, _ = layer(x)
        state = layer.init_state(1)
        address = state.delta2.data_ptr()
        _, after = layer(x[:, :10], state)
        assert after is state and state.delta2.data_ptr() == address and state.delta2.abs().sum() > 0
    with torch.inference_mode():
        _, state = layer(x[:, :10])
    with torch.no_grad():
        rest, _ = layer(x[:, 10:], state)
    assert relative(rest, whole[:, 10:]) < 1e-12


def test_bf16_operands_stay_close_and_states_stay_fp32():
    torch.manual_seed(0)
    layer = SelfModifyingTitans(TitansConfig(16, 2))
    x = torch.randn(1, 100, 16)
    with torch.no_grad():
        exact, _ = layer.double()(x.double())
        y, state = layer.bfloat16()(x.bfloat16())
    assert state.delta2.dtype == torch.float32 and state.pending_k.dtype == torch.bfloat16
    # eight mantissa bits through projections, a gate and 100 tokens of writes
    assert float((y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 0.05


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 16, 64, 256])
def test_default_layer_stays_bounded_on_stress_input(scale, chunk):
    torch.manual_seed(0)
    layer = SelfModifyingTitans(TitansConfig(32, 2, chunk_memory=chunk, chunk_other=chunk))
    embed = torch.randn(256, 32)
    T = 8192
    text = torch.tensor(list((b"In the beginning God created the heaven and the earth. " * 200)[:T]))
    inputs = torch.stack([text, torch.zeros(T, dtype=torch.long), torch.arange(T) % 8, torch.randint(0, 256, (T,))])
    with torch.no_grad():
        for p in (layer.w2, layer.w1, layer.w1s):
            p.mul_(scale)
        y, state = layer(embed[inputs])
    assert torch.isfinite(y).all() and float(y.abs().max()) < 1e3
    learned = [t for t in state.tensors() if t.is_floating_point()]
    assert all(torch.isfinite(t).all() and float(t.abs().max()) < 1e3 for t in learned)


def test_diagnostics():
    layer = random_layer(TitansConfig(8, 2, chunk_memory=4, chunk_other=4), 12)
    x = torch.randn(1, 41, 8, dtype=torch.float64)
    _, state = layer(x[:, :5])
    before = [t.clone() for t in state.tensors()]
    report = layer.diagnostics(x, state)
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors()))
    assert set(report["deviation"]) == {"memory", "k", "v", "eta", "alpha"} and report["deviation"]["memory"] > 0
    assert report["finite"] and 0 <= report["clipped_share"] <= 1 and len(report["half_life"]) == 2
    repeated = layer.diagnostics(x[:, :1].expand(-1, 41, -1))
    assert repeated["max_S"] > report["max_S"] and repeated["clipped_share"] > 0


SHORT = {"chunk_memory": 8, "chunk_other": 8}
BOTH = {"momentum": "learned", "adaptive_q": True, "chunk_other": 32}


@pytest.mark.parametrize("options, tokens", [
    # calls of 9, 11 and 20 tokens: their number is no constant of the graph, which takes three times as long
    (SHORT, (9, 9, 9)), *(pytest.param(options, (9, 11, 20), marks=pytest.mark.slow) for options in ({}, BOTH)),
])
def test_compiles_without_a_break(options, tokens):
    """One graph for a call, with and without gradients, from nothing and from a state inside an open chunk;
    ragged too."""
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(TitansConfig(32, **options)), torch.randn(2, 20, 32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first, second, trained = tokens
    outputs = {}
    for form in (layer, compiled):
        with torch.no_grad():
            y, state = form(x[:, :first], lengths=[first, 4], backend="chunked")
            z, state = form(x[:, first : first + second], state, backend="chunked")
        given = x[:, :trained].clone().requires_grad_()
        grads = torch.autograd.grad(
            form(given, backend="chunked")[0].square().sum(), [given, *layer.parameters()], allow_unused=True
        )
        outputs[form] = [y, z, *state.tensors(), *(g for g in grads if g is not None)]
    assert list(state.pos) == [first + second, 4 + second] and len(outputs[layer]) == len(outputs[compiled])
    for ours, want in zip(outputs[compiled], outputs[layer]):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)


OPERATED = [
    TitansConfig(6, 2, chunk_memory=4, chunk_other=4), TitansConfig(6, 2, chunk_memory=4, chunk_other=8, momentum=0.9),
    TitansConfig(6, 1, chunk_memory=8, chunk_other=2, momentum="learned", adaptive_q=True, scalar_skip=True),
    TitansConfig.preset("titans", d_model=6, num_heads=2, chunk_memory=4),
    TitansConfig(6, 1, memory="linear", retain_to="zero", eta_scale=0.1, chunk_memory=4, chunk_other=4),
]
ERASING = TitansConfig.preset("titans", d_model=6, dgd=True, chunk_memory=8)
DECAYS = [([0.0], [1.0]), ([1.0], [0.0]), ([1e-30, 0.999], [0.999, 1e-30, 0.0, 1.0]), ([0.999] * 9 + [0.0], [1.0])]


class TestContract(Accurate, Streaming):
    """At the operator, where the layer's convolution and projections are not in the way."""

    backend = Backend(
        "chunked", torch.float64, tolerance=1e-10,
        cuts=[Case(c, 29, (29, 13, 0), 3, cuts=((0, 1, 4, 18, 29), (0, 8, 29))) for c in OPERATED],
        steps=[Case(c, 29) for c in OPERATED],
        neighbours=[Case(c, 29, (29, 13)) for c in OPERATED],
        reads=[Case(c, 29, (11, 3)) for c in OPERATED],
        empty=OPERATED[0],
        yardstick=[Case(c, 29, (29, 13), correlation=0.5) for c in OPERATED],
        keys=[Case(c, 29, correlation=share) for c in OPERATED for share in (0.9, 1.0)],
        decays=[Case(ERASING, 20, alpha=tuple(a * 20)[:20], beta=tuple(b * 20)[:20]) for a, b in DECAYS],
    )

    def judge(self, case, w_init, inputs, dtype):
        """Against the token loop."""
        ours, theirs = (results(*run(case.config, w_init, inputs, b, case.lengths)) for b in ("chunked", "reference"))
        for name, t in ours.items():
            assert relative(t, theirs[name]) <= 1e-11, name
