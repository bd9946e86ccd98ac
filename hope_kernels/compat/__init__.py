"""Drop-in replacements for other packages' classes: their names, checkpoints and per-call semantics on this
engine."""

from . import nested_learning

__all__ = ["nested_learning"]
