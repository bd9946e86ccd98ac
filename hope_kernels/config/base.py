"""What all configurations share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from .checks import require


@dataclass(frozen=True)
class Configuration:
    """What the configurations share: presets, overrides, and plain-data form for files."""

    PRESETS: ClassVar[dict[str, dict]] = {}
    # Fields that say what the next step does, and nothing about what a state holds: a sequence may be continued
    # with other values of them (``differences.py``). All others are of the sequence.
    NEXT_STEP: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The named preset of this configuration, with ``overrides`` on top. Raises ValueError for an unknown
        name."""
        if not isinstance(name, str) or name not in cls.PRESETS:
            raise ValueError(
                f"{cls.__name__}.preset: unknown preset {name!r}, expected one of {sorted(cls.PRESETS)}"
            )
        return cls(**{**cls.PRESETS[name], **overrides})

    def replace(self, **overrides: Any) -> Self:
        return dataclasses.replace(self, **overrides)

    def to_dict(self) -> dict:
        """Plain data (JSON-ready); ``from_dict`` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Self:
        """The configuration of ``to_dict``. Raises ValueError for anything but a dict of its fields with all
        that have no default."""
        require(isinstance(data, dict), cls.__name__, "its plain data", data, "a dict")
        fields = dataclasses.fields(cls)
        unknown = sorted(map(str, set(data) - {f.name for f in fields}))
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}; this file may come from a newer version")
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in data]
        if missing:
            raise ValueError(f"{cls.__name__}: fields {missing} are missing")
        return cls(**data)
