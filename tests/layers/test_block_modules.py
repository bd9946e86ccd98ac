"""A block, its mixer, its CMS and the levels are modules whose calls do their work: hooks, parametrizations
and wrappers see it."""

import copy
import functools

import pytest
import torch
from numerics import relative
from small_model import ids, tiny
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from hope_kernels import CMSConfig, ContinuumMemory, Decoder, HopeForCausalLM, SelfModifyingTitans, TitansConfig
from hope_kernels.layers.attention import CausalAttention
from hope_kernels.layers.block import HopeAttentionBlock, HopeBlock
from hope_kernels.layers.zero_gradient import with_zero_gradient

MIXERS = ("self_modifying", "titans", "attention")
BLOCKS = (HopeBlock, HopeAttentionBlock)


def parts(model: HopeForCausalLM) -> dict[str, nn.Module]:
    """Everything in a block that has a call of its own."""
    found = {}
    for i, block in enumerate(model.blocks):
        found |= {f"{i}": block, f"{i}.norm": block.norm, f"{i}.mixer": block.mixer, f"{i}.cms": block.cms}
        found |= {f"{i}.cms.{l}": level for l, level in enumerate(block.cms.levels)}
    return found


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("grad", [False, True])
def test_hooks_fire_once_per_reading(mixer, grad):
    model = tiny(mixer)  # segments of 4 tokens
    before, after = ({name: 0 for name in parts(model)} for _ in range(2))
    for name, module in parts(model).items():
        module.register_forward_pre_hook(lambda *_, name=name: before.__setitem__(name, before[name] + 1))
        module.register_forward_hook(lambda *_, name=name: after.__setitem__(name, after[name] + 1))

    def readings(call) -> set[int]:
        for count in (before, after):
            count.update(dict.fromkeys(count, 0))
        with torch.set_grad_enabled(grad):
            result = call()
        assert before == after
        assert len(set(after.values())) == 1, after
        return result, after["0"]

    (_, state), count = readings(lambda: model(ids(2, 11)))
    assert count == 1
    _, count = readings(lambda: model(ids(2, 1), state))
    assert count == 1
    if not grad:
        # two whole segments, learned as they are read, and what is left
        _, count = readings(lambda: model(ids(2, 11), learn="next_token"))
        assert count == 3
        if mixer != "attention":
            decoder = Decoder(model, model.init_state(2), "next_token")
            for _ in range(4):
                assert readings(lambda: decoder.step(ids(2, 1)))[1] == 1
            # the segment that has ended is read again to be learned
            assert readings(lambda: decoder.step(ids(2, 1)))[1] == 2


def halved(model: HopeForCausalLM, **where) -> HopeForCausalLM:
    """A copy in which a parameter of every block is half as large."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in other.blocks:
            where["of"](block).mul_(0.5)
    return other


def same(ours: HopeForCausalLM, wanted: HopeForCausalLM) -> None:
    """Equal logits, off and learning, in one call and in several; equal gradients of the parameters that both
    have."""
    tokens = ids(2, 30)
    for learn in ("off", "next_token"):
        results = []
        for model in (ours, wanted):
            with torch.no_grad():
                whole, _ = model(tokens, learn=learn)
                first, state = model(tokens[:, :13], learn=learn)
                single = [model(tokens[:, t : t + 1], state, learn=learn)[0] for t in range(13, 30)]
                results.append((whole, torch.cat([first, *single], 1)))
        for a, b in zip(*results):
            assert relative(a, b) < 1e-12
    grads = []
    for model in (ours, wanted):
        model.zero_grad()
        model(tokens)[0].square().mean().backward()
        grads.append((model.embed.weight.grad, model.blocks[0].norm.weight.grad))
    assert all(relative(a, b) < 1e-12 for a, b in zip(*grads))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_hook_may_change_what_a_mixer_gives(mixer):
    model = tiny(mixer)
    wanted = halved(model, of=lambda b: b.mixer.o_proj.weight if mixer == "attention" else b.mixer.out_proj.weight)
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda _, args, out: (0.5 * out[0], out[1]))
    same(model, wanted)


@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_a_hook_may_change_what_a_level_gives(variant):
    """The gradient that level 1 learns from goes through the hook of level 2."""
    model = tiny(cms=CMSConfig(8, (4, 8), variant=variant, lr=(0.05, 0.0), expansion=2.0))
    wanted = halved(model, of=lambda b: b.cms.levels[1]["down"])

    def half(_, args, y):
        return 0.5 * y if variant == "independent" else args[0] + 0.5 * (y - args[0])

    for block in model.blocks:
        block.cms.levels[1].register_forward_hook(half)
    same(model, wanted)


class Half(nn.Module):
    def forward(self, w):
        return 0.5 * w


@pytest.mark.parametrize("name", ["up", "down", "norm_gain"])
def test_parametrized_levels(name):
    model = tiny()
    wanted = halved(model, of=lambda b: b.cms.levels[0][name])
    for block in model.blocks:
        parametrize.register_parametrization(block.cms.levels[0], name, Half())
    same(model, wanted)


def test_names_of_parameters_stay():
    cms = ContinuumMemory(CMSConfig(8, (4, 8), variant="independent", mlp="swiglu", norm="layernorm", bias=True))
    of_level = ("norm_gain", "up", "down", "norm_bias", "gate", "up_bias", "gate_bias", "down_bias")
    assert set(cms.state_dict()) == {"mix", *(f"levels.{l}.{n}" for l in range(2) for n in of_level)}


def wrapped(model: HopeForCausalLM, impl) -> HopeForCausalLM:
    model = copy.deepcopy(model)
    wrap = functools.partial(wrappers.checkpoint_wrapper, checkpoint_impl=impl)
    wrappers.apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrap, check_fn=lambda m: isinstance(m, BLOCKS)
    )
    return model


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("learn", ["off", "next_token"])
def test_checkpointed_blocks_have_the_same_gradients(mixer, learn):
    """Over two calls, between whose forward and backward the state they leave is advanced in place."""
    plain = tiny(mixer)
    model, readings = wrapped(plain, wrappers.CheckpointImpl.NO_REENTRANT), []
    model.blocks[0].register_forward_hook(lambda *_: readings.append("wrapper"))
    model.blocks[0].mixer.register_forward_hook(lambda *_: readings.append("mixer"))
    results = []
    for net in (plain, model):
        y, state = net(ids(2, 9), learn=learn)
        z, state = net(ids(2, 14, 1), state, learn=learn)
        loss = y.square().sum() + z.square().sum()
        if net is model:
            with torch.no_grad():
                net(ids(2, 9, 2), state.detach().clone() if mixer == "attention" else state, learn=learn)
            assert readings.count("mixer") == readings.count("wrapper")
        loss.backward()
        results.append([y, z, *(p.grad for p in net.parameters())])
    assert readings.count("mixer") > readings.count("wrapper")  # they were read again
    assert all(torch.equal(a, b) for a, b in zip(*results))


LAYERS = {
    "titans": lambda: SelfModifyingTitans(TitansConfig(8, 2, chunk_memory=4, chunk_other=2), dtype=torch.float64),
    "attention": lambda: CausalAttention(tiny("attention").config, dtype=torch.float64),
    "cms": lambda: ContinuumMemory(CMSConfig(8, (16, 32), lr=0.1), dtype=torch.float64),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_given_state_under_reentrant_checkpointing_is_refused(layer):
    torch.manual_seed(0)
    layer, x = layer(), torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    wanted = torch.autograd.grad(y.square().sum(), x)[0]
    # from nothing it is a pure function
    checkpoint(lambda x: layer(x)[0], x, use_reentrant=True).square().sum().backward()
    assert relative(x.grad, wanted) < 1e-12
    with torch.no_grad():
        _, state = layer(x[:, :5])
        before = state.clone()
    refresh = getattr(layer, "refresh", layer)
    for call in (
        lambda x: layer(x, state)[0], lambda x: refresh(*((state, x) if refresh is not layer else (x, state)))
    ):
        with pytest.raises(ValueError, match="use_reentrant=False"):
            checkpoint(call, x, use_reentrant=True)
    assert state.pos == before.pos and all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors()))
    fine = checkpoint(lambda x: layer(x, state)[0], x, use_reentrant=False)
    direct = layer(x, before)[0]
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (fine, direct)))
    assert state.pos == before.pos


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_under_reentrant_checkpointing(mixer):
    model, tokens = tiny(mixer), ids(2, 9)
    with torch.no_grad():
        _, state = model(ids(2, 5))
    dummy = torch.zeros((), requires_grad=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        checkpoint(lambda _: model(tokens, state)[0], dummy, use_reentrant=True)
    assert list(state.pos) == [5, 5]
    wanted = torch.autograd.grad(model(tokens)[0].square().sum(), list(model.parameters()))
    model.zero_grad()
    checkpoint(lambda _: model(tokens)[0], dummy, use_reentrant=True).square().sum().backward()
    assert all(relative(p.grad, g) < 1e-12 for p, g in zip(model.parameters(), wanted))
    reentrant = wrapped(model, wrappers.CheckpointImpl.REENTRANT)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        reentrant(tokens)
    with torch.no_grad(), pytest.raises(ValueError, match="use_reentrant=False"):
        reentrant(tokens, learn="next_token")


VARIANTS = {
    "default": {}, "titans": {"preset": "titans"}, "adaptive": {"adaptive_q": True, "momentum": "learned"},
    "linear": {"memory": "linear"},
    "package": {"preset": "nested_learning", "chunk_memory": 4, "chunk_other": 4}, "paper": {"preset": "paper"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("tokens, start", [(1, 0), (3, 0), (4, 0), (5, 0), (3, 2), (0, 0)])
def test_every_parameter_has_a_gradient(variant, tokens, start):
    """Inside one chunk some have no part in y: their gradient is zero, not absent."""
    torch.manual_seed(0)
    options = {"d_model": 8, "num_heads": 2, "chunk_memory": 4, "chunk_other": 4, **variant}
    layer = SelfModifyingTitans(
        TitansConfig.preset(options.pop("preset", "default"), **options), dtype=torch.float64
    )
    with torch.no_grad():
        x = torch.randn(2, start + tokens, 8, dtype=torch.float64)
        _, state = layer(x[:, :start])
    y, _ = layer(x[:, start:], state)
    y.square().sum().backward()
    assert [n for n, p in layer.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:, start:], state)[0], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_of_a_model_has_a_gradient(mixer):
    model = tiny(mixer, layers=1)
    with torch.no_grad():
        _, learned = model(ids(2, 17), learn="next_token")
    assert all(all(own) for own in learned.cms[0].own)  # no row shares a level any more
    for tokens, state, lengths in ((2, None, None), (2, learned, None), (2, None, [0, 0])):
        model.zero_grad()
        logits, _ = model(ids(2, tokens), state, lengths)
        logits.square().sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_zero_gradient_reads_no_value():
    y = torch.tensor([-0.0, 0.0, 1.5, float("inf")], requires_grad=True)
    bad = torch.full((3,), float("nan"), requires_grad=True)
    z = with_zero_gradient(y, [bad])
    assert torch.equal(z, y) and torch.equal(torch.signbit(z), torch.signbit(y))
    by_y, by_bad = torch.autograd.grad(z[:3].sum(), (y, bad))
    assert torch.equal(by_y, torch.tensor([1.0, 1.0, 1.0, 0.0])) and torch.equal(by_bad, torch.zeros(3))


def test_the_preset_recall_asks_with_what_it_reads():
    """At first: W_q is the identity, and no memory of alpha or in-projection stands in between."""
    layer = SelfModifyingTitans(TitansConfig.preset("recall", d_model=8))
    assert torch.equal(layer.q_proj.weight, torch.eye(8)) and layer.alpha_bias is None and layer.conv.shape == (8, 2)
    assert layer.eta_bias.item() == -2.0 and layer.config.eta_scale == 2.0
    layer.q_proj.weight.data.zero_()
    layer.reset_parameters()
    assert torch.equal(layer.q_proj.weight, torch.eye(8))
    assert not torch.equal(SelfModifyingTitans(TitansConfig(8)).q_proj.weight, torch.eye(8))
