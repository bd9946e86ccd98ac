"""Training through the memory's Triton kernels, interpreted: gradients against fp64 autograd of the chunked
backend, by the yardstick."""

from contextlib import contextmanager

import pytest
import torch
from numerics import within_yardstick
from problems import part, problem, results, rows_of

from hope_kernels import TitansConfig, available_backends
from hope_kernels.ops.titans import scan as chunked
from hope_kernels.ops.titans.commit import shared_terms
from hope_kernels.ops.titans.state import init_titans_state

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"triton: {available_backends()['triton']}"
)

from gradients import RULES, gradients, leaves, meets_yardstick, opened  # noqa: E402

from hope_kernels.ops.titans.triton import backward as triton_backward  # noqa: E402
from hope_kernels.ops.titans.triton import operator as triton  # noqa: E402
from hope_kernels.ops.titans.triton import spans as triton_spans  # noqa: E402
from hope_kernels.ops.titans.triton.backward_clock import clock_adjoint_kernel, clock_kernel  # noqa: E402
from hope_kernels.ops.titans.triton.groups import Clock, ClockTerms, Place, Slots  # noqa: E402
from hope_kernels.ops.titans.triton.operator import titans_triton  # noqa: E402
from hope_kernels.ops.titans.triton.spans import CARRIED  # noqa: E402
from hope_kernels.ops.titans.triton.tiles import rule_of, shape_of  # noqa: E402
from hope_kernels.ops.titans.triton.training import titans_triton_training  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = {"default": TitansConfig(32, 1), **RULES}


# judged in other tests; the last has no switch that another one lacks
JUDGED_BELOW = ("default", "two clocks, silu", "nested_learning")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in JUDGED_BELOW else ()) for n in CONFIGS]
)
def test_gradients_meet_the_yardstick(name):
    what, call = opened(CONFIGS[name])
    meets_yardstick(*what, **call)


def test_gradients_in_half_precision():
    what, call = opened(CONFIGS["default"])
    meets_yardstick(*what, torch.float16, **call)


@pytest.mark.parametrize("correlation", [pytest.param(0.9, marks=pytest.mark.slow), 1.0])
def test_correlated_and_repeated_keys(correlation):
    meets_yardstick(CONFIGS["default"], *problem(CONFIGS["default"], 1, 33, correlation))


@pytest.mark.parametrize("alpha", [
    pytest.param([0.0] * 35, marks=pytest.mark.slow), pytest.param([1.0] * 35, marks=pytest.mark.slow),
    [1e-30, 0.999] * 17 + [0.5], [1.0] * 20 + [0.0] + [0.999] * 14,
])
def test_extreme_retention(alpha):
    config = TitansConfig.preset("titans", d_model=32, dgd=True, momentum=None, chunk_memory=32)
    meets_yardstick(config, *problem(config, 1, 35, 0.5, alpha=torch.tensor(alpha, dtype=torch.float64)))


@pytest.mark.slow
@pytest.mark.parametrize("width, mult, chunk, tokens", [(128, 1, 16, 33), (64, 2, 64, 130), (32, 4, 128, 140)])
def test_wider_heads_and_longer_chunks(width, mult, chunk, tokens):
    config = TitansConfig(width, 1, hidden_mult=mult, chunk_memory=chunk, chunk_other=chunk)
    meets_yardstick(config, *problem(config, 1, tokens, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width, mult, chunk", [(64, 1, 16), (64, 4, 64), (64, 1, 256), (128, 4, 16), (128, 4, 64)])
def test_full_sizes(width, mult, chunk, dtype):
    config = TitansConfig(2 * width, 2, hidden_mult=mult, chunk_memory=chunk, chunk_other=chunk)
    meets_yardstick(config, *problem(config, 2, 600, 0.5), dtype)


def test_cut_calls_and_short_spans_have_the_same_gradient(monkeypatch):
    what, call = opened(CONFIGS["two clocks, silu"])
    meets_yardstick(*what, cuts=[0, 5, 14], **call)
    monkeypatch.setattr(triton_spans, "CHUNKS_A_SPAN", 1)
    meets_yardstick(*what, **call)


def test_recomputed_spans_have_the_same_gradient(monkeypatch):
    """What serves configurations without backward kernels."""
    monkeypatch.setattr(triton_backward, "serves", lambda config: False)
    monkeypatch.setattr(triton_spans, "CHUNKS_A_SPAN", 1)
    what, call = opened(CONFIGS["default"])
    meets_yardstick(*what, **call)
    meets_yardstick(*what, update=False, **call)


@pytest.mark.parametrize(
    "options", [{"update": False}, {"constant_memory": True}], ids=["pure read", "constant memory"]
)
def test_reads_alone(options):
    """A pure read differentiates the memory as it is; with constant memory only q is differentiated, and the
    new state is detached."""
    what, call = opened(CONFIGS["two clocks, silu"])
    meets_yardstick(*what, **call, **options)
    if "constant_memory" in options:
        assert gradients(titans_triton_training, *what, torch.float32, **call, **options).keys() == {"q"}


def test_a_row_has_the_same_gradient_in_any_company():
    (config, w_init, inputs), call = opened(CONFIGS["default"])
    mixed = gradients(titans_triton_training, config, w_init, inputs, torch.float32, **call)
    twins = {"before": rows_of(call["before"], [0, 0]), "pos": [20, 20], "lengths": [14, 14]}
    even = gradients(titans_triton_training, config, w_init, rows_of(inputs, [0, 0]), torch.float32, **twins)
    for name in ("q", "x", *(f"state.{n}" for n in CARRIED if f"state.{n}" in even)):
        assert torch.equal(mixed[name][0], even[name][0]), name


def test_without_a_gradient_it_is_the_forward():
    config = CONFIGS["default"]
    w, i = (
        type(t)(*(None if u is None else u.to(DEVICE, torch.float32) for u in t)) for t in problem(config, 2, 20)
    )
    state = init_titans_state(config, w, 2, DEVICE)
    ours, plain = (results(*f(config, w, i, state, [20, 12])) for f in (titans_triton_training, titans_triton))
    trained = results(*titans_triton_training(config, leaves(w, torch.float32), i, state, [20, 12]))
    assert all(torch.equal(ours[n], plain[n]) and not ours[n].requires_grad for n in plain)
    assert all(
        torch.equal(trained[n], plain[n]) for n in plain
    ) and trained["o"].requires_grad and trained["delta2"].requires_grad


def test_one_state_is_kept_a_span(monkeypatch):
    monkeypatch.setattr(triton_spans, "CHUNKS_A_SPAN", 2)
    config = CONFIGS["static, bare"]

    def kept(tokens):
        w_init, inputs = problem(config, 1, tokens)
        w, i = leaves(w_init, torch.float32), leaves(inputs, torch.float32)
        state, saved = init_titans_state(config, w, 1, DEVICE), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            titans_triton_training(config, w, i, state, [tokens])
        states = [t for t in saved if t.shape == state.delta1.shape]
        per_token = sum(t.numel() for t in saved if t.dim() > 1 and t.shape[1] == tokens)
        return len(states), per_token / tokens

    assert kept(20) == kept(31) == (1, 3 * 32 + 1)  # one state; q, k, v, eta
    assert kept(33)[0] == 2 and kept(65)[0] == 3


def trained(config, tokens, lengths, dtype=torch.float32):
    """A call with gradients and its backward: w_init, inputs and the state that it began with."""
    w, i = (leaves(t, dtype) for t in problem(config, len(lengths), tokens))
    state = init_titans_state(config, w, len(lengths), DEVICE, dtype)
    o, new = titans_triton_training(config, w, i, state, lengths)
    (o.float().sum() + new.delta2.sum()).backward()
    return w, i, state


def test_half_precision_is_replayed_by_the_forwards_kernel(monkeypatch):
    """In the forward's own build, so with its bits: all launches of the scan have one signature, and the
    states are the forward's."""
    config, builds, states = CONFIGS["default"], set(), []
    arguments, replay = triton.arguments, triton_backward.titans_triton

    def noting(*given):
        found = arguments(*given)
        builds.add(tuple(t.dtype if isinstance(t, torch.Tensor) else t for t in found))
        return found

    monkeypatch.setattr(triton, "arguments", noting)
    # which goes on in place
    monkeypatch.setattr(
        triton_backward, "titans_triton",
        lambda *a, **k: states.append((found := replay(*a, **k))[1].clone()) or found
    )
    C = config.chunk_memory
    w, i, start = trained(config, 3 * C, [3 * C], torch.float16)
    assert len(builds) == 1 and len(states) == 2
    for n, state in enumerate(states):
        with torch.no_grad():
            want = titans_triton(config, w, part(i, 0, (n + 1) * C), start, [(n + 1) * C])[1]
        assert all(
            torch.equal(a, b) for a, b in zip(state.deviation, want.deviation) if a is not None
        ) and want.delta2.any()


@pytest.mark.parametrize("lengths, copies", [pytest.param([19, 19], 0, marks=pytest.mark.slow), ([19, 13], 1)])
def test_positions_are_made_on_the_device(lengths, copies, monkeypatch):
    """Ragged lengths are copied to it once a call, and nothing else: a backward, or a call of equal lengths,
    fits a CUDA graph."""
    monkeypatch.setattr(triton_spans, "CHUNKS_A_SPAN", 1)
    fresh, made, grads = torch.tensor, [], []
    for moves in (False, True):
        w, i = (leaves(t, torch.float32) for t in problem(CONFIGS["default"], 2, 19))  # two spans
        state = init_titans_state(CONFIGS["default"], w, 2, DEVICE)
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", lambda *a, **k: made.append(a) or fresh(*a, **k))
            o, _ = titans_triton_training(CONFIGS["default"], w, i, state, lengths)
            if moves:  # the caller's state is the caller's to advance before the backward
                state.count += 5
                state.pos[:] = [5, 5]
            o.square().sum().backward()
        assert len(made) == copies
        grads.append([t.grad for t in (*w, *i) if t is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.gpu
def test_a_captured_training_step_has_the_same_gradients():
    config = CONFIGS["two clocks, silu"]
    w, i = (leaves(t, torch.float32) for t in problem(config, 2, 70))
    state = init_titans_state(config, w, 2, DEVICE)
    alive = [t for t in (*w, *i) if t is not None]

    def step():
        o, new = titans_triton_training(config, w, i, state, [70, 70])
        return torch.autograd.grad(o.square().sum() + new.delta2.sum(), alive)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, want))


def test_a_span_is_launched_on_the_device_of_its_tensors(monkeypatch):
    """Also when called directly, where no autograd engine has chosen the device."""
    guarded, launched = [], []

    @contextmanager
    def device_of(t):
        guarded.append(t.device)
        yield
        guarded.pop()

    class Noted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(list(guarded))
            return self.kernel[grid]

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in [n for n in vars(triton_backward) if n.endswith("_kernel")]:
        monkeypatch.setattr(triton_backward, name, Noted(getattr(triton_backward, name)))
    w, _, _ = trained(CONFIGS["default"], 20, [20])
    assert len(launched) > 10 and all(devices == [w.w2.device] for devices in launched)


def test_statistics_are_refused():
    w_init, inputs = problem(CONFIGS["default"], 1, 3)
    state = init_titans_state(CONFIGS["default"], w_init, 1)
    with pytest.raises(ValueError, match="collects no statistics"):
        titans_triton_training(CONFIGS["default"], w_init, inputs, state, [3], stats=chunked.Stats([], []))


@pytest.mark.parametrize("alpha", [None, [0.9] * 32, [0.0] * 32, [1.0] * 5 + [0.0, 1e-30] + [0.999] * 25])
@pytest.mark.parametrize("dgd", [True, False])
def test_adjoint_of_the_clock(alpha, dgd):
    """Decays, keys and the clip's Gram entries, against fp64 autograd of ``shared_terms``, with its fp32 as
    the peer."""
    C, D = 32, 32
    config = TitansConfig(D, 1, dgd=dgd, retention=alpha is not None)
    torch.manual_seed(0)
    k = torch.randn(1, C, D, dtype=torch.float64) + torch.randn(1, 1, D, dtype=torch.float64)
    given = {"k": (k / k.norm(dim=-1, keepdim=True)).float(), "eta": torch.rand(1, C)}
    if alpha is not None:
        given["alpha"] = torch.tensor([alpha])
    adjoint = {
        n: torch.randn(s) for n, s in (("keys", (1, 2, C, D)), ("carry", (1, C)), ("end", (1, C)),
            ("w", (1, C)), ("q", (1, C)))
    }
    keep = torch.randn(2)

    def autograd(dtype):
        leaf = {n: t.to(dtype).requires_grad_() for n, t in given.items()}
        e = {n: t.to(dtype) for n, t in adjoint.items()}
        c = shared_terms(config, leaf["k"], leaf["eta"], leaf.get("alpha"), None)
        loss = (
            c.Kg * e["keys"].sum(1)
        ).sum() + (c.arrival_after * e["end"]).sum() + c.decay_chunk.sum() * keep.to(dtype).sum()
        loss = loss + (c.gram2 * e["w"].unsqueeze(-1) * e["q"].unsqueeze(1)).sum()
        if dgd:
            loss = loss + (leaf["eta"] * c.decay_before * e["carry"]).sum()
        return dict(zip(leaf, torch.autograd.grad(loss, list(leaf.values()), allow_unused=True))), c

    new = lambda *shape: torch.zeros(shape, device=DEVICE)
    at = {n: t.to(DEVICE) for n, t in given.items()}
    place = [torch.tensor([n], device=DEVICE) for n in (0, C)]
    terms = ClockTerms(new(C, C), new(C, C), new(C, D), new(3, C))
    slots = Slots(at["k"], at["k"], at["eta"], at.get("alpha", at["eta"]))
    call = {"slots": slots, "place": Place(*place), "terms": terms, "end": C, "S": C}
    model = {"shape": shape_of(config), "rule": rule_of(config, True)}
    clock_kernel[(1,)](**call, **model, C=C)
    factors, sums = new(1, 9, C), new(2, 6, C)
    factors[0, 5], factors[0, 6], factors[0, 7], factors[0, 8] = (
        adjoint[n][0].to(DEVICE) for n in ("carry", "end", "w", "q")
    )
    sums[:, 5, 0] = keep.to(DEVICE)
    ours = {"k": new(C, D), "eta": new(C), "alpha": new(C)}
    model["shape"] = model["shape"]._replace(MF=1, MS=0)  # one memory
    clock_adjoint_kernel[(1,)](
        **call, factors_p=factors, sums_p=sums, keys_bar_p=adjoint["keys"].to(DEVICE), solved_p=new(C, D),
        products_bar_p=new(C, C), gram_bar_p=new(C, C), vectors_bar_p=new(2, C),
        slots_bar=Slots(ours["k"], new(C, D), ours["eta"], ours["alpha"]), **model, clock=Clock(0, 1, C), TILES=2,
    )
    exact, clock = autograd(torch.float64)
    peer, clock32 = autograd(torch.float32)
    within_yardstick(terms.keys.cpu(), clock32.Kg[0].detach(), clock.Kg[0].detach(), "Kg")
    for name, g in exact.items():
        if g is None:
            assert not ours[name].any()
        else:
            within_yardstick(ours[name].cpu(), peer[name][0], g[0], name)
