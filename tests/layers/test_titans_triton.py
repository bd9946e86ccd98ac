"""A whole layer on the Triton kernels, interpreted: convolution, memories and output gate together against
their PyTorch forms."""

import pytest
import torch

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, SelfModifyingTitans, TitansConfig, available_backends
from hope_kernels.backend import BY_ALL, Request
from hope_kernels.layers.titans import surroundings
from hope_kernels.ops.cms import level as cms_chunked
from hope_kernels.ops.cms.backends import resolve as resolve_cms
from hope_kernels.ops.conv.forward import causal_conv_chunked
from hope_kernels.ops.output_gate.forward import output_gate_chunked
from hope_kernels.ops.unit.forward import l2norm

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"triton: {available_backends()['triton']}"
)
from hope_kernels.ops.cms.triton import operator as cms_triton  # noqa: E402
from hope_kernels.ops.conv.triton.forward import causal_conv_triton  # noqa: E402
from hope_kernels.ops.output_gate.triton.forward import output_gate_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(**options):
    torch.manual_seed(0)
    layer = SelfModifyingTitans(TitansConfig(**{"d_model": 32, **options})).to(DEVICE)
    return layer, torch.randn(2, 18, 32, device=DEVICE)


def test_one_choice_picks_all():
    config, cms, at = TitansConfig(64), CMSConfig(64, (4,)), (torch.float32, torch.device(DEVICE))
    with torch.no_grad():
        assert resolve_cms(cms, *at, "triton") is resolve_cms(cms, *at, "cuda") is cms_triton
        assert resolve_cms(cms, torch.float64, at[1], "triton") is cms_chunked
        assert cms_triton not in (resolve_cms(cms, *at, b) for b in (None, "chunked", "cpp", "reference"))
    assert resolve_cms(cms, *at, "triton") is cms_chunked and resolve_cms(
        cms, *at, "triton", inner=True
    ) is cms_triton
    request = Request(config, *at, BY_ALL)
    assert surroundings(request, "triton") == (causal_conv_triton, l2norm, output_gate_triton)
    for backend in ("chunked", "reference"):
        assert surroundings(request, backend) == (causal_conv_chunked, l2norm, output_gate_chunked)
    wide = request._replace(config=TitansConfig(64, conv_window=9))
    assert surroundings(wide, "triton") == (causal_conv_chunked, l2norm, output_gate_triton)


@pytest.mark.parametrize("options", [
    {}, {"out_norm": False, "conv_window": 1}, {"gate": False},
    {"out_norm": False, "gate": False, "out_proj": False, "conv_window": None},
])
def test_the_layer_equals_itself_with_the_pytorch_forms(options, monkeypatch):
    layer, x = made(**options)
    x = x[:, :7]
    with torch.no_grad():
        y, state = layer(x, lengths=[7, 0], backend="triton")
        second, state = layer(x[:, :3], state, backend="triton")
        pytorch = (causal_conv_chunked, l2norm, output_gate_chunked)
        monkeypatch.setattr("hope_kernels.layers.titans.surroundings", lambda request, backend: pytorch)
        want, want_state = layer(x, lengths=[7, 0], backend="triton")
        want_second, want_state = layer(x[:, :3], want_state, backend="triton")
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second, want_second, rtol=1e-5, atol=1e-6)
    if layer.conv is not None:
        assert torch.equal(state.conv_tail, want_state.conv_tail)
    assert list(state.pos) == list(want_state.pos) == [10, 3]


def test_padding_stays_out():
    layer, x = made()
    with torch.no_grad():
        want, state = layer(x, lengths=[17, 0], backend="triton")
        x[0, 17:], x[1] = float("nan"), float("inf")
        y, after = layer(x, lengths=[17, 0], backend="triton")
    assert torch.equal(y, want) and not y[0, 17:].any() and not y[1].any()
    assert all(
        torch.equal(getattr(after, n), getattr(state, n)) for n in ("conv_tail", "delta2", "delta1", "pending_k")
    )


def test_gradients_reach_every_parameter_and_padding_none(monkeypatch):
    layer, x = made()
    state = layer.init_state(2)
    state.conv_tail = torch.randn_like(state.conv_tail).requires_grad_()
    into = torch.randn_like(x)
    parameters = {n: p for n, p in layer.named_parameters()}

    def gradients(pair, x):
        monkeypatch.setattr("hope_kernels.layers.titans.surroundings", lambda request, backend: pair)
        x = x.clone().requires_grad_()
        y, new = layer.scan(x, state, [18, 5], backend="chunked")
        found = torch.autograd.grad(
            (y * into).sum() + new.conv_tail.square().sum(), [x, state.conv_tail, *parameters.values()]
        )
        return dict(zip(("x", "conv_tail", *parameters), found))

    want = gradients((causal_conv_chunked, l2norm, output_gate_chunked), x)
    x[1, 5:] = float("nan")
    ours = gradients((causal_conv_triton, l2norm, output_gate_triton), x)
    for name, t in ours.items():
        torch.testing.assert_close(
            t, want[name], rtol=1e-4, atol=1e-5 * float(want[name].abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not ours["x"][1, 5:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("first", [15, 16])  # captured at a token that fills a chunk, and at one that does not
def test_a_captured_decode_step_of_a_layer_goes_on_over_boundaries(first):
    layer, _ = made()
    x = torch.randn(2, 70, 32, device=DEVICE)
    with torch.no_grad():
        _, eager = layer(x[:, :first], backend="triton")
        state, warm, token = eager.clone(), eager.clone(), x[:, :1].clone()
        layer(token, warm, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = layer(token, state, backend="triton")
        for t in range(first, 70):
            want, eager = layer(x[:, t : t + 1], eager, backend="triton")
            token.copy_(x[:, t : t + 1])
            graph.replay()
            assert torch.equal(y, want), t
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), eager.tensors()))
    assert list(state.synchronize().pos) == [70, 70]


@pytest.mark.parametrize("options", [
    {}, pytest.param({"d_model": 64, "num_heads": 2, "chunk_other": 32, "activation": "silu"},
        marks=pytest.mark.slow),
    {"momentum": "learned", "adaptive_q": True},
    {"self_modifying": False, "own_values": False, "target_norm": False, "gate": False},
])
def test_trains_with_the_gradients_of_the_chunked_backend(options):
    layer, _ = made(**options)
    x = torch.randn(2, 21, layer.config.d_model, device=DEVICE)
    grads = {}
    for backend in ("triton", "chunked"):
        given = x.clone().requires_grad_()
        y, state = layer(given, lengths=[21, 13], backend=backend)
        z, state = layer(given[:, :5], state, backend=backend)
        loss = (
            y * torch.sin(torch.arange(y.numel(), device=DEVICE)).view_as(y)
        ).sum() + z.square().sum() + state.delta2.square().sum()
        grads[backend] = dict(zip(("x", *(n for n, _ in layer.named_parameters())),
                                  torch.autograd.grad(loss, [given, *layer.parameters()])))
    for name, g in grads["chunked"].items():
        tolerance = {"rtol": 2e-4, "atol": 2e-5 * float(g.abs().max() + 1)}
        torch.testing.assert_close(grads["triton"][name], g, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_learns_while_it_reads():
    torch.manual_seed(0)
    config = HopeConfig(50, 32, 2, titans=TitansConfig(32), cms=CMSConfig(32, chunks=(8, 16), lr=0.02))
    model = HopeForCausalLM(config).to(DEVICE).eval()
    ids = torch.randint(0, 50, (2, 20), device=DEVICE)
    with torch.no_grad():
        (ours, state), (want, other) = (
            model(ids, lengths=[20, 11], learn="next_token", backend=b) for b in ("triton", "chunked")
        )
        off, _ = model(ids, lengths=[20, 11], backend="chunked")
    torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-4)
    assert (ours - off).abs().max() > 10 * (ours - want).abs().max()  # it did learn
    for mine, theirs in zip(state.cms[1].tensors(), other.cms[1].tensors()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "optimizer, mlp", [("gd", "gelu"), pytest.param("momentum", "swiglu", marks=pytest.mark.slow)]
)
def test_a_model_learns_as_on_the_chunked_backend(optimizer, mlp):
    """In one call, and in two that meet inside a segment, ragged."""
    torch.manual_seed(0)
    cms = CMSConfig(32, (4, 8), optimizer=optimizer, mlp=mlp, expansion=2.0, lr=0.02)
    titans = TitansConfig(32, chunk_memory=16, chunk_other=16)
    model = HopeForCausalLM(HopeConfig(16, 32, 1, titans=titans, cms=cms)).to(DEVICE)
    ids, lengths = torch.randint(0, 16, (2, 10), device=DEVICE), [10, 5]
    with torch.no_grad():
        want, _ = model(ids, lengths=lengths, learn="next_token", backend="chunked")
        whole, state = model(ids, lengths=lengths, learn="next_token", backend="triton")
        frozen, _ = model(ids, lengths=lengths, backend="triton")
        parts, other = [], model.init_state(2)
        for piece, n in ((ids[:, :6], [6, 3]), (torch.stack([ids[0, 6:], ids[1, 3:7]]), [4, 2])):
            logits, other = model(piece, other, lengths=n, learn="next_token", backend="triton")
            parts.append(logits)
    torch.testing.assert_close(whole, want, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(torch.cat(parts, 1)[0], whole[0], rtol=2e-4, atol=2e-5)
    assert (whole - frozen).abs().max() > 1e-3
    for a, b in zip(state.cms[0].tensors(), other.cms[0].tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
