"""The libraries of the extra ``text``, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """A library that the package itself does not depend on is not installed."""


def extra(module: str, what: str) -> ModuleType:
    """The module. Raises MissingExtra, which says how to install it, where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingExtra(
            f"{what} needs the package {name!r} ({error}); install it with pip install 'hope_kernels[text]'"
        ) from None
