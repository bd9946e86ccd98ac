"""The goals (goals.py) beside what was measured: met, missed by how much, or not measured; and beside what counts
predict (benchmarks/budget), which is no measurement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.budget import predicted
from benchmarks.goals import GOALS, Goal, Missing
from benchmarks.records import origins, runs
from benchmarks.sources import age


@dataclass(frozen=True)
class Row:
    """A goal on one device, or on none. ``value`` None: ``verdict`` is "not measured" and ``why`` says
    why."""

    goal: Goal
    device: str
    value: float | None
    verdict: str
    why: str = ""
    age: str = ""
    dirty: bool = False
    predicted: float | None = None


def rows(results: Path, goals: tuple[Goal, ...] = GOALS) -> list[Row]:
    """Every goal once for each device that has its figure; once without a device where none has."""
    found: list[Row] = []
    everywhere = runs(results)
    budget = everywhere[""].get("budget")
    for goal in goals:
        guess = predicted.value(goal, budget)
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
            mine.append(Row(goal, device or "cpu", figure.value, goal.verdict(figure.value), "", old, stale, guess))
        why = "; ".join(reasons) or "no run on a GPU"
        found += mine or [Row(goal, "", None, "not measured", why, predicted=guess)]
    return found


def table(found: list[Row]) -> list[tuple[str, ...]]:
    """(what, goal, predicted, measured, verdict, device) as text."""
    sign = {">=": "at least ", "<=": "at most "}
    shown = lambda goal, value: "" if value is None else goal.text(value)
    return [(r.goal.what, sign[r.goal.better] + r.goal.text(r.goal.target), shown(r.goal, r.predicted),
             shown(r.goal, r.value), r.verdict, r.device) for r in found]
