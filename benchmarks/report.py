"""Goals against committed results, and whether those results still describe the code.

    python -m benchmarks.report [--check] [--results DIR] [--against OLD NEW]

Prints a row a goal (``goals.py``): met, missed by how much, or not measured and which command would. Below
it: results of a working tree with changed files, results older than the code they measured (``sources.py``),
results that do not say. --check fails, naming them, for results that are older, and for tables or plots in
README and docs that are not what the results give. Of studies, whose figures are what a model predicted and
not how fast, it only says that they are older. --against compares two runs, files or folders: what got slower
or faster beyond its spread (with --check, slower fails).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.goals import GOALS, Goal, Missing, unplanned
from benchmarks.sources import ROOT, age

RESULTS = ROOT / "benchmarks" / "results"
# hours of reading; their arithmetic is held by the tests
STUDIES = ("rates.json", "continual.json", "learning.json", "recall.json")


# -- what is there ------------------------------------------------------------------------------------------------------------


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
    """(name, record) of everything in a result file that says which code it measured, or, where nothing does,
    the file itself."""
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


def ages(results: Path) -> dict[str, list[tuple[str, str]]]:
    """{"older" or "unknown": [(file, record)]} over all results."""
    found: dict[str, list[tuple[str, str]]] = {"older": [], "unknown": []}
    for device, run in runs(results).items():
        for stem, data in run.items():
            if stem in ("env", "correctness"):
                continue
            for name, record in measured(data):
                if (how := age(record)) in found:
                    found[how].append((f"{device}/{stem}.json".removeprefix("/"), name))
    return found


def dirty(results: Path) -> list[str]:
    return [f"{device}/{stem}.json".removeprefix("/") for device, run in runs(results).items() for stem,
            data in run.items()
            if any(o.get("dirty") for o in origins(data))]


# -- goals --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A goal on one device, or on none. ``value`` None: ``verdict`` is "not measured" and ``why`` says why."""

    goal: Goal
    device: str
    value: float | None
    verdict: str
    why: str = ""
    age: str = ""
    dirty: bool = False


def rows(results: Path, goals: tuple[Goal, ...] = GOALS) -> list[Row]:
    """Every goal once a device that has its figure; once without, where none has."""
    found: list[Row] = []
    everywhere = runs(results)
    for goal in goals:
        chosen = (
            {"": everywhere[""]} if goal.on == "cpu"
            else {d: r for d, r in everywhere.items() if d and not d.startswith("cpu-")}
        )
        mine, reasons = [], []
        for device, run in chosen.items():
            try:
                figure = goal.figure.find(run)
            except Missing as e:
                reasons.append(f"{device}: {e}".removeprefix(": "))
                continue
            seen = {age(record) for _, _, record in figure.sources if record}
            old = next((how for how in ("older", "unknown") if how in seen), "")
            stale = any(o.get("dirty") for file, _, _ in figure.sources for o in origins(run[file]))
            mine.append(Row(goal, device or "cpu", figure.value, goal.verdict(figure.value), "", old, stale))
        found += mine or [Row(goal, "", None, "not measured", "; ".join(reasons) or "no run on a GPU")]
    return found


def table(found: list[Row]) -> list[tuple[str, ...]]:
    """(what, goal, measured, verdict, device) as text."""
    sign = {">=": "at least ", "<=": "at most "}
    return [(r.goal.what, sign[r.goal.better] + r.goal.text(r.goal.target), "" if r.value is None else r.goal.text(r.value), r.verdict,
             r.device) for r in found]


def plan() -> dict[str, list[str]]:
    """The cases that benchmarks.gpu measures on a CUDA machine, by section."""
    from benchmarks import gpu

    found: dict[str, list[str]] = {}
    for section, name, _, _ in gpu.plan("cuda", False):
        found.setdefault(section, []).append(name)
    return found


def columns(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def goals(results: Path) -> str:
    """The table, what there is to say about its figures, and what would measure the others."""
    found, planned = rows(results), plan()
    lines = [columns([("what", "goal", "measured", "verdict", "on"), *table(found)]), ""]
    for r in found:
        notes = [{"older": "older than the code", "unknown": "of unknown age"}[r.age]] if r.age else []
        if notes := [*notes, *["measured with changed files"] * r.dirty]:
            lines.append(f"{r.goal.what}, on {r.device}: {', '.join(notes)}")
    for why in dict.fromkeys(r.why for r in found if r.value is None):
        lines += ["", f"Not measured ({why}); what would:"]
        for r in found:
            if r.value is None and r.why == why:
                where = "; ".join(dict.fromkeys(f"{k.file}.json: {k.name}" for k in r.goal.figure.keys))
                lines.append(
                    f"  {r.goal.command} -> {where}{', NO SUCH CASE YET' * any(unplanned(r.goal, planned))}"
                )
    counts = {"met": 0, "missed": 0, "not": 0}
    for r in found:
        counts[r.verdict.split()[0]] += 1
    return "\n".join([*lines, "", f"{counts['met']} met, {counts['missed']} missed, {counts['not']} not measured"])


# -- slower or faster ---------------------------------------------------------------------------------------------------------


def committed(folder: Path) -> dict[str, dict]:
    """A folder of results as the last commit has it; as it is on disk where git cannot say."""
    found = {}
    for name in (p.name for p in sorted(folder.glob("*.json"))):
        done = subprocess.run(("git", "show", f"HEAD:./{name}"), cwd=folder, capture_output=True, text=True)
        try:
            found[name.removesuffix(".json")] = json.loads(
                done.stdout if done.returncode == 0 else (folder / name).read_text()
            )
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
                yield f"{section}: {name}", f"{text} ({was['ms']['median']:.4f} -> {record['ms']['median']:.4f} ms)"


def read(path: Path) -> dict[str, dict]:
    """A result file or a folder of them. Raises ValueError where there is none."""
    if not (path.suffix == ".json" and path.is_file() or any(path.glob("*.json"))):
        raise ValueError(f"report: {path} is no result file and holds none")
    return load(path) if path.is_dir() else {path.stem: json.loads(path.read_text())}


# -- the command --------------------------------------------------------------------------------------------------------------


def older(results: Path) -> dict[str, str]:
    """{file: what is said of a result that is older than the code it measured}."""
    bad: dict[str, list[str]] = {}
    for file, name in ages(results)["older"]:
        bad.setdefault(file, []).append(name)
    return {file: f"{file}: older than the code it measured{': ' if names != [''] else ''}{', '.join(names[:5])}"
                  f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}" for file, names in bad.items()}


def check(results: Path, documents: Path) -> list[str]:
    """What is wrong with committed results and what is written about them."""
    from benchmarks import plot, tables

    problems = [text for file, text in older(results).items() if file not in STUDIES]
    made = "not what the results give (python -m benchmarks."
    problems += [f"{file}: table {block} is {made}tables)" for file, block in tables.stale(results, documents)]
    problems += [f"{name} is {made}plot)" for name in plot.stale(results, documents)]
    return problems


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument(
        "--check", action="store_true", help="fail where a result is older than its code or a document differs from results"
    )
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    p.add_argument("--documents", type=Path, default=ROOT, metavar="DIR", help="where README.md and docs are")
    p.add_argument(
        "--against", type=Path, nargs=2, metavar=("OLD", "NEW"),
        help="two result files, or folders of one device each"
    )
    args = p.parse_args(argv)
    if args.against:
        try:
            found = list(changes(*(read(path) for path in args.against)))
        except ValueError as e:
            p.error(str(e))
        print(
            "\n".join(f"{name}: {text}" for name, text in found) or "nothing is slower or faster beyond its spread"
        )
        return int(args.check and any(not text.startswith("faster") for _, text in found))
    print(goals(args.results))
    for file in dirty(args.results):
        print(f"{file}: measured in a working tree with changed files")
    old = ages(args.results)
    for file in dict.fromkeys(file for file, _ in old["unknown"]):
        print(f"{file}: does not say which code it measured, age unknown")
    for file, text in older(args.results).items():
        if file in STUDIES:
            print(f"note: {text}")
    problems = check(args.results, args.documents)
    for text in problems:
        print(f"{'WRONG' if args.check else 'note'}: {text}")
    return int(args.check and bool(problems))


if __name__ == "__main__":
    sys.exit(main())
