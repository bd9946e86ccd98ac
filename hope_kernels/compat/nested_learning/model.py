"""The package's language model on this engine, with its streaming states, generation, sessions and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ...config import HopeConfig
from ...layers.block import Block
from ...model import HopeForCausalLM
from .blocks import AttentionBlock, SelfModBlock
from .checkpoint import is_theirs, translated
from .model_config import hope_config


class HOPEModel(HopeForCausalLM):
    """The package's HOPEModel (block_variant "hope_selfmod" or "hope_attention") as a ``HopeForCausalLM``.

        model = HOPEModel(config).eval()     # the package's ModelConfig, or this module's
        model.load_state_dict(theirs)        # a state_dict of the package's model
        logits, state = model(ids)           # everything else as HopeForCausalLM has it

    Logits are the package's, in eval mode: of ``model(ids)`` with attention; with self-modifying memories of
    a call in which they write while they read (fast state and teach signal), one row at a time, and here in
    one stream that may be split anywhere. CMS levels learn by this engine's rule, ``learn="next_token"``,
    and not by teach signals; cms: fields of CMSConfig for that.

    Raises ValueError for what has no equal here (``hope_config``). A HopeConfig, as the model's own folders
    have it, is taken as it is.
    """

    def __init__(self, config: Any, device=None, dtype=None, **cms: Any):
        own = config if isinstance(config, HopeConfig) else hope_config(config, **cms)
        super().__init__(own, device, dtype)
        block = AttentionBlock if own.mixer == "attention" else SelfModBlock
        pairs = zip(own.blocks, own.block_cms)
        blocks = nn.ModuleList(block(one, levels, device, dtype) for one, levels in pairs)
        self.blocks = cast("Sequence[Block]", blocks)
        self.norm = nn.LayerNorm(own.d_model, eps=own.norm_eps, device=device, dtype=dtype)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Of this model, or of the package's. Raises RuntimeError as PyTorch does, ValueError for keys of the
        package that have no place here."""
        if is_theirs(state_dict):
            state_dict = translated(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)
