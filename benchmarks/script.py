"""What a run of benchmarks.gpu on a card is made of, so that a rehearsal without one can be made of other
things and take the same way: a module with a ``SCRIPT``, by default ``benchmarks.card``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import measure as m

CARD, REHEARSAL = "benchmarks.card", "benchmarks.rehearsal"


@dataclass(frozen=True)
class Script:
    """device: of the cases' tensors. folder: of the results. parts(quick): {"env", "worth", "sweeps",
    "peers"}: cases as ``plan`` yields them. tests: by backend, the most important first. load: Python code
    after which the library of the CUDA C++ kernels can be used. sanitized: the test that compute-sanitizer
    watches. capability: 10 * major + minor. compiled: parts of the names of the cases whose Triton kernels
    are compiled ahead; None: all. variables: of the environment of all processes. root: what the tests' ids
    are relative to. Seconds: after which a test or a case (by section, else "") counts as hanging."""

    device: str
    folder: Callable[[], str]
    parts: Callable[[bool], dict[str, list]]
    tests: Mapping[str, tuple[str, ...]]
    sanitized: str
    capability: Callable[[], int]
    load: str = ""
    compiled: tuple[str, ...] | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    root: Path = m.ROOT
    test_seconds: Mapping[str, float] = field(default_factory=lambda: {"cuda": 30, "triton": 110})
    case_seconds: Mapping[str, float] = field(default_factory=lambda: {"": 40, "model": 80, "peers": 50})

    def limit(self, section: str) -> float:
        return self.case_seconds.get(section, self.case_seconds[""])


def named(module: str) -> Script:
    return importlib.import_module(module).SCRIPT
