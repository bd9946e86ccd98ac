"""Our layer in the package's own blocks: its ``HOPEModel`` then runs on the kernels, with its own training
loop, teach signals, CMS and checkpoints."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from . import layer
from .config import SelfModifyingTitansConfig

OURS = {
    "SelfModifyingTitans": layer.SelfModifyingTitans,
    "SelfModifyingTitansConfig": SelfModifyingTitansConfig,
}
_theirs: dict[str, type] = {}  # what ``uninstall`` puts back


def install() -> None:
    """From here on the package nested-learning (0.2.0) builds its blocks of ``block_variant="hope_selfmod"``
    with our ``SelfModifyingTitans``.

    Models that exist already keep theirs: build the model after this call and load their state_dict, whose
    keys are the same. ``nested_learning.titan.self_modifying`` itself stays as it is. Raises ImportError where
    the package is not installed or has no such blocks.
    """
    blocks = _blocks()
    for name, ours in OURS.items():
        found = getattr(blocks, name)
        if found is not ours:
            _theirs[name] = found
            setattr(blocks, name, ours)


def uninstall() -> None:
    """The package's own layer again, for models built from here on. Nothing happens where ``install`` was not
    called."""
    if _theirs:
        blocks = _blocks()
        for name, theirs in _theirs.items():
            setattr(blocks, name, theirs)
        _theirs.clear()


def _blocks() -> ModuleType:
    """The module whose blocks name the layer."""
    try:
        blocks = import_module("nested_learning.hope.block")
    except ImportError as e:
        raise ImportError(
            "compat.nested_learning.install: nested-learning 0.2.0 is not installed, expected it beside "
            "hope_kernels (pip install nested-learning==0.2.0)"
        ) from e
    missing = [name for name in OURS if not hasattr(blocks, name)]
    if missing:
        raise ImportError(f"compat.nested_learning.install: nested_learning.hope.block has no {missing[0]}, "
                          "expected the blocks of nested-learning 0.2.0")
    return blocks
