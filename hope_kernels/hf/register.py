"""Who finds our classes in transformers, and where."""

from __future__ import annotations

from typing import Any

import transformers

from .config import HopeHFConfig
from .model import HopeForCausalLM


def register() -> None:
    """Makes the Auto classes, ``pipeline`` and ``transformers serve`` find them."""
    model_type = HopeHFConfig.model_type
    transformers.AutoConfig.register(model_type, HopeHFConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(HopeHFConfig, HopeForCausalLM, exist_ok=True)
    fast: Any = transformers.PreTrainedTokenizerFast
    transformers.AutoTokenizer.register(HopeHFConfig, fast_tokenizer_class=fast, exist_ok=True)
    # ``transformers serve`` takes the class by its name from here
    setattr(transformers, HopeForCausalLM.__name__, HopeForCausalLM)
