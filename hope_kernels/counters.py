"""What a state keeps on the host: one integer per row; and the names of states in files."""

from __future__ import annotations

KINDS: dict[str, type] = {}  # every kind of state by its name in files


class Counters(list):
    """One int per row, kept on the host: advancing a state never asks the device."""
