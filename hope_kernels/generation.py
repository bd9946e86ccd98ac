"""Reading and writing text with a model: ``read`` and ``generate``, whose code is in ``engine/generation.py``."""

from .engine.generation import Generation, Reading, generate, read

__all__ = ["Generation", "Reading", "generate", "read"]
