"""Models of one size to compare: HOPE, Titans, attention."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig

ARMS = ("hope", "titans", "attention")
WITHIN = 0.02  # sizes differ by no more
SPREAD = 0.3  # of the embeddings; from 0.02 the first hundreds of steps go into their length


def config(arm: str, vocabulary: int, d: int, layers: int, heads: int, hidden: int, **titans: object) -> HopeConfig:
    """One arm with MLPs of ``hidden`` units; ``titans``: fields of its memories. Nothing learns while it reads but
    the memories, and the head has weights of its own."""
    cms = CMSConfig(d, (1 << 20,), intermediate_size=hidden, lr=0.0)
    fields = {"cms": cms, "tie_embeddings": False}
    if arm == "attention":
        return HopeConfig(vocabulary, d, layers, mixer="attention", num_heads=heads, **fields)
    preset, mixer = ("default", "self_modifying") if arm == "hope" else ("titans", "titans")
    memories = TitansConfig.preset(preset, d_model=d, num_heads=heads, **titans)
    return HopeConfig(vocabulary, d, layers, mixer=mixer, titans=memories, **fields)


def size(model: HopeForCausalLM) -> int:
    return sum(p.numel() for p in model.parameters())


def same_size(wanted: int, make: Callable[[int], HopeConfig]) -> HopeConfig:
    """make(hidden), with MLPs as wide as brings the model closest to ``wanted`` parameters."""
    one, two = (size(HopeForCausalLM(make(hidden))) for hidden in (1, 2))
    found = make(max(1, 1 + round((wanted - one) / (two - one))))
    got = size(HopeForCausalLM(found))
    if abs(got / wanted - 1) > WITHIN:
        raise ValueError(f"same_size: argument make gives {got} parameters, expected about {wanted}")
    return found


def as_large_as_hope(arm: str, seed: int, d: int, make: Callable[[str, int], HopeConfig]) -> HopeForCausalLM:
    """A new model make(arm, hidden), of as many parameters as make("hope", 2 d)."""
    wanted = size(HopeForCausalLM(make("hope", 2 * d)))
    torch.manual_seed(seed)
    model = HopeForCausalLM(same_size(wanted, lambda hidden: make(arm, hidden)))
    torch.nn.init.normal_(model.embed.weight, std=SPREAD)
    return model
