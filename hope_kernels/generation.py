"""Reading and writing text with a model: ``read`` and ``generate``, whose code is in ``engine/generation.py``."""

from .engine.generation import Generation, Reading, generate, read
from .engine.options import PIECE
from .engine.source import Source

__all__ = ["PIECE", "Generation", "Reading", "Source", "generate", "read"]
