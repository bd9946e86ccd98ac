"""The tables of docs/budget.md, made from benchmarks/results/budget.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.budget.classes import GROUPS, group_of

COMMAND = "`python -m benchmarks.budget`, `benchmarks/results/budget.json`."
COLUMNS = {
    "tensor": ("tensor",), "floating point": ("float", "convert", "special"),
    "integer, address, predicate, branch": ("integer", "address", "predicate", "branch"),
    "moves, parameters": ("move", "parameter"), "shared, exchange": ("shared", "exchange"),
    "global": ("global", "copy", "atomic"), "barriers, fences": ("barrier", "fence"),
}
# what docs/budget.md shows stage by stage
SHOWN = (
    "prefill C16 D64 N64 cuda sm_90", "prefill C64 D64 N64 cuda sm_90", "prefill C64 D64 N256 cuda sm_90",
    "prefill C64 D64 N64 triton sm_90", "prefill C64 D64 N256 triton sm_90", "step C64 D64 N256 cuda sm_90",
    "grad C64 D64 N256 triton sm_90",
)


def markdown(head: str, rows: Iterable[Iterable[object]]) -> str:
    """``head``: "a | b | c"."""
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.3g}"


def predictions(budget: dict) -> str:
    rows = []
    for name, r in budget["cases"].items():
        p = r.get("prediction")
        if not p:
            continue
        bounds = ", ".join(f"{n} {v:.3g}" for n, v in p["bounds_ms"].items())
        added = ", ".join(f"{n} {v:.3g}" for n, v in p["added_ms"].items())
        share = [f"{p[n]:.1%} of {what}" for n, what in (("of_matmul", "GEMM"), ("of_copy", "copy")) if n in p]
        told = share[0] if share and "of_matmul" in p and r["kernel_of"]["kind"] in ("prefill", "grad") else share[-1]
        rows.append((name, p["on"], f"{p['ms']:.3g}", p["limit"], told, bounds, added))
    head = "kernel, at the size of its goal | on | predicted, ms | limit | of the rate of | bounds, ms | added, ms"
    return f"{markdown(head, rows)}\n\nPredictions, none of them measured. {COMMAND}"


def cross_check(budget: dict) -> str:
    rows = []
    for name, r in budget["cases"].items():
        s = r["sass"]
        rows.append((name, r["unit"], number(r["instructions"]), number(s["instructions"]), f"{s['of_ptx']:.2f}",
                     f"{s['agreeing']:.1%}", f"{s['overhead']:.0%}", number(r["wavefronts"]), number(r["sectors"])))
    head = ("kernel | unit of work | PTX instructions | SASS instructions | SASS per PTX | agreeing "
            "| integers, predicates, branches, moves | wavefronts | sectors")
    return (f"{markdown(head, rows)}\n\nWarp instructions of all warps. Agreeing: SASS instructions whose own PTX line "
            "ran as often as their basic block is taken to have run, or a whole number of times as often. "
            f"{COMMAND}")


def stages(budget: dict) -> str:
    parts = []
    for name in SHOWN:
        r = budget["cases"].get(name)
        if r is None:
            continue
        whole = r["instructions"]
        rows = []
        for stage, s in r["stages"].items():
            if s["instructions"] < whole / 200:
                continue
            sass, cycles = r["sass"]["stages"].get(stage, (0, 0))
            rows.append((
                stage, number(s["instructions"]), f"{s['instructions'] / whole:.1%}", number(sass), number(cycles),
                *(number(sum(n for kind, n in s["classes"].items() if group_of(kind) in g)) for g in COLUMNS.values()),
                number(s["wavefronts"]), number(s["shared_bytes"] / 128), number(s["l2_bytes"]),
            ))
        head = " | ".join([
            "stage | PTX | share | SASS | warp cycles", *COLUMNS, "wavefronts | of them needed | L2 bytes"
        ])
        parts.append(f"**{name}**, a {r['unit']}: {number(whole)} PTX instructions of all warps, "
                     f"{number(r['sass']['instructions'])} of SASS\n\n{markdown(head, rows)}")
    kinds = "; ".join(f"{name}: {what}" for name, what in GROUPS.items())
    return "\n\n".join([*parts, f"Groups: {kinds}. Stages below 0.5% are left out. {COMMAND}"])


def assumptions(budget: dict) -> str:
    rows = []
    for machine, of in budget["assumptions"].items():
        rows += [(machine, name, f"{a['value']:g} {a['unit']}".strip(), a["source"]) for name, a in of.items()]
    return f"{markdown('machine | what | taken as | from', rows)}\n\n`benchmarks/budget/bounds.py`."


BLOCKS: dict[str, Callable[[dict], str]] = {
    "budget_predictions": predictions, "budget_sass": cross_check, "budget_stages": stages,
    "budget_assumptions": assumptions,
}
