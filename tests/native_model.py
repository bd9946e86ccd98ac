"""Models in fp32 that the C++ of csrc/cpu reads: one of every kind."""

import torch

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig

V = 40


def small(d=16, heads=2, layers=2, chunks=(4, 16), titans=None, cms=None, **options) -> HopeForCausalLM:
    torch.manual_seed(0)
    titans = TitansConfig(d, heads, **{"chunk_memory": 4, "chunk_other": 4, **(titans or {})})
    cms = {} if cms is None else cms
    options.setdefault("cms", CMSConfig(d, chunks, **{"expansion": 2.0, "lr": 0.02, **cms}))
    model = HopeForCausalLM(HopeConfig(V, d, layers, titans=titans, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


CASES = {
    "default": {},
    "wide memories": {"titans": {"hidden_mult": 4, "activation": "gelu"}},
    "48 outputs": {"d": 48, "heads": 1, "titans": {"activation": "silu"}},
    "two clocks": {"titans": {"chunk_memory": 8, "chunk_other": 2}},
    "no retention": {"titans": {"retention": False, "eta_activation": "softplus"}},
    "from zero": {"titans": {"retain_to": "zero", "qk_l2norm": False, "dgd": False}},
    "bare": {"titans": {"gate": False, "out_proj": False, "out_norm": False, "in_proj": False}},
    "no convolution": {"titans": {"conv_window": None, "in_proj": True}},
    "convolutions of one": {"titans": {"conv_window": 1, "objective": "dot"}},
    "no CMS": {"cms": None},
    "nested": {"cms": {"variant": "nested", "optimizer": "adam"}},
    "mixture": {"cms": {"variant": "independent", "lr": (0.02, 0.01)}},
    "layer norms and biases": {"cms": {"norm": "layernorm", "bias": True}},
    "gelu of erf": {"cms": {"mlp": "gelu_erf"}},
    "low rank": {"cms": {"rank": 8}},
    "low rank, adam, layer norms and biases": {
        "cms": {"rank": 8, "optimizer": "adam", "lr": 0.01, "norm": "layernorm", "bias": True}},
    "a norm behind memories": {"post_norm": True, "cms": {"optimizer": "adam"}},
    "a norm behind bare memories": {"post_norm": True, "titans": {"out_proj": False}},
    "a head of its own": {"tie_embeddings": False},
    "one level": {"chunks": (8,), "cms": {"expansion": 4.0, "optimizer": "momentum"}},
    "titans": {"mixer": "titans", "titans": {"self_modifying": False, "own_values": False, "momentum": "learned"}},
    "static": {"mixer": "titans", "titans": {"self_modifying": False, "retention": False}},
    "skip rows": {"titans": {"scalar_skip": True, "retain_to": "zero"}},
    "norms behind": {"post_norm": True},
    "norms behind, no projection": {"post_norm": True, "titans": {"out_proj": False}},
    "momentum": {"titans": {"momentum": 0.5, "conv_window": None, "in_proj": False}},
    "learned momentum": {"titans": {"momentum": "learned", "scalar_skip": True, "chunk_other": 2}},
    "linear": {"titans": {"memory": "linear", "chunk_memory": 2}},
    "delta": {"titans": {**TitansConfig.PRESETS["delta"], "conv_window": 3}},
    "linear titans": {
        "mixer": "titans", "titans": {"memory": "linear", "self_modifying": False, "momentum": "learned"}},
    "adaptive queries": {"titans": {"adaptive_q": True, "scalar_skip": True, "chunk_other": 2}},
    "linear adaptive queries": {"titans": {
        "memory": "linear", "adaptive_q": True, "momentum": 0.5, "retain_to": "zero", "in_proj": False}},
}


def built(name: str) -> HopeForCausalLM:
    options = dict(CASES[name])
    if options.get("cms", {}) is None:
        torch.manual_seed(0)
        config = HopeConfig(V, 16, 2, titans=TitansConfig(16, 2, chunk_memory=4, chunk_other=4), cms=None)
        return HopeForCausalLM(config).eval()
    return small(**options)


def ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (batch, tokens), generator=torch.Generator().manual_seed(seed))
