"""A mark for torch.compile that costs nothing until something is compiled: importing the compiler takes ten times
as long as importing this package, and most programs never compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant_result(function: F) -> F:
    """``torch.compiler.assume_constant_result``: the compiler calls ``function`` and takes its result for a
    constant."""
    function._dynamo_marked_constant = True  # all that PyTorch's decorator does, after importing the compiler
    return function
