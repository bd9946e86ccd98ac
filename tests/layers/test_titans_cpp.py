"""What surrounds the memories on the C++ backend: each function, and the layer's gradient by hand, against
PyTorch in fp64."""

import pytest
import torch
from numerics import random_layer, within_yardstick

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig
from hope_kernels.backend import BY_INPUTS, Request
from hope_kernels.ops.conv import cpp as conv_cpp
from hope_kernels.ops.conv.forward import causal_conv_chunked
from hope_kernels.ops.output_gate import cpp as gate_cpp
from hope_kernels.ops.output_gate.forward import output_gate_chunked
from hope_kernels.ops.shared import cpu_library
from hope_kernels.ops.titans.cpp import unserved
from hope_kernels.ops.unit import cpp as unit_cpp
from hope_kernels.ops.unit.forward import l2norm

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derived(f, grad, *leaves):
    leaves = [t.clone().requires_grad_() for t in leaves]
    y = f(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def compare(ours, f, grad, *leaves):
    """``ours``: y and the gradients, fp32; the peer is f in fp32, the truth f in fp64."""
    peer = derived(lambda *t: f(*t), grad.float(), *(t.float() for t in leaves))
    exact = derived(f, grad, *leaves)
    for i, (a, b, c) in enumerate(zip(ours, peer, exact, strict=True)):
        within_yardstick(a, b, c, f"result {i}")


@pytest.mark.parametrize("W", [1, 2, 4, 9])
@pytest.mark.parametrize("lengths", [[13, 13, 13], [13, 2, 0]])
def test_convolution(W, lengths):
    x, tail, weight = draw(3, 13, 24), draw(3, W - 1, 24, seed=1), draw(24, W, seed=2)
    real = torch.arange(13).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    grad = draw(3, 13, 24, seed=3) * real.unsqueeze(-1)
    counts = torch.tensor(lengths)
    poisoned = torch.where(real.unsqueeze(-1), x.float(), float("nan"))
    y, after = conv_cpp.causal_conv(poisoned, tail.float(), weight.float(), lengths)
    dx = conv_cpp.causal_conv_backward(grad.float(), weight.float())
    # past a row's length PyTorch's gradient is zero, and so is ours: no output there has one
    compare((y, dx), lambda t: causal_conv_chunked(t, tail.to(t.dtype), weight.to(t.dtype), counts)[0], grad, x)
    assert torch.equal(after, causal_conv_chunked(x.float(), tail.float(), weight.float(), counts)[1])


@pytest.mark.parametrize("D", [8, 24, 64])
def test_unit_vectors(D):
    x, grad = draw(2, 7, 3, D), draw(2, 7, 3, D, seed=1)
    compare((unit_cpp.unit(x.float()), unit_cpp.unit_backward(grad.float(), x.float())), l2norm, grad, x)
    small = 1e-9 * x  # below the lower limit of the norm
    compare((unit_cpp.unit(small.float()), unit_cpp.unit_backward(grad.float(), small.float())), l2norm, grad, small)
    zero = torch.zeros(1, D)
    assert torch.equal(unit_cpp.unit(zero), zero) and torch.allclose(
        unit_cpp.unit_backward(torch.ones(1, D), zero), torch.full((1, D), 1e6)
    )


@pytest.mark.parametrize("has_gain", [True, False])
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("D", [8, 40])
def test_output_gate(has_gain, has_gate, D):
    o, gate, gain, grad = draw(2, 5, 3, D), 3 * draw(
        2, 5, 3 * D, seed=1
    ), draw(3, D, seed=2), draw(2, 5, 3 * D, seed=3)
    gain, gates = gain if has_gain else None, [gate] if has_gate else []
    arguments = [o.float(), gain.float() if has_gain else None, gate.float() if has_gate else None]
    do, dgate = gate_cpp.output_gate_backward(grad.float(), *arguments)
    ours = (gate_cpp.output_gate(*arguments), do, *([dgate] if has_gate else []))
    assert has_gate or dgate is None
    compare(
        ours, lambda o, *gate: output_gate_chunked(o, None if gain is None else gain.to(o.dtype),
            *(gate or [None])), grad, o, *gates
    )


def test_a_token_has_the_same_bits_in_any_company_and_for_any_number_of_threads():
    """Enough tokens for several threads to start."""
    x, tail, weight = draw(2, 400, 64).float(), draw(2, 3, 64, seed=1).float(), draw(64, 4, seed=2).float()
    gain, gate, grad = draw(4, 16, seed=3).float(), draw(
        2, 400, 64, seed=4
    ).float(), draw(2, 400, 64, seed=5).float()
    heads = lambda t: t.unflatten(-1, (4, 16))

    def everything(a, b, tail):
        y, after = conv_cpp.causal_conv(x[:, a:b], tail, weight, [b - a] * 2)
        gates = gate_cpp.output_gate_backward(grad[:, a:b], heads(x[:, a:b]), gain, gate[:, a:b])
        return y, unit_cpp.unit(heads(x[:, a:b])), gate_cpp.output_gate(heads(x[:, a:b]), gain, gate[:, a:b]), *gates, after

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = everything(0, 400, tail)
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(everything(0, 400, tail), whole))
    finally:
        torch.set_num_threads(before)
    first = everything(0, 7, tail)
    second = everything(7, 400, first[-1])
    for a, b, c in zip(first[:-1], second, whole):
        assert torch.equal(torch.cat([a, b], 1), c)
    assert torch.equal(second[-1], whole[-1])


SMALL = {"d_model": 32, "num_heads": 2, "chunk_memory": 8, "chunk_other": 8}
LAYERS = {
    "default": TitansConfig(**SMALL),
    "bare": TitansConfig(**SMALL, conv_window=None, in_proj=False, out_norm=False, gate=False, out_proj=False),
    "raw queries": TitansConfig(**SMALL, qk_l2norm=False, conv_window=2, activation="gelu"),
    "no norm": TitansConfig(**SMALL, out_norm=False, in_proj=True),
    "no gate": TitansConfig(**SMALL, gate=False, conv_window=6),
    "static": TitansConfig.preset("titans", **SMALL, momentum=None),
}


@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("lengths", [[20, 20], [20, 9]])
@pytest.mark.parametrize("update", [True, False])
def test_the_gradient_of_a_layer_by_hand(config, lengths, update):
    """By x, from the middle of a chunk on; the graph of the chunked backend in fp64 is the truth."""
    layer = random_layer(config)
    x, grad = draw(2, 33, 32), draw(2, 20, 32, seed=1)

    def scanned(dtype, backend):
        layer.to(dtype)
        with torch.no_grad():
            _, state = layer.scan(x[:, :13].to(dtype), layer.init_state(2), [13, 13], backend=backend)
            still, _ = layer.scan(x[:, 13:].to(dtype), state, lengths, backend=backend, update=update)
        leaf = x[:, 13:].to(dtype, copy=True)
        leaf[1, lengths[1] :] = float("nan")
        leaf.requires_grad_()
        y, new = layer.scan(leaf, state, lengths, backend=backend, constant_memory=True, update=update)
        assert y.requires_grad and not any(t.requires_grad for t in new.tensors())
        assert torch.equal(y, still) or backend != "cpp"
        return y.detach(), torch.autograd.grad(y, leaf, grad.to(dtype))[0]

    exact, ours, peer = scanned(
        torch.float64, "chunked"
    ), scanned(torch.float32, "cpp"), scanned(torch.float32, "chunked")
    for name, a, b, c in zip(("y", "dx"), ours, peer, exact):
        within_yardstick(a, b, c, name)
    assert not ours[1][1, lengths[1] :].any()


def small_model() -> HopeForCausalLM:
    return HopeForCausalLM(HopeConfig(32, 16, 2, num_heads=2, cms=CMSConfig(16, (4, 8), expansion=2.0))).eval()


def test_the_library_is_never_handed_another_dtype():
    one, config, ids = small_model(), TitansConfig(16, num_heads=2), torch.randint(0, 32, (2, 60))
    with torch.no_grad():
        want, state = one(ids)
        for dtype in (torch.bfloat16, torch.float64):
            with pytest.raises(ValueError, match="has dtype"):
                one(ids, state.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in unserved(Request(config, torch.float32, torch.device("cpu"), BY_INPUTS))
            assert torch.equal(one(ids, backend="cpp")[0], want)  # a model computes in the dtype of its weights
            x = torch.randn(1, 4, 16)
            with pytest.raises(ValueError, match="autocast"):
                one.blocks[0].mixer.scan(x, one.blocks[0].mixer.init_state(1), [4], backend="cpp")


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("learn", ["off", "next_token"])
def test_nothing_to_read(shape, learn):
    one = small_model()
    with torch.no_grad():
        logits, state = one(torch.zeros(shape, dtype=torch.long), learn=learn)
    assert logits.shape == (*shape, 32) and state.pos == [0] * shape[0]
