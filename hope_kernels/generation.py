"""Reading and writing text with a model: ``read`` and ``generate``, whose code is in ``engine/generation.py``."""

from .engine.generation import PIECE, Generation, Reading, Source, generate, read

__all__ = ["PIECE", "Generation", "Reading", "Source", "generate", "read"]
