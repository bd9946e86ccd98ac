"""Who finds our classes in transformers, and where."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import transformers
import transformers.processing_utils  # noqa: F401 - it makes a second module of the name ``transformers``

from .config import HopeHFConfig
from .model import HopeForCausalLM


def register() -> None:
    """Makes the Auto classes, ``pipeline`` and ``transformers serve`` find them."""
    model_type = HopeHFConfig.model_type
    transformers.AutoConfig.register(model_type, HopeHFConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(HopeHFConfig, HopeForCausalLM, exist_ok=True)
    fast: Any = transformers.PreTrainedTokenizerFast
    transformers.AutoTokenizer.register(HopeHFConfig, fast_tokenizer_class=fast, exist_ok=True)
    for module in _modules():  # where ``transformers serve`` looks up the class by its name
        setattr(module, HopeForCausalLM.__name__, HopeForCausalLM)


def _modules() -> list[ModuleType]:
    """Whatever is called ``transformers`` here, by an import, and in the files of that library."""
    own = [vars(m).get("transformers") for name, m in list(sys.modules.items()) if name.startswith("transformers.")]
    return [sys.modules["transformers"], transformers, *(m for m in own if isinstance(m, ModuleType))]
