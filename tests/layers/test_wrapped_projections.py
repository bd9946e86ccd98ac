"""Projections that are adapted, hooked, parametrized or exchanged: the function is that of the same model with merged,
plain weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from wrapped_models import BACKENDS, LINEARS, D, LowRank, assert_same, close, ids, learned, pair, projections, small

from hope_kernels import SelfModifyingTitans, TitansConfig
from hope_kernels.layers.wrapped import is_plain
from hope_kernels.ops.shared import cpu_library


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LINEARS)
def test_wrapped_projections_read_and_learn_as_merged_weights(kind, backend):
    wrapped, plain = pair(kind)
    assert not any(
        is_plain(m) for _, _, m in projections(wrapped)
    ) and all(is_plain(m) for _, _, m in projections(plain))
    with torch.no_grad():
        still = plain(ids(), backend=backend)[0]
        close(wrapped(ids(), backend=backend)[0], still)
        want = plain(ids(), learn="next_token", backend=backend)
        assert float((want[0] - still).abs().max()) > 1e-3 and learned(want[1])
        assert_same(wrapped(ids(), learn="next_token", backend=backend), want)


@pytest.mark.parametrize("kind", LINEARS)
def test_wrapped_attention_reads_and_learns_as_merged_weights(kind):
    wrapped, plain = pair(kind, mixer="attention")
    with torch.no_grad():
        assert_same(wrapped(ids(), learn="next_token"), plain(ids(), learn="next_token"))
    layer, other = wrapped.blocks[0].mixer, plain.blocks[0].mixer
    x = torch.randn(2, 5, D)
    close(layer(x)[0], other(x)[0])
    assert layer.init_state(2).k.dtype == torch.float32


@pytest.mark.parametrize("learn", ["off", "next_token"])
@pytest.mark.parametrize("kind", LINEARS)
def test_training_through_wrapped_projections_has_the_gradient_of_merged_weights(kind, learn):
    wrapped, plain = pair(kind)

    def gradient(model):
        logits, _ = model(ids(), learn=learn)
        return torch.autograd.grad(logits.square().sum(), [model.embed.weight, model.blocks[0].norm.weight])

    for a, b in zip(gradient(wrapped), gradient(plain)):
        close(a, b)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", LINEARS)
def test_the_gradient_of_reads_passes_through_wrapped_projections(kind, static):
    """Of one layer on the C++ backend, against the graph of merged weights on the chunked one."""
    if cpu_library.unavailable() is not None:
        pytest.skip("cpp not built")
    config = TitansConfig.preset("titans", d_model=D, num_heads=2, momentum=None) if static else TitansConfig(D, 2)
    torch.manual_seed(0)
    plain = SelfModifyingTitans(config)
    wrapped = copy.deepcopy(plain)
    for name, m in list(wrapped.named_children()):
        wrapper = LINEARS[kind](m)
        setattr(wrapped, name, wrapper)
        with torch.no_grad():
            getattr(plain, name).weight.copy_(wrapper(torch.eye(D)).mT)
    x, grad = torch.randn(2, 9, D), torch.randn(2, 9, D)

    def scanned(layer, backend):
        leaf = x.clone().requires_grad_()
        y, new = layer.scan(leaf, layer.init_state(2), [9, 9], backend=backend, constant_memory=True)
        assert not any(t.requires_grad for t in new.tensors())
        return y.detach(), torch.autograd.grad(y, leaf, grad)[0]

    want = scanned(plain, "chunked")
    for ours in (scanned(wrapped, "cpp"), scanned(plain, "cpp"), scanned(wrapped, "chunked")):
        for a, b in zip(ours, want):
            close(a, b)


def test_a_projection_with_a_bias_takes_the_place_of_one_without():
    model = small()
    for owner, name, m in projections(model):
        other = nn.Linear(m.in_features, m.out_features, bias=True)
        setattr(owner, name, other)
        assert not is_plain(other)
    with torch.no_grad():
        assert_same(model(ids(), learn="next_token"), model(ids(), learn="next_token", backend="chunked"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_hooks_of_projections_fire_while_learning(backend):
    model, seen = small(), []
    handle = model.blocks[1].mixer.out_proj.register_full_backward_hook(
        lambda m, by_input, by_output: seen.append(by_output[0])
    )
    with torch.no_grad():
        model(ids(T=9), learn="next_token", backend=backend)
        assert len(seen) == 2 and seen[0].shape == (2, 4, D) and seen[0].abs().max() > 0
        handle.remove()
        model(ids(T=9), learn="next_token", backend=backend)
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["lora", "parametrized"])
def test_wrapped_models_learn_in_inference_mode(kind):
    wrapped, plain = pair(kind)
    for block, other in zip(wrapped.blocks, plain.blocks):
        parametrize.register_parametrization(block.cms.levels[0], "up", LowRank(block.cms.levels[0]["up"].shape))
        with torch.no_grad():
            other.cms.levels[0]["up"].copy_(block.cms.levels[0]["up"])
    with torch.inference_mode():
        states = [m.init_state(2) for m in (wrapped, plain)]
        for part in ids().split(6, 1):
            assert_same(*(m(part, s, learn="next_token") for m, s in zip((wrapped, plain), states)))


@pytest.mark.skipif(cpu_library.unavailable() is not None, reason="cpp not built")
def test_hooks_for_all_modules_are_seen():
    model, seen = small(), []
    with torch.no_grad():
        want = model(ids(T=9), learn="next_token", backend="chunked")
    handle = nn.modules.module.register_module_full_backward_hook(lambda m, by_input, by_output: seen.append(m))
    try:
        with torch.no_grad():
            assert_same(model(ids(T=9), learn="next_token", backend="cpp"), want)
    finally:
        handle.remove()
    assert model.blocks[1].mixer.out_proj in seen and model.blocks[1].mixer.q_proj in seen
