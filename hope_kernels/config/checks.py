"""What a value of a field may be: every check raises ValueError with the configuration, the field, the value and
what was expected."""

from __future__ import annotations

import sys
from typing import Any

# the most that a width, a number of tokens, a number of blocks may be
SIZE, PERIOD, LAYERS = 2**31 - 1, 2**62, 2**16


def require(condition: bool, where: str, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{where}: {field} is {value!r}, expected {expected}")


def one_of(where: str, field: str, value: Any, options: tuple) -> None:
    require(value in options, where, field, value, "one of " + ", ".join(map(repr, options)))


def flags(config: Any, where: str, *fields: str) -> None:
    """Checks switches; 0, 1 and NumPy's become bools."""
    for field in fields:
        require(
            getattr(getattr(config, field), "ndim", 0) == 0, where, field, getattr(config, field), "True or False"
        )
        one_of(where, field, getattr(config, field), (True, False))
        object.__setattr__(config, field, bool(getattr(config, field)))


def positive_int(where: str, field: str, value: Any, most: int = SIZE) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool)
    require(ok and value > 0, where, field, value, "a positive integer")
    require(value <= most, where, field, value, f"at most {most}")


def finite(where: str, field: str, value: Any) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    require(ok, where, field, value, "a finite number")


def items(where: str, field: str, value: Any, expected: str) -> tuple:
    require(isinstance(value, (list, tuple)), where, field, value, expected)
    return tuple(value)
