"""Configurations: frozen dataclasses, validated at construction, with the presets as plain data.

Every field is explained where it is defined; NL: Nested Learning (arXiv 2512.24695), Titans: arXiv
2501.00663, with their equation numbers. Shapes and derivations are in ``ops/titans/README.md`` and
``ops/cms/README.md``. A configuration that two parts of the program would read differently does not
construct.
"""

from .base import Configuration
from .cms import CMSConfig
from .model import PER_BLOCK, HopeConfig
from .rates import STEPS, default_rate
from .rope import RopeScaling
from .titans import ACTIVATIONS, TitansConfig

__all__ = [
    "ACTIVATIONS", "PER_BLOCK", "STEPS", "CMSConfig", "Configuration", "HopeConfig", "RopeScaling", "TitansConfig",
    "default_rate",
]
