"""The result files: how a run writes them, and how they are read.

benchmarks/results holds the files of the CPU's own commands and a folder for each device that benchmarks.gpu
has measured. A record is a dict that says what was measured and which code ("case" or "kernel_of", "kernel").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.machine import machine, write_json
from benchmarks.measure import source_hash

RESULTS = Path(__file__).parent / "results"

# -- written -------------------------------------------------------------------------------------------------


class Results:
    """One JSON file: {"stamp", "cases": {name: record}}, rewritten whole after every record; ``path`` None
    keeps it in memory.

    Records of the same code that ``keep(name)`` wants are taken over from the file; a file of other code is
    replaced by the first record.
    """

    def __init__(self, path: Path | None, stamp: dict, keep: Callable[[str], bool] = lambda name: True):
        self.path, self.data = path, {"stamp": stamp, "cases": {}}
        if path is None or not path.exists():
            return
        found = json.loads(path.read_text())
        if all(found["stamp"].get(k) == stamp[k] for k in ("commit", "source", "quick")):
            kept = {n: r for n, r in found["cases"].items() if keep(n)}
            self.data = {"stamp": found["stamp"], "cases": kept}
            if len(self.cases) < len(found["cases"]):
                write_json(str(path), self.data)

    @property
    def cases(self) -> dict[str, dict]:
        return self.data["cases"]

    def put(self, name: str, record: dict) -> None:
        self.cases[name] = record
        if self.path is not None:
            write_json(str(self.path), self.data)

    def reload(self) -> None:
        """What another process has written meanwhile."""
        self.data = Results(self.path, self.data["stamp"]).data

    def note(self, missing: dict[str, str]) -> None:
        """The end of a run: what was not measured, and why."""
        self.data["missing"] = missing
        if self.path is not None:
            write_json(str(self.path), self.data)

    def drop(self, name: str) -> None:
        self.data["cases"].pop(name)
        write_json(str(self.path), self.data)


def stamp(quick: bool) -> dict:
    found = machine()
    return {
        "commit": found["commit"], "dirty": found["dirty"], "source": source_hash(), "quick": quick,
        "date": found["date"]
    }


# -- read ----------------------------------------------------------------------------------------------------


def load(folder: Path) -> dict[str, dict]:
    """{file name without .json: contents} of one folder."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}


def runs(results: Path) -> dict[str, dict[str, dict]]:
    """"": the files of the CPU; then every device's folder by name (trials with --quick are no results)."""
    devices = (
        sorted(p.name for p in results.iterdir() if p.is_dir() and not p.name.endswith("-quick"))
        if results.exists() else []
    )
    return {"": load(results)} | {name: load(results / name) for name in devices}


def origins(data: dict) -> list[dict]:
    """{"commit", "dirty", "date", ...}: where the parts of a result file come from."""
    if "stamp" in data or "machine" in data:
        return [data.get("stamp") or data["machine"]]
    return [found for value in data.values() if isinstance(value, dict) for found in origins(value)]


def measured(data: dict, name: str = "") -> Iterator[tuple[str, dict]]:
    """(name, record) of everything in a result file that says which code it measured; the whole file where
    nothing in it does."""
    found = list(_marked(data, name))
    yield from found or [(name, data)]


def _marked(data, name: str) -> Iterator[tuple[str, dict]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    if isinstance(data, dict) and (
        data.get("kernel_of") or data.get("kernel") or (data.get("case") and data.get("status") == "ok")
    ):
        yield name, data
        return
    for key, value in items:
        if key not in ("stamp", "machine"):
            yield from _marked(value, name if key == "cases" else f"{name} {key}".strip())


def read(path: Path) -> dict[str, dict]:
    """A result file or a folder of them. Raises ValueError where there is none."""
    if not (path.suffix == ".json" and path.is_file() or any(path.glob("*.json"))):
        raise ValueError(f"{path} is not a result file and holds none")
    return load(path) if path.is_dir() else {path.stem: json.loads(path.read_text())}


def dirty(results: Path) -> list[str]:
    """Files measured in a working tree with changes."""
    return [f"{device}/{stem}.json".removeprefix("/") for device, run in runs(results).items()
            for stem, data in run.items() if any(o.get("dirty") for o in origins(data))]
