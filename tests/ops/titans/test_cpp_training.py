"""Training through the C++ library: gradients against fp64 autograd of the chunked backend, by the yardstick."""

import random

import pytest
import torch
from gradients import RULES, gradients, leaves, meets_yardstick, opened
from numerics import rms, within_yardstick
from problems import noisy, problem, results, rows_of, run, single

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, SelfModifyingTitans, TitansConfig
from hope_kernels.backend import BY_ALL, BY_INPUTS, Request
from hope_kernels.ops.shared import cpu_library
from hope_kernels.ops.titans import cpp, cpp_training
from hope_kernels.ops.titans.backends import resolve
from hope_kernels.ops.titans.cpp_training import CARRIED, titans_cpp_training
from hope_kernels.ops.titans.scan import Stats, titans_chunk
from hope_kernels.ops.titans.state import init_titans_state

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

CONFIGS = {
    "default": TitansConfig(64, 2),
    "two heads, wide": TitansConfig(48, 2, hidden_mult=2),
    "every token": TitansConfig.preset("nested_learning", d_model=16),
    "odd chunks": TitansConfig(40, 1, chunk_memory=12, chunk_other=4, activation="silu"),
    **RULES,
}


def judged(config, w_init, inputs, **call):
    meets_yardstick(config, w_init, inputs, compute=titans_cpp_training, **call)


def gradients_of(config, w_init, inputs, **call):
    return gradients(titans_cpp_training, config, w_init, inputs, torch.float32, **call)


def alike(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_meet_the_yardstick(name):
    """Rows at different places of open chunks; cut calls; and from the start over several spans."""
    what, call = opened(CONFIGS[name])
    judged(*what, **call)
    judged(*what, cuts=[0, 5, 14], **call)
    chunk = max(CONFIGS[name].chunk_memory, CONFIGS[name].chunk_other)
    judged(CONFIGS[name], *problem(CONFIGS[name], 2, 2 * chunk + 3, 0.5))


def drawn(seed: int) -> TitansConfig:
    r = random.Random(seed)
    small = r.choice([2, 4, 8, 16, 24])
    chunks = [small, small * r.choice([1, 1, 2, 3])]
    r.shuffle(chunks)
    flip = lambda: r.random() < 0.5
    return TitansConfig(
        2 * r.choice([16, 24, 32]), 2, hidden_mult=r.choice([1, 2]), activation=r.choice(["gelu_tanh", "gelu", "silu"]),
        chunk_memory=chunks[0], chunk_other=chunks[1], own_values=flip(), target_norm=flip(), step_clip=flip(),
        objective=r.choice(["l2", "dot"]), grad_scale=r.choice([1.0, 2.0]), dgd=flip(), retention=flip(),
        retain_to=r.choice(["init", "zero"]), qk_l2norm=r.random() < 0.7, scalar_skip=flip(),
        eta_activation=r.choice(["sigmoid", "softplus"]), eta_scale=0.02, self_modifying=r.random() < 0.8,
    )


def within_bounds(config) -> bool:
    """As ``test_cpp.within_bounds``, for gradients: ten times the exact ones' largest response to noise in weights and
    inputs is allowed as well; no comparison, and False, where a gradient leaves 1e6 or PyTorch cannot follow it."""
    (_, w_init, inputs), call = opened(config)
    of = lambda w, i, dtype=torch.float64: gradients(titans_chunk, config, w, i, dtype, **call)
    exact, peer = of(w_init, inputs), of(w_init, inputs, torch.float32)
    if not all(float(t.abs().max()) < 1e6 and rms(peer[n] - t) <= 1e-3 * rms(t) for n, t in exact.items()):
        return False
    ours, noise = gradients_of(config, w_init, inputs, **call), []
    for seed in range(1, 5):
        noise.append(of(noisy(w_init, seed), noisy(inputs, seed)))
        try:
            for name, t in exact.items():
                within_yardstick(ours[name], peer[name], t, name, *(found[name] for found in noise))
            return True
        except AssertionError:
            if seed == 4:
                raise
    raise AssertionError


@pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(12, 120, 12))])
def test_drawn_configurations(first):
    """Twelve of them, most of which do not diverge."""
    assert sum(within_bounds(drawn(seed)) for seed in range(first, first + 12)) >= 6


@pytest.mark.parametrize("kept_bytes", [1, 2**23])
def test_many_spans_meet_the_yardstick(kept_bytes, monkeypatch):
    monkeypatch.setattr(cpp_training, "KEPT_BYTES", kept_bytes)
    judged(CONFIGS["default"], *problem(CONFIGS["default"], 1, 300, 0.3))


@pytest.mark.parametrize("correlation", [0.9, 1.0])
def test_correlated_and_repeated_keys(correlation):
    judged(CONFIGS["default"], *problem(CONFIGS["default"], 1, 33, correlation))


@pytest.mark.parametrize("alpha", [
    [0.0] * 35, [1.0] * 35, [1e-30, 0.999] * 17 + [0.5], [1.0] * 20 + [0.0] + [0.999] * 14,
])
def test_extreme_retention(alpha):
    config = TitansConfig.preset("titans", d_model=32, dgd=True, momentum=None, chunk_memory=32)
    judged(config, *problem(config, 1, 35, 0.5, alpha=torch.tensor(alpha, dtype=torch.float64)))


@pytest.mark.parametrize("width, mult, chunk, tokens", [
    (64, 1, 16, 33), (64, 4, 16, 20), pytest.param(64, 2, 64, 130, marks=pytest.mark.slow),
    pytest.param(32, 4, 128, 140, marks=pytest.mark.slow),
])
def test_wider_heads_and_longer_chunks(width, mult, chunk, tokens):
    config = TitansConfig(width, 1, hidden_mult=mult, chunk_memory=chunk, chunk_other=chunk)
    judged(config, *problem(config, 1, tokens, 0.5))


def test_pure_reads():
    what, call = opened(CONFIGS["two clocks, silu"])
    judged(*what, update=False, **call)


def test_constant_memory_is_differentiated_by_the_queries_alone():
    what, call = opened(CONFIGS["default"])
    judged(*what, constant_memory=True, **call)
    assert gradients_of(*what, constant_memory=True, **call).keys() == {"q"}


def test_bits_do_not_depend_on_threads_spans_vectors_or_company(monkeypatch):
    for name in ("default", "two clocks, silu", "static, two heads"):
        (config, w_init, inputs), call = opened(CONFIGS[name])
        whole = gradients_of(config, w_init, inputs, **call)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert alike(gradients_of(config, w_init, inputs, **call), whole)
        finally:
            torch.set_num_threads(threads)
        with monkeypatch.context() as patch:
            patch.setattr(cpp_training, "KEPT_BYTES", 1)  # spans of eight chunks
            assert alike(gradients_of(config, w_init, inputs, **call), whole)
        width = cpu_library.library().hope_cpu_width(0)
        try:
            cpu_library.library().hope_cpu_width(256)
            assert alike(gradients_of(config, w_init, inputs, **call), whole)
        finally:
            cpu_library.library().hope_cpu_width(width)
        twins = {"before": rows_of(call["before"], [0, 0]), "pos": [20, 20], "lengths": [14, 14]}
        even = gradients_of(config, w_init, rows_of(inputs, [0, 0]), **twins)
        for part in ("q", "x", "k", "v", *(f"state.{n}" for n in CARRIED)):
            assert part not in even or torch.equal(even[part][0], whole[part][0]), part


def trained(config, tokens, lengths):
    w, i = (leaves(t, torch.float32) for t in problem(config, len(lengths), tokens))
    state = init_titans_state(config, w, len(lengths))
    o, new = titans_cpp_training(config, w, i, state, lengths)
    return w, i, state, o, new


def test_a_row_alone_has_the_gradient_that_it_has_in_company():
    config, lengths = CONFIGS["default"], [40, 23, 0]
    w_init, inputs = problem(config, 3, 40)
    errors = torch.randn(3, 40, 2, 32, generator=torch.Generator().manual_seed(3))
    found = []
    for rows in ([0, 1, 2], [1]):
        w, i = leaves(w_init, torch.float32), leaves(rows_of(inputs, rows), torch.float32)
        state = init_titans_state(config, w, len(rows))
        o, _ = titans_cpp_training(config, w, i, state, [lengths[r] for r in rows])
        found.append(torch.autograd.grad(o, (i.q, i.x), errors[rows]))
    for together, alone in zip(*found):
        assert torch.equal(together[1], alone[0])
        assert not together[2].any() and not together[1, 23:].any()


def test_values_are_those_of_a_call_without_gradients():
    config = CONFIGS["default"]
    w_init, inputs = problem(config, 2, 300)
    o, new = run(config, single(w_init), single(inputs), "cpp", [300, 131])
    w, i, state, ours, after = trained(config, 300, [300, 131])
    plain, own = results(o, new), results(ours, after)
    assert all(torch.equal(plain[n], own[n]) for n in plain) and after.delta2.requires_grad
    assert list(after.pos) == [300, 131] and list(state.pos) == [0, 0] and not state.delta2.any()


def test_a_detached_state_cuts_the_gradient_and_a_carried_one_does_not():
    config = CONFIGS["default"]
    w, i, _, _, middle = trained(config, 20, [20])
    later = leaves(problem(config, 1, 20, seed=5)[1], torch.float32)
    for state, reached in ((middle, True), (middle.detach(), False)):
        o, _ = titans_cpp_training(config, w, later, state, [20])
        grad, = torch.autograd.grad(o.square().sum(), i.x, allow_unused=True, retain_graph=True)
        assert (grad is not None and bool(grad.any())) == reached


@pytest.mark.parametrize("kept_bytes, span", [(1, 32), (2**23, 16)])
def test_one_state_is_kept_a_span(kept_bytes, span, monkeypatch):
    """Spans are single chunks as long as little is kept."""
    monkeypatch.setattr(cpp_training, "CHUNKS_A_SPAN", 2)
    monkeypatch.setattr(cpp_training, "KEPT_BYTES", kept_bytes)
    saved = []
    for tokens in (32, 33, 65):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            trained(CONFIGS["default"], tokens, [tokens])
        states = [t.shape[2] for t in saved if t.dim() == 5 and t.shape[3:] == (5 * 32, 32)]
        assert states == [(tokens - 1) // span]
        # nothing else grows with the call but q, x, and the k and v that were made of it
        assert sum(t.numel() for t in saved if t.dim() == 4 and t.shape[1] == tokens) == 4 * 64 * tokens


def test_what_is_kept_stays_below_its_limit_until_spans_are_longest(monkeypatch):
    monkeypatch.setattr(cpp_training, "KEPT_BYTES", 100)
    config, state = CONFIGS["default"], init_titans_state(CONFIGS["default"], None, 2)
    for tokens, state_bytes, chunks in ((160, 10, 1), (160, 20, 2), (176, 20, 3), (5000, 20, 8), (3, 1000, 1)):
        call = cpp_training.Call(config, state, [tokens, 0], True)
        assert cpp_training.span_of(call, state_bytes) == 16 * chunks


def test_the_graph_may_be_kept_but_not_differentiated_again():
    w, i, _, o, _ = trained(CONFIGS["default"], 20, [20])
    loss = o.square().sum()
    once, = torch.autograd.grad(loss, i.x, retain_graph=True)
    again, = torch.autograd.grad(loss, i.x, retain_graph=True)
    assert torch.equal(once, again)
    twice, = torch.autograd.grad(loss, i.x, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient of its gradient; the chunked backend"):
        torch.autograd.grad(twice.sum(), i.x)


def test_the_callers_state_is_its_own_before_the_backward():
    config, grads = CONFIGS["default"], []
    for moves in (False, True):
        w, i, state, o, _ = trained(config, 40, [40, 21])
        if moves:
            state.pos[:], state.count[:] = [5, 5], 5
        grads.append(torch.autograd.grad(o.square().sum(), [t for t in (*w, *i) if t is not None]))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_padding_reaches_nothing():
    config, lengths, found = CONFIGS["two clocks, silu"], [40, 21], []
    for poison in (0.0, float("nan")):
        w_init, inputs = problem(config, 2, 40)
        inputs.q[1, 21:], inputs.x[1, 21:] = poison, poison
        w, i = leaves(w_init, torch.float32), leaves(inputs, torch.float32)
        o, _ = titans_cpp_training(config, w, i, init_titans_state(config, w, 2), lengths)
        error = torch.ones_like(o)
        error[1, 21:] = poison
        found.append(torch.autograd.grad(o, [t for t in (*w, *i) if t is not None], error))
    assert all(torch.equal(a, b) for a, b in zip(*found)) and not found[1][3][1, 21:].any()


def test_gradients_that_nobody_wants_are_none():
    config = CONFIGS["default"]
    w_init, inputs = problem(config, 1, 20)
    w, i = single(w_init), single(inputs)
    q = i.q.requires_grad_()
    o, new = titans_cpp_training(config, w, i._replace(q=q), init_titans_state(config, w, 1), [20])
    o.sum().backward()
    assert q.grad is not None and i.x.grad is None
    with torch.no_grad():
        assert not titans_cpp_training(config, w, i, init_titans_state(config, w, 1), [20])[0].requires_grad


def test_who_serves_training():
    cpu, config = torch.device("cpu"), CONFIGS["default"]
    assert resolve(config, torch.float32, cpu) is titans_cpp_training
    assert resolve(config, torch.float64, cpu) is titans_chunk
    for change in ({"momentum": 0.9}, {"adaptive_q": True}, {"memory": "linear"}):
        other = TitansConfig(**{"d_model": 32, **change})
        assert resolve(other, torch.float32, cpu) is titans_chunk
        assert cpp.unserved(Request(other, torch.float32, cpu, BY_ALL))
    assert cpp.unserved(Request(config, torch.float32, cpu, BY_INPUTS)) is None
    served = torch.vmap(lambda t: t if resolve(config, torch.float32, cpu) is titans_chunk else t + 1)(torch.zeros(2))
    assert not served.any()
    w_init, inputs = problem(config, 1, 3)
    with pytest.raises(ValueError, match="collects no statistics"):
        titans_cpp_training(config, leaves(w_init, torch.float32), single(inputs),
            init_titans_state(config, single(w_init), 1), [3], stats=Stats([], []))


def test_a_layer_and_a_model_train_with_the_gradients_of_the_chunked_backend():
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(TitansConfig(32, 2)), torch.randn(2, 50, 32)
    model = HopeForCausalLM(
        HopeConfig(61, 32, 2, titans=TitansConfig(32, 2, chunk_memory=8, chunk_other=16), cms=CMSConfig(32, (16, 32)))
    )
    ids = torch.randint(0, 61, (2, 50))
    for module, given in ((layer, x), (model, ids)):
        found = []
        for backend in (None, "chunked"):
            y, state = module(given, lengths=[50, 37], backend=backend)
            y, _ = module(given, state, backend=backend)
            module.zero_grad()
            y.square().mean().backward()
            found.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, g in found[0].items():
            torch.testing.assert_close(g, found[1][name], rtol=1e-4, atol=1e-5 * float(found[1][name].abs().max()))
