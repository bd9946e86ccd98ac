"""Libraries of the extras, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """A library that the package itself does not depend on is not installed."""


def extra(module: str, what: str, name: str = "text") -> ModuleType:
    """The module, which ``what`` needs. Raises MissingExtra, which names the extra that installs it, where it
    is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(f"{what} needs the package {package!r} ({error}); install it with pip install "
                           f"'hope_kernels[{name}]'") from None
