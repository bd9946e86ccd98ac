"""A ModelState that goes on with other settings: rates, optimizer, window, learning blocks (``differences.py``).

Every block's part goes on for itself (``ops/cms/continued.py``, ``AttentionState.continued``). Of the open
segment:

    the model learned and still does     it is learned with the new settings
    it learned and does no more          it is dropped
    it learns now for the first time     its tokens count as read with learn="off"
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .config import HopeConfig
from .engine.protocol import Model
from .layers.attention import AttentionState
from .model_state import TAINTED, MixerState, ModelState
from .state import Counters


def continued(model: Model, state: ModelState) -> ModelState:
    """``state``, which ``model`` may read, under the model's configuration: itself where it has that already,
    else one that shares with ``state`` what is the same. ``state`` stays as it is. Rows that hold deviations from
    the model's weights (``ops/cms/deviations.py``) follow these."""
    config, state = model.config, state.followed(model)
    if state.config is config:
        return state
    if state.config == config:
        if not torch.compiler.is_compiling():
            _name(state, config)
        return state
    cms = [c if c is None or b.cms is None else b.cms.continued(c) for b, c in zip(model.blocks, state.cms)]
    lost = [_lost(m) for m in state.mixers]

    def under(mixers: list[MixerState]) -> list[MixerState]:
        of = zip(mixers, config.blocks, lost)
        return [m.continued(one, at) if isinstance(m, AttentionState) else m for m, one, at in of]

    mixers = under(state.mixers)
    kept, guard = (None if part is None else replace(part, config=config) for part in (state.kept, state.guard))
    new = replace(state, config=config, mixers=mixers, cms=cms, kept=kept, guard=guard)
    if config.learns and state.config.learns:
        return replace(new, snapshot=under(state.snapshot))
    B, C, zero = state.batch, config.segment, [0] * state.batch
    if not config.learns:
        return replace(new, ids=state.ids[:, :0].clone(), seen=Counters(zero), snapshot=[])
    ids = torch.zeros(B, C, dtype=state.ids.dtype, device=state.ids.device)
    seen = Counters([TAINTED if p % C else 0 for p in state.pos])
    return replace(new, ids=ids, seen=seen, snapshot=[m.snapshot() for m in mixers])


def _name(state: ModelState, config: HopeConfig) -> None:
    """``state`` and the states inside have the very objects of ``config``, which are equal to theirs: a state from
    a file is compared field by field once, and by identity from then on."""
    mixers = config.blocks if config.mixer == "attention" else [config.titans] * config.num_layers
    for inside, configs in ((state.mixers, mixers), (state.snapshot, mixers), (state.cms, config.block_cms)):
        for one, its in zip(inside, configs):
            if one is not None:
                one.config = its
    for part in (state, state.guard, state.kept):
        if part is not None:
            part.config = config


def _lost(mixer: MixerState) -> list[int]:
    """Tokens of each row that no window can reach any more."""
    return mixer.unreachable() if isinstance(mixer, AttentionState) else []
