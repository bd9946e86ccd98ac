"""What states and their files both need: counters on the host, the names of states, and their base."""

from __future__ import annotations

KINDS: dict[str, type] = {}  # every kind of state by its name in files


class AnyState:
    """Base of all states (``state.State``), where what they can do must not be imported."""


class Counters(list):
    """One int per row, kept on the host: advancing a state never asks the device."""
