"""Which implementation of an operator serves a call.

Each operator's folder lists its implementations in a ``backends.py``, in order of preference; ``choose`` takes
the first that may be chosen and serves. It knows no operator by name. A choice follows from configuration,
dtype, device and the gradients asked for, never from the shape of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NamedTuple

import torch

from .tracing import constant_result

NO_GRADIENT, BY_INPUTS, BY_ALL = "none", "inputs", "all"


class Request(NamedTuple):
    """What a choice depends on. gradient: NO_GRADIENT; BY_INPUTS: fast weights, writes and parameters are
    constants (the inner gradient of a learning model); BY_ALL: training."""

    config: Any
    dtype: torch.dtype
    device: torch.device
    gradient: str


def gradient(constants: bool) -> str:
    """The gradients that a call may be asked for: none under no_grad, else by inputs alone where everything
    else is constant."""
    return NO_GRADIENT if not torch.is_grad_enabled() else BY_INPUTS if constants else BY_ALL


class Entry(NamedTuple):
    """One implementation of an operator.

    backend: its name. load: the implementation for a call, importing what it needs. unserved: why it cannot
    serve a call, or None. unavailable: why this process cannot use it at all, or None. default: it may be chosen
    where the caller names no backend. serves: names of other backends that it stands in for, "*" for all.
    """

    backend: str
    load: Callable[[Request], Any]
    unserved: Callable[[Request], str | None] = lambda request: None
    unavailable: Callable[[], str | None] = lambda: None
    default: bool = False
    serves: tuple[str, ...] = ()

    def answers(self, backend: str | None) -> bool:
        """Whether it may be chosen where the caller asks for ``backend``."""
        if backend is None:
            return self.default
        return backend == self.backend or backend in self.serves or "*" in self.serves


def choose(op: str, entries: Iterable[Entry], request: Request, backend: str | None = None) -> Any:
    """The implementation by the first of ``entries`` that serves ``request``, of those for ``backend`` (None: the
    best one verified on the device: the Triton and CUDA kernels, which no GPU has run yet, only on request).

    Raises ValueError, with the reason, for an unknown backend and for one that cannot serve.
    """
    if backend is not None and backend not in names():
        raise ValueError(f"{op}: unknown backend {backend!r}, expected one of {names()}")
    reason = "it has no such operator"
    for entry in entries:
        if entry.answers(backend):
            why = entry.unavailable()
            if why is None:
                why = entry.unserved(request)
            if why is None:
                return entry.load(request)
            reason = why
    raise ValueError(
        f"{op}: backend {backend!r} cannot be used: {reason}; the chunked backend serves every configuration"
    )


@cache
def _listed() -> dict[str, Entry]:
    """By name, the first entry of every backend that the folders of ops/ list, the longest list first."""
    lists: list[tuple[Entry, ...]] = []
    for folder in iter_modules([str(Path(__file__).with_name("ops"))]):
        module = f"{__package__}.ops.{folder.name}.backends"
        if folder.ispkg and find_spec(module) is not None:
            lists.append(import_module(module).ENTRIES)
    found: dict[str, Entry] = {}
    for entry in chain.from_iterable(sorted(lists, key=len, reverse=True)):
        found.setdefault(entry.backend, entry)
    return found


@constant_result
def names() -> tuple[str, ...]:
    """The names of all backends."""
    return tuple(_listed())


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if it can be used here, else the reason why not."""
    return {name: entry.unavailable() for name, entry in _listed().items()}
