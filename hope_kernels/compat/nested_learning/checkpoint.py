"""State dicts of the package's HOPEModel under this engine's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ...layers.titans import SelfModifyingTitans
from ...ops.titans.state import FastWeights

if TYPE_CHECKING:
    from .model import HOPEModel

LEVEL = {
    "net.0.weight": "norm_gain", "net.0.bias": "norm_bias", "net.1.weight": "up", "net.1.bias": "up_bias",
    "net.3.weight": "down", "net.3.bias": "down_bias",
}
ATTENTION = ("qkv.weight", "out_proj.weight", "norm.weight", "norm.bias")


def is_theirs(state_dict: Mapping[str, Tensor]) -> bool:
    return any(re.match(r"blocks\.\d+\.(selfmod|attn|cms\.blocks)\.", name) for name in state_dict)


def translated(model: HOPEModel, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``model`` with the package's weights. Raises ValueError for keys without a place.

    Left out are those of memories that take no part: m_q without adaptive_q, w_q with it, m_alpha without
    use_alpha. CMS levels go by their order.
    """
    ours = {name: t for name, t in model.state_dict().items() if name.endswith(("eta_bias", "alpha_bias"))}
    ours |= {name: theirs[name] for name in ("embed.weight", "norm.weight", "norm.bias") if name in theirs}
    taken = {*ours, "lm_head.weight"}
    for i, block in enumerate(model.blocks):
        if isinstance(block.mixer, SelfModifyingTitans):
            found = _memories(block.mixer, _under(theirs, f"blocks.{i}.selfmod."))
            taken |= {name for name in theirs if name.startswith(f"blocks.{i}.selfmod.")}
        else:
            found = _attention(_under(theirs, f"blocks.{i}.attn."))
            taken |= {f"blocks.{i}.attn.{name}" for name in ATTENTION}
        levels: dict[str, int] = {}
        for name, t in _under(theirs, f"blocks.{i}.cms.blocks.").items():
            level, _, rest = name.partition(".net.")
            at = levels.setdefault(level, len(levels))
            if f"net.{rest}" in LEVEL:
                found[f"cms.levels.{at}.{LEVEL[f'net.{rest}']}"] = t
                taken.add(f"blocks.{i}.cms.blocks.{name}")
        ours |= {f"blocks.{i}.{name}": t for name, t in found.items()}
    other = sorted(set(theirs) - taken)
    if other:
        raise ValueError(
            f"compat.nested_learning.HOPEModel: argument state_dict has {other[0]}, for which this model has no "
            "place"
        )
    return ours


def _under(theirs: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in theirs.items() if name.startswith(prefix)}


def _attention(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    q, k, v = theirs["qkv.weight"].chunk(3)
    return {"mixer.q_proj.weight": q, "mixer.k_proj.weight": k, "mixer.v_proj.weight": v,
            "mixer.o_proj.weight": theirs["out_proj.weight"],
            "post_norm.weight": theirs["norm.weight"], "post_norm.bias": theirs["norm.bias"]}


def _memories(mixer: SelfModifyingTitans, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one head, as the package has them."""
    like = theirs["m_memory.w2.weight"]
    stacked = FastWeights(*(None if s is None else like.new_empty(s) for s in mixer.layout.shapes(1)))
    for name in mixer.layout.names:
        for part, view in mixer.layout.views(stacked, name).items():
            view.copy_(theirs[f"m_{name}.{part}.weight"])
    found = {f"mixer.{name}": t for name, t in stacked._asdict().items() if t is not None}
    if mixer.conv is not None:
        found["mixer.conv"] = theirs["local_conv.weight"][:, 0]
    if mixer.q_proj is not None:
        found["mixer.q_proj.weight"] = theirs["w_q.weight"]
    return found
