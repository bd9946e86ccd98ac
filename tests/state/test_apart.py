"""States in one process: what advances one leaves the others as they are, and a cast state computes with what
it says it holds."""

import pytest
import torch
from numerics import relative

from hope_kernels import (
    CMSConfig,
    ContinuumMemory,
    HopeConfig,
    HopeForCausalLM,
    SelfModifyingTitans,
    TitansConfig,
    load_state,
)

V = 32
IDS = torch.randint(0, V, (2, 60), generator=torch.Generator().manual_seed(1))


def model(mixer="self_modifying", dtype=torch.float64) -> HopeForCausalLM:
    torch.manual_seed(0)
    cms = CMSConfig(16, (4, 8), expansion=2.0, lr=0.05, optimizer="momentum")
    return HopeForCausalLM(HopeConfig(V, 16, 2, mixer=mixer, num_heads=2, cms=cms), dtype=dtype).eval()


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
@pytest.mark.parametrize("learn, tokens", [("off", 1), ("next_token", 3), ("off", 20)])
@pytest.mark.parametrize("read", [0, 19])
def test_a_state_given_in_grad_mode_outlives_what_the_call_returned(mixer, learn, tokens, read):
    one = model(mixer)
    with torch.no_grad():
        _, given = one(IDS[:, :read], one.init_state(2), learn="next_token")
        untouched = given.clone()
    _, returned = one(IDS[:, read : read + tokens], given, learn=learn)
    with torch.no_grad():
        one(IDS[:, 30:], returned, learn="next_token")
        a, _ = one(IDS[:, read:], given, learn="next_token")
        b, _ = one(IDS[:, read:], untouched, learn="next_token")
    assert torch.equal(a, b)


def test_a_layer_given_a_state_in_grad_mode():
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(TitansConfig(16, num_heads=2)), torch.randn(1, 40, 16)
    with torch.no_grad():
        _, given = layer(x)
        before = [t.clone() for t in given.tensors()]
    _, returned = layer(x[:, :1], given)
    with torch.no_grad():
        layer(x, returned)
    assert all(torch.equal(a, b) for a, b in zip(before, given.tensors(), strict=True))


@pytest.mark.parametrize("mixer", ["self_modifying", "titans", "attention"])
def test_a_state_from_inference_mode_carries_a_graph_on(mixer):
    one = model(mixer)
    with torch.inference_mode():
        _, state = one(IDS[:, :19], learn="next_token")
    y, _ = one(IDS[:, 19:], state, learn="next_token")
    with torch.no_grad():
        expected, _ = one(IDS, learn="next_token")
    assert relative(y, expected[:, 19:]) < 1e-10
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in one.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_cast_state_computes_with_its_masters(dtype):
    torch.manual_seed(0)
    layer = ContinuumMemory(CMSConfig(16, (4,), expansion=2.0, lr=0.3), dtype=torch.bfloat16)
    x, error = torch.randn(2, 1, 4, 16).bfloat16()
    with torch.no_grad():
        _, state = layer(x, layer.init_state(1))
        state = layer.refresh(state, error).to(dtype)
        now = layer.effective_levels(state, dtype)[0]
    for name, w in state.weights[0].items():
        assert torch.equal(now[name].own, w.to(dtype)), name


def test_a_loaded_state_knows_the_layers_of_the_model_that_read_it(tmp_path):
    one = model()
    with torch.no_grad():
        _, state = one(IDS[:, :20], learn="next_token")
        state.save(tmp_path / "state")
        _, loaded = one(IDS[:, 20:21], load_state(tmp_path / "state"), learn="next_token")
    a, b = loaded.cms[0].detach_level(0, row=1), state.cms[0].detach_level(0, row=1)
    assert loaded.cms[0].own[0] == [1, 0] and a.keys() == b.keys()
