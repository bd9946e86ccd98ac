"""torch.compile of a model: the values of eager mode, and as many graphs as
``hope_kernels/engine/compiling.py`` says.

The graphs are traced and run by PyTorch as they are (backend "eager"); one slow test compiles them in earnest.
"""

import pytest
import torch
import torch.nn.functional as F
from numerics import relative
from torch._dynamo.testing import CompileCounterWithBackend

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, SelfModifyingTitans, TitansConfig
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
V, SEGMENT = 32, 4


def build(mixer: str = "self_modifying", layers: int = 1) -> HopeForCausalLM:
    """Chunks and segments of 4 tokens: a boundary of both at every fourth."""
    torch.manual_seed(0)
    options = (
        {"num_heads": 2} if mixer == "attention" else {"titans": TitansConfig(8, 1, chunk_memory=4, chunk_other=4)}
    )
    cms = CMSConfig(8, (SEGMENT, 8), lr=0.05, expansion=2.0)
    return HopeForCausalLM(HopeConfig(V, 8, layers, mixer=mixer, cms=cms, **options)).eval()


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(0, V, (2, tokens), generator=torch.Generator().manual_seed(tokens))


def compiled(model):
    torch._dynamo.reset()
    count = CompileCounterWithBackend("eager")
    return torch.compile(model, backend=count), count


def stream(model, form, edges, count=None, **options) -> list[int]:
    """Reads pieces with the model and with its compiled ``form``, both with states of their own; graphs so
    far after each piece."""
    tokens, ours, wanted, graphs = ids(edges[-1]), None, None, []
    for a, b in zip(edges, edges[1:]):
        y, ours = form(tokens[:, a:b], ours, **options)
        z, wanted = model(tokens[:, a:b], wanted, **options)
        assert relative(y, z) < 1e-6 and ours.pos == wanted.pos == [b, b]
        assert all(torch.allclose(s, t, rtol=1e-5, atol=1e-6) for s, t in zip(ours.tensors(), wanted.tensors()))
        if torch.is_grad_enabled():
            ours, wanted = ours.detach(), wanted.detach()
        if count is not None:
            graphs.append(count.frame_count)
    return graphs


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_one_graph_from_nothing_and_one_for_all_boundaries(grad):
    """Three in all: from nothing, from the first boundary, and, once positions have been seen to differ, from
    any other."""
    model = build()
    form, count = compiled(model)
    with torch.set_grad_enabled(grad):
        assert stream(model, form, range(0, 7 * SEGMENT, SEGMENT), count, backend="chunked") == [1, 2, 3, 3, 3, 3]


@pytest.mark.slow
def test_calls_inside_a_chunk_are_not_traced():
    """Token by token: PyTorch's own kernels from nothing and from boundaries, one graph each, and no
    compilation for any other position."""
    model = build()
    form, count = compiled(model)
    with torch.no_grad():
        graphs = stream(model, form, range(6 * SEGMENT), count, backend="chunked")
    assert graphs[0] == 1 and graphs[-1] <= 5 and len(set(graphs[2 * SEGMENT + 1 :])) == 1


@pytest.mark.parametrize("edges", [range(0, 14), (0, 5, 10, 15, 20)], ids=["one", "five"])
@pytest.mark.parametrize(
    "backend, learn", [("cpp", "off"), ("cpp", "next_token"), ("chunked", "next_token"), ("reference", "off")]
)
def test_what_is_not_traced_compiles_nothing(backend, learn, edges):
    if backend == "cpp" and cpu_library.unavailable():
        pytest.skip(cpu_library.unavailable())
    model = build()
    form, count = compiled(model)
    with torch.no_grad():
        assert set(stream(model, form, edges, count, backend=backend, learn=learn)) == {0}


def test_attention_is_traced_from_nothing():
    model = build("attention")
    form, count = compiled(model)
    graphs = stream(model, form, (0, 5, 6, 7, 8), count)
    assert graphs == [1, 1, 1, 1]


@pytest.mark.parametrize("tokens", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_training_step(tokens):
    """Loss and backward under the compiler: one graph, however many steps. The steps are small: large ones make the
    difference of those before ten times as large, and eager training is C++ with roundings of its own."""
    model, twin = build(), build()

    def loss_of(net, text):
        return F.cross_entropy(net(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten())

    form, count = compiled(loss_of)
    pair = [torch.optim.SGD(net.parameters(), lr=0.02) for net in (model, twin)]
    for _ in range(3):
        text = ids(tokens + 1)
        losses = form(model, text), loss_of(twin, text)
        for loss, optimizer in zip(losses, pair):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert count.frame_count == 1
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_in_fp32_has_the_gradients_of_eager_training():
    model, twin, text = build(), build(), ids(10)

    def loss_of(net):
        return F.cross_entropy(net(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten())

    form, _ = compiled(loss_of)
    for net, f in ((model, form), (twin, loss_of)):
        f(net).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_wrong_ids_and_states_are_refused_as_in_eager_mode():
    model = build()
    form, _ = compiled(model)
    with torch.no_grad():
        _, state = form(ids(5), learn="next_token")
        with pytest.raises(ValueError, match="token 32, expected 0 to 31"):
            form(torch.full((2, 1), V), state, learn="next_token")
    assert list(state.pos) == [5, 5]


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_layer_on_the_compiled_backend(tokens):
    if cpu_library.unavailable():
        pytest.skip(cpu_library.unavailable())
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(
        TitansConfig(16, 2, chunk_memory=4, chunk_other=4)
    ), torch.randn(2, 6 * tokens, 16)
    form, _ = compiled(layer)
    ours = wanted = None
    with torch.no_grad():
        for a in range(0, 6 * tokens, tokens):
            y, ours = form(x[:, a : a + tokens], ours, backend="cpp")
            z, wanted = layer(x[:, a : a + tokens], wanted, backend="cpp")
            assert torch.equal(y, z)
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), wanted.tensors()))


@pytest.mark.slow
def test_inductor():
    model = build()
    torch._dynamo.reset()
    form = torch.compile(model)
    stream(model, form, (0, 4, 8, 9, 12), backend="chunked")
    text = ids(9)
    ours, wanted = (
        torch.autograd.grad(net(text)[0].square().mean(), list(model.parameters())) for net in (form, model)
    )
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, wanted))
