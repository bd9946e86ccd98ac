"""Adapters where a file, the class of another package or a library of adapters (PEFT) has a say."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from wrapped_models import BACKENDS, D, LoRALinear, Scaled, assert_same, close, hooked, ids, small

from hope_kernels.compat import nested_learning as compat


def test_the_compatible_class_takes_effective_weights():
    torch.manual_seed(0)
    config = compat.SelfModifyingTitansConfig(dim=D, chunk_size_other=4)
    plain = compat.SelfModifyingTitans(config)
    wrapped = copy.deepcopy(plain)
    for name in ("m_k", "m_v", "m_memory", "m_eta"):
        memory, other = getattr(wrapped, name), getattr(plain, name)
        memory.w2, memory.w1 = LoRALinear(memory.w2), hooked(memory.w1, forward=lambda y: 1.5 * y)
        with torch.no_grad():
            other.w2.weight.copy_(memory.w2(torch.eye(D)).mT)
            other.w1.weight.mul_(1.5)
    wrapped.w_q, x = LoRALinear(wrapped.w_q), torch.randn(2, 9, D)
    with torch.no_grad():
        plain.w_q.weight.copy_(wrapped.w_q(torch.eye(D)).mT)
    (y, state), (want, other) = (m.forward_with_updates(x, m.init_fast_state()) for m in (wrapped, plain))
    close(y, want)
    close(state.memory.w1, other.memory.w1)
    close(wrapped(x), plain(x))
    close(wrapped.forward_with_state(x, state), plain.forward_with_state(x, other))
    before = copy.deepcopy(wrapped.state_dict())
    with pytest.raises(ValueError, match="m_k.w1 has hooks"):
        wrapped.apply_updates_inplace(x)
    assert all(torch.equal(t, before[n]) for n, t in wrapped.state_dict().items())
    wrapped.m_k.w2 = LoRALinear(nn.Linear(D, D))  # with a bias
    with pytest.raises(ValueError, match="without a bias"):
        wrapped.init_fast_state()


@pytest.mark.parametrize("change", [
    lambda m: setattr(m.blocks[0].mixer, "q_proj", LoRALinear(m.blocks[0].mixer.q_proj)),
    lambda m: parametrize.register_parametrization(m.blocks[0].cms.levels[0], "up", Scaled()),
], ids=["adapter", "parametrization"])
def test_a_file_that_could_not_be_loaded_is_not_written(change, tmp_path):
    model = small()
    change(model)
    with pytest.raises(ValueError, match="save_pretrained: blocks.0.* merge or remove"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def randomized(model):
    """PEFT's adapters start at zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("targets", [
    {"target_modules": ["q_proj", "in_proj", "gate_proj", "out_proj"]},
    {"target_modules": [], "target_parameters": ["levels.0.up", "levels.0.down", "levels.1.up"]},
    {"target_modules": ["embed", "head", "q_proj"]},
], ids=["projections", "cms", "embedding and head"])
def test_peft(targets, backend):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = small(tie=False)
    plain = copy.deepcopy(model)
    adapted = randomized(peft.inject_adapter_in_model(peft.LoraConfig(r=2, **targets), model))
    with torch.no_grad():
        got = adapted(ids(), learn="next_token", backend=backend)
        off = adapted(ids(), backend=backend)[0]
        assert float((got[0] - plain(ids(), learn="next_token", backend=backend)[0]).abs().max()) > 0.01
        if "target_parameters" in targets:
            weights = [t.clone() for t in adapted.state_dict().values()]
            with pytest.raises(ValueError, match=r"levels\[0\]: up belongs to a ParamWrapper"):
                adapted.consolidate(got[1])
            assert all(torch.equal(a, b) for a, b in zip(adapted.state_dict().values(), weights, strict=True))
    logits = adapted(ids())[0]
    adapters = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    grads = torch.autograd.grad(logits.square().sum(), list(adapters.values()))
    assert all(g.abs().max() > 0 for g in grads)
    # merged by PEFT itself
    for module in list(adapted.modules()):
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.merge()
    bare = small(tie=False)
    state = {n.replace("base_layer.", ""): t for n, t in adapted.state_dict().items() if "lora_" not in n}
    bare.load_state_dict(state)
    with torch.no_grad():
        assert_same(got, bare(ids(), learn="next_token", backend=backend))
        close(off, bare(ids(), backend=backend)[0])
