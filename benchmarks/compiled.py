"""What compilers made of kernels, under a hash of everything that decides it: looked up instead of compiled
again.

Two places: build/compile_report, and benchmarks/compiled.json, which is committed, so that a fresh clone
compiles what has changed since and nothing else. `python -m benchmarks.compile_report --keep` writes it anew.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache

from hope_kernels.files import write_atomically
from tools.build_cuda import ROOT

CACHE = ROOT / "build" / "compile_report"
COMMITTED = ROOT / "benchmarks" / "compiled.json"


@cache
def committed() -> dict[str, list[dict]]:
    return json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}


class Differs(Exception):
    """What is known of a kernel is not what its compiler makes of it."""


def known(key: str) -> list[dict] | None:
    """The records under this hash: one a kernel. None: nobody has compiled it yet."""
    path = CACHE / f"{key}.json"
    return json.loads(path.read_text()) if path.exists() else committed().get(key)


def records(key: str, make: Callable[[], list[dict]], fresh: bool = False, again: float = 0) -> list[dict]:
    """What is known under this hash, or what ``make`` finds. fresh: made whatever is known. again: the share
    of what is known that is made once more, by chance. Raises Differs, and what ``make`` does."""
    before = known(key)
    checked = before is not None and random.random() < again
    if before is not None and not fresh and not checked:
        return before
    found = make()
    if checked and (fields := differing(before, found)):
        raise Differs(f"not what is known of it under {key}: {'; '.join(fields)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    write_atomically(str(CACHE / f"{key}.json"), json.dumps(found).encode())
    return found


def commit(found: dict[str, list[dict]]) -> None:
    """Writes the committed file: these and no others, a line each."""
    lines = (f"{json.dumps(key)}: {json.dumps(records)}" for key, records in sorted(found.items()))
    write_atomically(str(COMMITTED), ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def differing(known: list[dict], anew: list[dict]) -> list[str]:
    """Where a compilation found something else than is known, the time it took left out."""
    if len(known) != len(anew):
        return [f"{len(known)} kernels were known, {len(anew)} are compiled"]
    return [f"{old.get('kernel')}: {field} was {old.get(field)} and is {new.get(field)}"
            for old, new in zip(known, anew) for field in sorted((old.keys() | new.keys()) - {"seconds"})
            if old.get(field) != new.get(field)]


def violation(error: Exception) -> str:
    """What a record says that could not be made."""
    return str(error) if isinstance(error, Differs) else f"does not compile: {type(error).__name__}: {error}"
