"""What got slower, faster or wrong between two runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path


def committed(folder: Path) -> dict[str, dict]:
    """A folder of results as the last commit has it; as it is on disk where git cannot say."""
    found = {}
    for name in (p.name for p in sorted(folder.glob("*.json"))):
        try:
            command = ("git", "show", f"HEAD:./{name}")
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            text = done.stdout if done.returncode == 0 else (folder / name).read_text()
        except FileNotFoundError:  # no git on this machine
            text = (folder / name).read_text()
        try:
            found[name.removesuffix(".json")] = json.loads(text)
        except ValueError:
            continue
    return found


def change(before: dict, after: dict) -> str | None:
    """"slower by x%" or "faster by x%" where the times of two records are apart by more than their spread:
    even the fastest call of the slower one takes longer than nine in ten (and than the median) of the
    other."""
    old, new = before.get("ms"), after.get("ms")
    if not old or not new:
        return None
    ratio = new["median"] / old["median"]
    if new["min"] > old["median"] and new["median"] > old["p90"]:
        return f"slower by {ratio - 1:.0%}"
    if old["min"] > new["median"] and old["median"] > new["p90"]:
        return f"faster by {1 / ratio - 1:.0%}"
    return None


def changes(before: dict[str, dict], after: dict[str, dict]) -> Iterator[tuple[str, str]]:
    """(case, what changed) between two runs {section: file contents}: times, and results that are no longer
    right."""
    for section, data in after.items():
        old = before.get(section, {})
        if old.get("stamp", {}).get("quick") != data.get("stamp", {}).get("quick"):
            continue
        for name, record in data.get("cases", {}).items():
            was = old.get("cases", {}).get(name, {})
            if was.get("status") != "ok" or not isinstance(record, dict):
                continue
            if record.get("status") in ("refused", "failed", "died"):
                yield f"{section}: {name}", f"{record['status']}, was ok: {record.get('reason')}"
            elif record.get("status") == "ok" and (text := change(was, record)):
                times = f"{was['ms']['median']:.4f} -> {record['ms']['median']:.4f} ms"
                yield f"{section}: {name}", f"{text} ({times})"
