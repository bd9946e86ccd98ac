"""States of sequences that were read separately as the state of one batch (``State.join``).

Two states of one configuration differ in structure where one sequence has needed a tensor and the other has
not: weights of its own, an accumulator, a longer buffer. Each kind of state makes them alike
(``State._alike``); then tensors and counters are put one behind the other, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .counters import AnyState, Counters
from .differences import described, differences

OP = "State.join"


def joined(states: Sequence[Any]) -> Any:
    """``State.join``, where the errors are listed."""
    if not isinstance(states, (list, tuple)):
        raise TypeError(f"{OP}: argument states is a {type(states).__name__}, expected a list of states")
    if not states:
        raise ValueError(f"{OP}: argument states is empty, expected one state or more")
    states, first = list(states), states[0]
    for i, state in enumerate(states):
        if not isinstance(states[i], AnyState):
            raise TypeError(f"{OP}: states[{i}] is a {type(state).__name__}, expected a state")
        if type(state) is not type(first):
            kinds = type(state).__name__, type(first).__name__
            raise TypeError(f"{OP}: states[{i}] is a {kinds[0]}, and states[0] a {kinds[1]}")
        if state.config is not first.config and state.config != first.config:
            found = differences(state.config, first.config, every=True)
            what = described(found, state.config, first.config)
            raise ValueError(f"{OP}: states[{i}] {what}, which states[0] has; a call of one model gives both its "
                             "settings")
    for state in states:
        state.settle()
    _check_places(states)
    return _state(states, "state")


def _check_places(states: list[Any]) -> None:
    """One device, and one dtype as far as the tensors say."""
    places = [next((t.device for t in s.tensors()), None) for s in states]
    for name, found in (("device", places), ("input dtype", [s.input_dtype() for s in states])):
        known = [(i, value) for i, value in enumerate(found) if value is not None]
        for i, value in known[1:]:
            if value != known[0][1]:
                j, other = known[0]
                raise ValueError(f"{OP}: states[{i}] has {name} {value}, and states[{j}] {other}; "
                                 "state.to(...) moves and casts")


def _state(states: list[Any], name: str) -> Any:
    owner, mark = _weights(states, name)
    alike = type(states[0])._alike(states)
    parts = [dict(s._fields()) for s in alike]
    fields = {n: _part([p[n] for p in parts], f"{name}.{n}") for n in parts[0]}
    return replace(alike[0], owner=owner, fingerprint=mark, **fields)._tidied()


def _weights(states: list[Any], name: str) -> tuple[Any, Any]:
    """The module that has read the states (None: not one), and the mark of its weights."""
    owners = {id(s.owner): s.owner for s in states}
    marks = [(i, s.fingerprint) for i, s in enumerate(states) if s.fingerprint is not None]
    for i, mark in marks[1:]:
        first, other = marks[0]
        if mark is not other and str(mark) != str(other):
            raise ValueError(f"{OP}: {name} of states[{i}] belongs to weights {mark}, and of states[{first}] "
                             f"to weights {other}; state.adopt(module) says that it may go on with others")
    return next(iter(owners.values())) if len(owners) == 1 else None, marks[0][1] if marks else None


def _part(values: list[Any], name: str) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and all(isinstance(v, Tensor) for v in values):
        for i, v in enumerate(values):
            if v.shape[1:] != first.shape[1:] or v.dtype != first.dtype or v.device != first.device:
                raise ValueError(_other(name, i, v, first))
        return torch.cat(values)
    if isinstance(first, Counters) and all(isinstance(v, Counters) for v in values):
        return Counters([n for v in values for n in v])
    if isinstance(first, AnyState) and all(type(v) is type(first) for v in values):
        return _state(values, name)
    if isinstance(first, list) and all(isinstance(v, list) and len(v) == len(first) for v in values):
        return [_part(list(of), f"{name}[{i}]") for i, of in enumerate(zip(*values))]
    if isinstance(first, dict) and all(isinstance(v, dict) and v.keys() == first.keys() for v in values):
        return {n: _part([v[n] for v in values], f"{name}.{n}") for n in first}
    for i, v in enumerate(values):
        if type(v) is not type(first) or not isinstance(first, (type(None), int, str)) or v != first:
            raise ValueError(_other(name, i, v, first))
    return first


def _other(name: str, i: int, value: Any, first: Any) -> str:
    return f"{OP}: {name} of states[{i}] is {_seen(value)}, and of states[0] {_seen(first)}"


def _seen(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of rows {list(value.shape[1:])}, {value.dtype} on {value.device}"
    return repr(value) if isinstance(value, (type(None), int, str)) else f"a {type(value).__name__}"
