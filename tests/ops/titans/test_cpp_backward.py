"""The C++ backend's gradient of reads by their queries, or what these are made of, fast weights and writes being
constants: what learning while reading needs."""

import pytest
import torch
from numerics import within_yardstick
from problems import part, problem, rows_of, run, same, single

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, SelfModifyingTitans, TitansConfig
from hope_kernels.ops.shared import cpu_library
from hope_kernels.ops.titans import cpp
from hope_kernels.ops.titans.backends import resolve
from hope_kernels.ops.titans.cpp import titans_cpp
from hope_kernels.ops.titans.scan import titans_chunk
from hope_kernels.ops.titans.state import init_titans_state

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

CONFIGS = {
    "gelu_tanh": TitansConfig(32, 2, chunk_memory=16, chunk_other=16),
    "silu, memory faster": TitansConfig(24, 1, activation="silu", chunk_memory=4, chunk_other=8, hidden_mult=2),
    "gelu, memory slower": TitansConfig(32, 2, activation="gelu", chunk_memory=24, chunk_other=12),
    "to zero": TitansConfig(16, 1, retain_to="zero", chunk_memory=8, chunk_other=8, eta_scale=0.1,
        scalar_skip=True),
    "static": TitansConfig.preset("titans", d_model=32, num_heads=2, momentum=None),
    "static, two clocks": TitansConfig.preset("titans", d_model=16, momentum=None, activation="gelu",
        chunk_memory=8, chunk_other=16),
    "every token": TitansConfig(16, 2, chunk_memory=1, chunk_other=1),
    "nested_learning": TitansConfig.preset("nested_learning", d_model=24, chunk_memory=8, chunk_other=8),
    "linear": TitansConfig(32, 2, memory="linear", chunk_memory=8, chunk_other=16),
    "linear, static": TitansConfig.preset("titans", d_model=16, memory="linear", retain_to="zero"),
    "adaptive": TitansConfig(32, 2, adaptive_q=True, chunk_memory=16, chunk_other=16),
    "adaptive, two clocks": TitansConfig(24, 1, adaptive_q=True, activation="silu", chunk_memory=4, chunk_other=8,
        hidden_mult=2, qk_l2norm=False, eta_scale=0.1),
    "linear, adaptive": TitansConfig(16, 1, memory="linear", adaptive_q=True, chunk_memory=16, chunk_other=8),
}
# open chunks, boundaries on both ends, and a row that reads nothing
START, LENGTHS = [0, 5, 19, 30], [50, 33, 48, 0]


@pytest.fixture(params=CONFIGS, ids=CONFIGS.keys())
def config(request):
    return CONFIGS[request.param]


def opened(config):
    """Four rows that stand at START: w_init and the inputs to come, in fp64, and the fp32 state."""
    w_init, inputs = problem(config, 4, 80, 0.3)
    _, state = run(config, single(w_init), single(part(inputs, 0, 30)), "cpp", START)
    return w_init, part(inputs, 30, 80), state


def differentiated(scan, config, w_init, inputs, state, lengths, grad, **options):
    """o and the new state, both under grad with constant memory, and the gradient by q, or by x with adaptive_q."""
    by = "x" if config.adaptive_q else "q"
    leaf = getattr(inputs, by).clone().requires_grad_()
    o, new = scan(config, w_init, inputs._replace(**{by: leaf}), state, lengths, constant_memory=True, **options)
    assert o.requires_grad and not any(t.requires_grad for t in new.tensors())
    return o.detach(), new, torch.autograd.grad(o, leaf, grad)[0]


def output_gradient(inputs, lengths, seed=3):
    like = inputs.q if inputs.x is None else inputs.x
    grad = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, n in enumerate(lengths):
        grad[row, n:] = 0
    return grad.to(like.dtype)


@pytest.mark.parametrize("update", [True, False])
def test_values_of_the_call_without_a_graph_and_the_gradient_by_q(config, update):
    w_init, inputs, state = opened(config)
    before, w, i = state.clone(), single(w_init), single(inputs)
    grad = output_gradient(inputs, LENGTHS)
    with torch.no_grad():
        plain, after = titans_cpp(config, w, i, state, LENGTHS, update=update)
    o, new, ours = differentiated(titans_cpp, config, w, i, state, LENGTHS, grad.float(), update=update)
    assert torch.equal(o, plain) and same(new, after) and same(state, before)
    peer = differentiated(titans_chunk, config, w, i, state, LENGTHS, grad.float(), update=update)[2]
    exact = differentiated(
        titans_chunk, config, w_init, inputs, state.to(torch.float64), LENGTHS, grad, update=update
    )[2]
    within_yardstick(ours, peer, exact, "dq")
    for row, n in enumerate(LENGTHS):
        assert not ours[row, n:].any()


def test_bit_identical_for_any_cut_company_and_number_of_threads(config):
    w_init, inputs, state = opened(config)
    w, i, T = single(w_init), single(inputs), 50
    grad = output_gradient(i, [T] * 4)
    _, end, whole = differentiated(titans_cpp, config, w, i, state, [T] * 4, grad)
    for cuts in ([0, 1, 2, T], [0, 16, 40, T]):
        now, found = state, []
        for a, b in zip(cuts, cuts[1:]):
            _, now, dq = differentiated(titans_cpp, config, w, part(i, a, b), now, [b - a] * 4, grad[:, a:b])
            found.append(dq)
        assert torch.equal(torch.cat(found, 1), whole) and same(now, end)
    for row, n in enumerate(LENGTHS):
        alone = differentiated(
            titans_cpp, config, w, rows_of(i, [row]), state.select([row]), [n], grad[row : row + 1]
        )[2]
        assert torch.equal(alone[0, :n], whole[row, :n])
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(differentiated(titans_cpp, config, w, i, state, [T] * 4, grad)[2], whole)
            one = [rows_of(i, [2]), state.select([2]), [T], grad[2:3]]  # threads share a head
            assert torch.equal(differentiated(titans_cpp, config, w, *one)[2], whole[2:3])
    finally:
        torch.set_num_threads(before)


def test_the_weights_are_those_of_the_call_whatever_happens_to_the_state_before_the_backward():
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(TitansConfig(32, 2)), torch.randn(1, 40, 32)
    with torch.no_grad():
        _, state = layer(x)

    def gradient(advance):
        given, leaf = state.clone(), x.clone().requires_grad_()
        y, new = layer.scan(leaf, given, [40], constant_memory=True)
        if advance:
            with torch.no_grad():
                layer(x, given), layer(x, new)
        return torch.autograd.grad(y.square().sum(), leaf)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_padding_and_layouts_do_not_matter():
    config = CONFIGS["gelu_tanh"]
    w_init, inputs, state = opened(config)
    w, i, grad = single(w_init), single(inputs), output_gradient(single(inputs), LENGTHS)
    expected = differentiated(titans_cpp, config, w, i, state, LENGTHS, grad)[2]
    poisoned, strided = grad.clone(), i._replace(q=i.q.transpose(1, 2).contiguous().transpose(1, 2))
    for row, n in enumerate(LENGTHS):
        poisoned[row, n:] = float("nan")
    assert torch.equal(differentiated(titans_cpp, config, w, strided, state, LENGTHS, poisoned)[2], expected)
    spread = grad.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(differentiated(titans_cpp, config, w, i, state, LENGTHS, spread)[2], expected)


def test_nothing_is_kept_where_no_query_needs_a_gradient(monkeypatch):
    config = CONFIGS["gelu_tanh"]
    w_init, inputs, state = opened(config)
    w, i = single(w_init), single(inputs)
    made = []
    monkeypatch.setattr(cpp, "_kept", lambda *a, original=cpp._kept: made.append(original(*a)) or made[-1])
    o, new = titans_cpp(config, w.map(lambda t: t.requires_grad_()), i, state, [50] * 4, constant_memory=True)
    assert not made and not o.requires_grad and not any(t.requires_grad for t in new.tensors())
    differentiated(titans_cpp, config, w, i, state, [50] * 4, torch.ones_like(i.q))
    assert [kept.w2.shape[2] for kept in made] == [4]  # the last row's: positions 30 to 79


def test_who_serves_constant_memory():
    layer, x = SelfModifyingTitans(TitansConfig(32, 2)), torch.randn(1, 20, 32, requires_grad=True)
    state = layer.init_state(1)
    default, asked, chunked = (
        torch.autograd.grad(layer.scan(x, state, [20], constant_memory=True, backend=b)[0].sum(), x)[0]
        for b in (None, "cpp", "chunked")
    )
    assert torch.equal(default, asked) and not torch.equal(default, chunked)
    torch.testing.assert_close(default, chunked, rtol=1e-5, atol=1e-5)
    cpu = torch.device("cpu")
    for change in ({"adaptive_q": True}, {"memory": "linear"}):
        config = TitansConfig(**{"d_model": 32, **change})
        assert resolve(config, torch.float32, cpu, constant_memory=True) is titans_cpp
        assert resolve(config, torch.float32, cpu) is titans_chunk
    assert resolve(layer.config, torch.float64, cpu, constant_memory=True) is titans_chunk
    assert resolve(layer.config, torch.float32, cpu, constant_memory=True) is titans_cpp


LEARNING = {
    "one clock": TitansConfig(32, 2, chunk_memory=16, chunk_other=16),
    "two clocks": TitansConfig(32, 2, chunk_memory=8, chunk_other=16),
    "static": TitansConfig.preset("titans", d_model=32, num_heads=2, momentum=None, chunk_memory=16,
        chunk_other=16),
    "delta": TitansConfig.preset("delta", d_model=32, num_heads=2, chunk_memory=16, chunk_other=16),
    "adaptive": TitansConfig(32, 2, adaptive_q=True, chunk_memory=16, chunk_other=8),
}


@pytest.mark.parametrize("titans", LEARNING.values(), ids=LEARNING.keys())
def test_a_learning_model(titans):
    """Against the chunked backend, and token by token against a whole call, rows of different lengths: equal
    to rounding."""
    mixer = "self_modifying" if titans.self_modifying else "titans"
    torch.manual_seed(1)
    model = HopeForCausalLM(
        HopeConfig(61, 32, 2, mixer, titans=titans, cms=CMSConfig(32, (16, 32), lr=0.05), tie_embeddings=False)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        ids, lengths = torch.randint(0, 61, (2, 75)), [75, 52]
        still, _ = model(ids, lengths=lengths)
        whole, state = model(ids, lengths=lengths, learn="next_token")
        chunked, other = model(ids, lengths=lengths, learn="next_token", backend="chunked")
        assert (whole - still).abs().max() > 1e-2  # it has learned something
        torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-5)
        for a, b in zip(state.tensors(), other.tensors()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        now, parts = None, []
        for t in range(75):
            out, now = model(ids[:, t : t + 1], now, [1, int(t < 52)], learn="next_token")
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_no_second_derivative():
    config = CONFIGS["gelu_tanh"]
    w_init, inputs, state = opened(config)
    q = inputs.q.float().requires_grad_()
    o, _ = titans_cpp(config, single(w_init), single(inputs)._replace(q=q), state, [50] * 4, constant_memory=True)
    dq, = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiat"):
        torch.autograd.grad(dq.sum(), q)


def test_start_values_are_read_before_anything_is_written():
    """Inside the first chunk the gradient is that of the initial memory, in closed form."""
    config = TitansConfig(16, 1, chunk_memory=16, chunk_other=16, activation="silu")
    w_init, inputs = problem(config, 1, 12)
    w, i = single(w_init), single(inputs)
    grad = torch.randn_like(i.q)
    dq = differentiated(titans_cpp, config, w, i, init_titans_state(config, w, 1), [12], grad)[2]
    w2, w1 = w_init.w2[0, :16], w_init.w1[0, 0]
    z, do = inputs.q[0, :, 0] @ w2.T, grad[0, :, 0].double()
    s = torch.sigmoid(z)
    expected = do + ((do @ w1) * (s + z * s * (1 - s))) @ w2
    torch.testing.assert_close(dq[0, :, 0].double(), expected, rtol=1e-5, atol=1e-6)
