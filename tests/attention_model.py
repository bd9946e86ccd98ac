"""Models with attention: one of every kind that the C++ of csrc/cpu reads."""

import torch

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM

V, D = 60, 48
OPTIONS = {
    "full": {},
    "grouped, biases": {"num_heads": 6, "num_kv_heads": 2, "attention_bias": True},
    "window": {"window": 21, "num_kv_heads": 1},
    "window and sinks": {"window": 13, "sinks": 5, "attention_bias": True},
    "more sinks than window": {"window": 3, "sinks": 9},
    "norms, a scale, wider heads": {"qk_norm": True, "attention_scale": 0.3, "head_dim": 24, "window": 40, "sinks": 2},
    "norms behind, scaled RoPE": {"post_norm": True, "rope_scaling": {"rope_type": "linear", "factor": 2},
                                  "tie_embeddings": False, "num_kv_heads": 3},
}


def config(options) -> HopeConfig:
    usual = {"num_heads": 3, "cms": CMSConfig(D, (4, 16), expansion=2.0, lr=0.02)}
    return HopeConfig(V, D, 2, mixer="attention", **usual | options)


def converted(mlp: str, post_norm: bool, **cms) -> HopeConfig:
    """As of a model that was converted."""
    cms = {"chunks": (4, 16), "lr": 0.02} | cms
    levels = CMSConfig(D, mlp=mlp, post_norm=post_norm, intermediate_size=72, **cms)
    return config(OPTIONS["grouped, biases"]).replace(
        rope_dtype="float32", cms=levels, post_norm=post_norm, qk_norm=post_norm, window=30,
        embed_scale=D**0.5 if post_norm else 1.0
    )


def moved(module):
    """With every weight off its initial value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module.eval()


def built(options) -> HopeForCausalLM:
    torch.manual_seed(1)
    return moved(HopeForCausalLM(options if isinstance(options, HopeConfig) else config(options)))


def ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (batch, tokens), generator=torch.Generator().manual_seed(seed))
