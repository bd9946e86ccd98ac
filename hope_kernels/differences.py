"""In which fields two configurations differ, and which of these a sequence may go on with.

A configuration says what a state holds (fields of the sequence: shapes, periods, the rule) and what the next
step does (fields of ``NEXT_STEP``: rates, optimizer, window, learning blocks). A state may be read with another
configuration if the two differ in the latter alone.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

from .config import Configuration

SHOWN = 3  # fields that an error names


class Difference(NamedTuple):
    """path: of the field, ``cms.chunks`` or ``cms[3].chunks``. given, expected: its two values."""

    path: str
    given: Any
    expected: Any


def differences(given: Any, expected: Any, every: bool = False, path: str = "") -> list[Difference]:
    """Of two configurations: the fields of the sequence in which they differ, or ``every`` field."""
    if given is expected or given == expected:
        return []
    if type(given) is not type(expected) or not isinstance(given, Configuration):
        return [Difference(path, given, expected)]
    found: list[Difference] = []
    for f in fields(given):
        if not every and f.name in given.NEXT_STEP:
            continue
        pair = (getattr(given, f.name), getattr(expected, f.name))
        found += _in_field(f"{path}.{f.name}" if path else f.name, *pair, every)
    return found


def _in_field(path: str, given: Any, expected: Any, every: bool) -> list[Difference]:
    if isinstance(given, tuple) != isinstance(expected, tuple):  # one for all, against one each
        given, expected = _each(given, expected), _each(expected, given)
    both = isinstance(given, tuple) and isinstance(expected, tuple) and len(given) == len(expected)
    if both and any(isinstance(v, Configuration) for v in (*given, *expected)):
        return [d for i, pair in enumerate(zip(given, expected)) for d in differences(*pair, every, f"{path}[{i}]")]
    return differences(given, expected, every, path)


def _each(value: Any, like: Any) -> Any:
    return (value,) * len(like) if isinstance(value, Configuration) else value


def described(found: list[Difference], given: Any, expected: Any) -> str:
    """'belongs to X(a=1, ...) and not to X(a=2, ...)': of two configurations, the fields ``found`` alone."""
    if type(given) is not type(expected):
        return f"belongs to a {type(given).__name__} and not to a {type(expected).__name__}"
    sides = []
    for config, value in ((given, lambda d: d.given), (expected, lambda d: d.expected)):
        named = ", ".join(f"{d.path}={_short(value(d))}" for d in found[:SHOWN])
        sides.append(f"{type(config).__name__}({named}, ...)")
    return " and not to ".join((f"belongs to {sides[0]}", sides[1]))


def _short(value: Any) -> str:
    return f"{type(value).__name__}(...)" if isinstance(value, Configuration) else repr(value)
