"""Models in fp32 that C++ reads and learns: one of every kind, the same by PyTorch, and what they have learned."""

import copy

import attention_model
import torch
from native_model import CASES, built, small

from hope_kernels import CMSConfig
from hope_kernels.engine.native_segment import Reader
from hope_kernels.layers.attention import AttentionState

MORE = {
    "momentum": {"cms": {"optimizer": "momentum"}},
    "adam": {"cms": {"optimizer": "adam", "lr": 0.01}},
    "muon": {"cms": {"optimizer": "muon"}},
    "relative": {"cms": {"relative": True, "lr": 0.1}},
    "relative momentum": {"cms": {"relative": True, "lr": 0.1, "optimizer": "momentum"}},
    "a level of rate zero": {"cms": {"lr": (0.0, 0.02)}},
    "the other level of rate zero": {"cms": {"lr": (0.02, 0.0)}},
    "segments of 24": {"chunks": (24, 48), "d": 24, "heads": 3},
    "mixture, a level of rate zero": {"cms": {"variant": "independent", "lr": (0.0, 0.02)}},
    "mixture, the other level of rate zero": {"cms": {"variant": "independent", "lr": (0.02, 0.0)}},
    "scaled embeddings": {"embed_scale": 4.0},
    "low rank, momentum, one level of rate zero": {"cms": {"rank": 8, "optimizer": "momentum", "lr": (0.02, 0.0)}},
    "low rank, muon, nested": {"cms": {"rank": 8, "optimizer": "muon", "variant": "nested"}},
    "preconditioned": {"cms": {"precondition": 1.0}},
    "preconditioned, relative, swiglu": {
        "cms": {"precondition": 0.5, "relative": True, "lr": 0.1, "mlp": "swiglu"}},
    "preconditioned, muon, nested": {"cms": {"precondition": 1.0, "optimizer": "muon", "variant": "nested"}},
    "preconditioned, low rank, adam": {"cms": {"precondition": 1.0, "rank": 8, "optimizer": "adam", "lr": 0.01}},
    "preconditioned, one level of segments of 24": {
        "chunks": (24,), "d": 24, "heads": 3, "cms": {"precondition": 0.1, "optimizer": "momentum"}},
    "low rank, segments of 24": {"chunks": (24, 48), "d": 24, "heads": 3, "cms": {"rank": 16, "relative": True}},
}
GATED_MEMORIES = {  # and such as have norms behind
    "swiglu, gd": {"cms": {"mlp": "swiglu"}},
    "geglu, relative momentum": {"cms": {"mlp": "geglu", "relative": True, "lr": 0.1, "optimizer": "momentum"}},
    "gelu, norms behind all": {"cms": {"post_norm": True}, "post_norm": True},
    "low rank, swiglu": {"cms": {"mlp": "swiglu", "rank": 8}},
    "low rank, geglu, norms behind all": {"cms": {"mlp": "geglu", "rank": 8, "post_norm": True}, "post_norm": True},
}
MORE |= GATED_MEMORIES
SINKS = attention_model.OPTIONS["window and sinks"]
CMS_OF_ATTENTION = {
    "momentum": {"optimizer": "momentum"},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "muon": {"optimizer": "muon"},
    "relative": {"relative": True, "lr": 0.1},
    "nested": {"variant": "nested"},
    "mixture": {"variant": "independent"},
    "mixture of gated levels with norms": {"variant": "independent", "mlp": "geglu", "post_norm": True},
    "mixture of gated levels with biases": {"variant": "independent", "mlp": "swiglu", "bias": True},
    "gated levels with layer norms, biases and norms": {
        "mlp": "swiglu", "norm": "layernorm", "bias": True, "post_norm": True, "optimizer": "muon"},
    "a level of rate zero": {"lr": (0.0, 0.02)},
    "the other level of rate zero": {"lr": (0.02, 0.0)},
    "segments of 24": {"chunks": (24, 48)},
    "gelu with norms behind": {"post_norm": True},
    "gelu of erf": {"mlp": "gelu_erf"},
    "low rank": {"rank": 8, "optimizer": "adam", "lr": 0.01},
    "mixture of low rank, gated, with biases": {"variant": "independent", "mlp": "swiglu", "bias": True, "rank": 8},
}
CMS_OF_GATED = {  # of models as converted ones are: with norms behind mixers and levels, or without
    "swiglu": {},
    "swiglu, norms behind": {},
    "geglu, norms behind": {"lr": (0.02, 0.0)},
    "geglu, momentum": {"optimizer": "momentum"},
    "swiglu, norms behind, adam": {"optimizer": "adam", "lr": 0.01},
    "swiglu, muon": {"optimizer": "muon"},
    "geglu, norms behind, relative": {"relative": True, "lr": 0.1},
    "swiglu, nested": {"variant": "nested"},
    "geglu, segments of 24": {"chunks": (24, 48)},
}
ATTENTION = {f"attention: {name}": options for name, options in attention_model.OPTIONS.items()}
ATTENTION |= {
    f"attention: {name}": {**SINKS, "cms": CMSConfig(
        attention_model.D, **{"chunks": (4, 16), "expansion": 2.0, "lr": 0.02, **options})}
    for name, options in CMS_OF_ATTENTION.items()
}
ATTENTION["attention: blocks of their own"] = {
    "window": (None, 9), "rope_theta": (1e4, 5e2), "num_heads": 8, "tie_embeddings": False}
ATTENTION["attention: scaled embeddings"] = {"embed_scale": 7.0}
GATED = {
    f"attention: {name}": attention_model.converted(name[:6].rstrip(","), "norms behind" in name, **cms).replace(
        rope_dtype="float64")  # with nobody's bits to keep
    for name, cms in CMS_OF_GATED.items()
}
ATTENTION |= GATED
LEARNING = {**CASES, **MORE, **ATTENTION}
del LEARNING["no CMS"]


def model_of(name):
    if name in ATTENTION:
        return attention_model.built(ATTENTION[name])
    return small(**MORE[name]) if name in MORE else built(name)


def asked(name) -> str | None:
    """The backend that reads all of the model in C++, whether it learns or not."""
    return "cpp" if name in GATED else None


def by_pytorch(model):
    """The same model, which C++ does not serve."""
    other = copy.deepcopy(model)
    other.blocks[0].register_forward_hook(lambda *_: None)
    assert "hooked" in Reader(other, None).reason
    return other


def cached(mixer: AttentionState, row: int) -> list[torch.Tensor]:
    """Keys and values that a row may still see: how many more a cache keeps depends on the calls."""
    (window, sinks), used = mixer.config.sight, mixer.used()[row]
    first = min(sinks, used)
    rest = used - first if window is None else min(window, used - first)
    return [torch.cat([t[row, :first], t[row, used - rest : used]]) for t in (mixer.k, mixer.v)]


def learned(state) -> dict[str, torch.Tensor]:
    """name -> tensor of all that a state has that decides what is read later."""
    found = {}
    for i, (mixer, cms) in enumerate(zip(state.mixers, state.cms)):
        if isinstance(mixer, AttentionState):
            found |= {f"{i}.{n}.{b}": t for b in range(mixer.batch) for n, t in zip("kv", cached(mixer, b))}
        else:
            found |= {f"{i}.{n}": t for n, t in vars(mixer).items() if isinstance(t, torch.Tensor)}
        for name in ("weights", "grads", "moments", "squares", "inverses", "following"):
            for l, of in enumerate(getattr(cms, name)):
                counts = cms.dirty[l] if name == "grads" else [1]
                found |= {f"{i}.{name}.{l}.{n}": t for n, t in (of or {}).items() if any(counts)}
    return found


def same_bits(a, b) -> bool:
    x, y = learned(a), learned(b)
    return list(a.pos) == list(b.pos) and x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)
