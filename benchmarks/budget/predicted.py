"""The budget's predictions in the form of a run of benchmarks.gpu, so that goals look into them as into
results.

They are never written among results: only the goals table shows them, in a column of their own.
"""

from __future__ import annotations

from benchmarks.goals import Goal, Missing, lookup

MACHINE = "H200 SXM"
# of one width, and as many tokens: the same time
FLA = "fla C64 D64 N64 H32 B4 T8192 bf16", "fla C64 D64 N256 H32 B1 T32768 bf16"


def run(budget: dict) -> dict[str, dict]:
    """{"ops": {"stamp", "cases"}, ...}: the cases of benchmarks.gpu that a prediction answers."""
    found: dict[str, dict] = {}

    def put(file: str, name: str, record: dict) -> None:
        cases = found.setdefault(file, {"stamp": {}, "cases": {}})["cases"]
        cases[name] = {"status": "ok", **record}

    for record in budget["cases"].values():
        p = record.get("prediction", {})
        if p.get("on") != MACHINE or not p.get("measured_as"):
            continue
        file, name = p["measured_as"].split(": ")
        shares = {n: p[n] for n in ("of_matmul", "of_copy") if n in p}
        put(file, name, {"ms": {"median": p["ms"]}, "plain": shares, **shares})
    reading = "prefill C64 D64 N256 H32 B1 T32768 bf16 triton"
    learning = "grad C64 D64 N256 H32 B1 T8192 bf16 triton"
    cases = found.get("ops", {}).get("cases", {})
    if reading in cases and learning in cases:
        # a forward of as many tokens as the gradient: a quarter of the reading
        forward = lookup(cases[reading], "ms.median") / 4
        cases[learning]["backward_per_forward"] = lookup(cases[learning], "ms.median") / forward - 1
    if (fla := budget["assumptions"].get(MACHINE, {}).get("FLA")) is not None:
        for name in FLA:
            put("peers", name, {"ms": {"median": 1e3 * fla["value"]}})
    return found


def value(goal: Goal, budget: dict | None) -> float | None:
    """What the counts predict for a goal; None where they say nothing."""
    if budget is None or goal.on != "gpu":
        return None
    try:
        return goal.figure.find(run(budget)).value
    except Missing:
        return None
