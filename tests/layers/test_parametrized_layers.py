"""Parameters of layers themselves that are parametrized or adapted: what is read, learned and consolidated is as with
the weights these amount to."""

import copy

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize
from wrapped_models import (
    BACKENDS,
    D,
    Forgetful,
    ForTheCall,
    LowRank,
    Scaled,
    Squared,
    assert_as_exact,
    assert_same,
    close,
    ids,
    learned,
    pair,
    small,
)

from hope_kernels import CMSConfig, ContinuumMemory, Decoder


def layer_parameters(model):
    """What is a parameter of a layer itself, not of a Linear."""
    for block in model.blocks:
        for name in ("conv", "norm_gain", "w2", "w1", "eta_bias", "alpha_bias"):
            yield block.mixer, name
        for level in block.cms.levels:
            yield from ((level, name) for name in ("up", "down", "norm_gain"))
        if block.cms.mix is not None:
            yield block.cms, "mix"
    yield model.embed, "weight"
    yield model.norm, "weight"


@pytest.mark.parametrize(
    "options", [{}, {"variant": "independent"}, {"optimizer": "momentum"}, {"mlp": "swiglu"}], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_parametrized_layers_read_and_learn_as_their_effective_weights(backend, options):
    wrapped, plain = small(**options), small(**options)
    torch.manual_seed(5)
    for (owner, name), (other, _) in zip(list(layer_parameters(wrapped)), list(layer_parameters(plain))):
        w = getattr(owner, name)
        parametrize.register_parametrization(owner, name, LowRank(w.shape) if w.dim() == 2 else Scaled())
        with torch.no_grad():
            getattr(other, name).copy_(getattr(owner, name))
    with torch.no_grad():
        want = plain(ids(), learn="next_token", backend=backend)
        got = wrapped(ids(), learn="next_token", backend=backend)
        assert learned(want[1])
        assert_same(got, want)
        # and on from there: steps at weights that have learned add up what the two ways round
        exact = copy.deepcopy(plain).double()
        _, state = exact(ids(), learn="next_token")
        assert_as_exact(
            *(m(ids(2), s, learn="next_token", backend=backend) for m, (_, s) in ((wrapped, got), (plain, want))),
            exact(ids(2), state, learn="next_token"),
        )
    assert wrapped.blocks[0].cms.state_bytes() == plain.blocks[0].cms.state_bytes()
    logits = wrapped(ids())[0]
    close(logits, plain(ids())[0])
    factor = wrapped.blocks[0].cms.levels[0].parametrizations.norm_gain[0].factor
    assert torch.autograd.grad(logits.square().sum(), factor)[0].abs() > 0


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_adapters_that_are_there_for_the_time_of_a_call(backend):
    wrapped, plain = small(), small()
    torch.manual_seed(5)
    for block, other in zip(wrapped.blocks, plain.blocks):
        level, target = block.cms.levels[0], other.cms.levels[0]
        adapted = ForTheCall(level, "up")
        with torch.no_grad():
            target["up"].copy_(adapted.part(level["up"]))
            target["down"].copy_((part := LowRank(level["down"].shape))(level["down"]))
        block.cms.levels[0] = ForTheCall(adapted, "down")
        block.cms.levels[0].part = part
    with torch.no_grad():
        got, want = (m(ids(), learn="next_token", backend=backend) for m in (wrapped, plain))
        assert_same(got, want)
        with pytest.raises(ValueError, match=r"levels\[0\]: up belongs to a ForTheCall"):
            wrapped.consolidate(got[1])
    by_a = torch.autograd.grad(wrapped(ids())[0].square().sum(), part.a)[0]
    assert by_a.abs().max() > 0
    assert wrapped.blocks[0].cms.state_bytes() == plain.blocks[0].cms.state_bytes()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_parametrized_cms_learns_as_a_layer(mode):
    config = CMSConfig(D, (4, 8), expansion=2.0, lr=(0.3, 0.2))
    torch.manual_seed(0)
    wrapped, plain = ContinuumMemory(config), ContinuumMemory(config)
    for l, level in enumerate(wrapped.levels):
        parametrize.register_parametrization(level, "up", Scaled())
        with torch.no_grad():
            for name, p in plain.levels[l].items():
                p.copy_(level[name])
    x, e = torch.randn(2, 8, D), torch.randn(2, 8, D)

    def read(layer):
        with mode():
            state = layer.init_state(2)
            for a in (0, 4):
                y, state = layer(x[:, a : a + 4], state)
                state = layer.refresh(state, e[:, a : a + 4])
            return layer(x[:, :4], state)[0], layer.detach_level(state, 0, 1), layer.detach_level(state, 1)

    (y, *levels), (want, *others) = read(wrapped), read(plain)
    close(y, want)
    for ours, theirs in zip(levels, others):
        for name in ours:
            close(ours[name], theirs[name])


def test_decoding_and_reading_side_by_side_take_effective_weights():
    model, tokens = pair("lora")[0], ids(T=9)
    for block in model.blocks:
        parametrize.register_parametrization(block.cms.levels[0], "up", Scaled())
    with torch.no_grad():
        want, state = model(tokens, learn="next_token")
        decoder = Decoder(model, model.init_state(2), learn="next_token")
        close(torch.cat([decoder.step(tokens[:, t : t + 1]) for t in range(9)], 1), want)
        close(model(tokens, wavefront=4)[0], model(tokens)[0])
        for a, b in zip(learned(decoder.state), learned(state), strict=True):
            close(a, b)


def consolidated(make):
    """A model that has learned, with ``make()`` on every matrix of its CMS; what it computes then, and its
    state."""
    model = small()
    for block in model.blocks:
        for level in block.cms.levels:
            for name in ("up", "down"):
                make(level, name)
    with torch.no_grad():
        _, state = model(ids(), learn="next_token")
        before = model(ids(3), state.clone())[0]
    return model, state, before


@pytest.mark.parametrize("make", [
    lambda level, name: parametrize.register_parametrization(level, name, Scaled()),
    lambda level, name: parametrizations.weight_norm(level, name),
], ids=["scaled", "weight_norm"])
def test_consolidate_writes_through_a_parametrization(make):
    model, state, before = consolidated(make)
    with torch.no_grad():
        now = model.blocks[0].cms.effective_levels(state.select([0]).cms[0])[0]["up"].dense(1)[0]
        model.consolidate(state, row=0)
        close(model.blocks[0].cms.levels[0]["up"], now)
        close(model(ids(3), state.clone())[0], before)


@pytest.mark.parametrize("kind", [Squared, Forgetful])
def test_consolidate_refuses_what_it_cannot_write_and_changes_nothing(kind):
    def make(level, name):
        if level is last:
            parametrize.register_parametrization(level, name, kind())

    model = small()
    last = model.blocks[1].cms.levels[1]
    for name in ("up", "down"):
        make(last, name)
    with torch.no_grad():
        _, state = model(ids(), learn="next_token")
        weights, tensors = copy.deepcopy(model.state_dict()), [t.clone() for t in state.tensors()]
        with pytest.raises(ValueError, match=r"levels\[1\]: up is parametrized and cannot be set"):
            model.consolidate(state, row=0)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), tensors, strict=True))
