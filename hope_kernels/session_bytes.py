"""What a session of a model costs, before there is one."""

from __future__ import annotations

from collections import Counter

from .engine.protocol import Model
from .layers.attention import CausalAttention
from .layers.wrapped import placement


def session_bytes(model: Model, batch: int, tokens: int) -> dict[str, int]:
    """``HopeForCausalLM.state_bytes``."""
    found: Counter[str] = Counter()
    size = placement(model.embed).dtype.itemsize
    for block in model.blocks:
        for level in () if block.cms is None else block.cms.state_bytes(batch, model.segment):
            found.update(level)
        mixer = block.mixer
        if isinstance(mixer, CausalAttention):
            kept = tokens if mixer.window is None else min(tokens, mixer.sinks + mixer.window + mixer.config.segment)
            heads = mixer.config.heads[1] // mixer.parts
            found["mixers"] += 2 * batch * kept * heads * mixer.head_dim * size
        else:  # memories that a segment changes are kept as they were at its start
            found["mixers"] += mixer.init_state(batch).nbytes() * (2 if model.learns else 1)
    found["segment"] = 8 * batch * model.segment if model.learns else 0
    return dict(found)
