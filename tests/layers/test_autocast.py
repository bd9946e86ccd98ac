"""Under autocast a layer computes what it computes outside: its states and promises are those of its weights'
dtype."""

import pytest
import torch

from hope_kernels import CMSConfig, ContinuumMemory, HopeConfig, HopeForCausalLM, SelfModifyingTitans, TitansConfig


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
@pytest.mark.parametrize("learn", ["off", "next_token"])
def test_a_model(mixer, learn):
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig(32, 32, 1, mixer=mixer, num_heads=2, cms=CMSConfig(32, (4, 8))))
    ids = torch.randint(0, 32, (2, 19))
    with torch.no_grad():
        want, _ = model(ids, learn=learn)
        with autocast():
            got, state = model(ids[:, :7], learn=learn)
            rest, _ = model(ids[:, 7:], state, learn=learn)
    torch.testing.assert_close(torch.cat([got, rest], 1), want, rtol=1e-4, atol=1e-5)


def test_layers_take_what_autocast_hands_them_and_train():
    torch.manual_seed(0)
    titans, cms, before = SelfModifyingTitans(TitansConfig(16)), ContinuumMemory(
        CMSConfig(16, (4,))
    ), torch.nn.Linear(16, 16)
    x = torch.randn(2, 4, 16)
    with autocast():
        h = before(x)
        assert h.dtype == torch.bfloat16
        y, _ = titans(h)
        z, state = cms(y.bfloat16())
        state = cms.refresh(state, torch.ones_like(z, dtype=torch.bfloat16))
        z.square().sum().backward()
    assert y.dtype == z.dtype == torch.float32 and state.own == [[1, 1]]
    torch.testing.assert_close(y, titans(h.float())[0], rtol=1e-5, atol=1e-6)
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in (before.weight, titans.w2, cms.levels[0]["up"])
    )
