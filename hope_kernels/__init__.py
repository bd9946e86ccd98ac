"""hope_kernels: exact, accelerated HOPE layers (self-modifying Titans and the Continuum Memory System).

    import hope_kernels as hk
    layer = hk.SelfModifyingTitans(hk.TitansConfig(d_model=512, num_heads=8))
    y, state = layer(x)
"""

from . import waiting  # noqa: F401, I001  before anything that imports PyTorch
from . import (
    compat,
    convert,
    earlier,  # noqa: F401
    generation,
    ops,
    optim,
)
from .backend import available_backends
from .config import CMSConfig, HopeConfig, RopeScaling, TitansConfig
from .engine.decoder import Decoder
from .folders import bundled_models
from .layers.cms import ContinuumMemory
from .layers.titans import SelfModifyingTitans
from .model import HopeForCausalLM
from .state_file import load_state
from .text import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "CMSConfig", "ContinuumMemory", "Decoder", "HopeConfig", "HopeForCausalLM", "RopeScaling",
    "SelfModifyingTitans", "TitansConfig", "Tokenizer",
    "available_backends", "bundled_models", "compat", "convert", "generation", "load_state", "ops",
    "optim",
]
