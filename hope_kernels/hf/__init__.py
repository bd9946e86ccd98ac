"""HOPE models as transformers knows models: ``import hope_kernels.hf`` registers them with its Auto classes.

    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    import hope_kernels.hf

    model = AutoModelForCausalLM.from_pretrained(folder)       # as either library has written it
    model = hope_kernels.hf.HopeForCausalLM.wrap(ours)         # the same weights, not a copy

docs/hf.md says what works, with examples. Needs the extra ``hf``.
"""

from ..text.extra import extra

extra("transformers", "hope_kernels.hf", "hf")

from .cache import HopeCache  # noqa: E402
from .config import HopeHFConfig  # noqa: E402
from .model import HopeForCausalLM  # noqa: E402
from .register import register  # noqa: E402

register()
__all__ = ["HopeCache", "HopeForCausalLM", "HopeHFConfig"]
