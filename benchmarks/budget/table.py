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
        of = p["bounds_ms"]
        products = "of_matmul" in p and max(of.get("tensor", 0), of.get("GEMM", 0)) > of.get("memory", 0)
        told = f"{p['of_matmul']:.1%} of GEMM" if products else f"{p['of_copy']:.1%} of copy"
        rows.append((name, p["on"], f"{p['ms']:.3g}", p["limit"], told, bounds, added))
    head = "kernel, at its goal's size | on | predicted, ms | limit | of the rate of | bounds, ms | added, ms"
    return f"{markdown(head, rows)}\n\nPredictions, none of them measured. {COMMAND}"


def cross_check(budget: dict) -> str:
    rows = []
    for name, r in budget["cases"].items():
        s = r["sass"]
        if not r["kernels"]:  # PyTorch's alone
            continue
        rows.append((
            name, r["unit"], number(r["instructions"]), number(s["instructions"]), f"{s['of_ptx']:.2f}",
            f"{s['agreeing']:.1%}", f"{s['overhead']:.0%}", number(s["spills"]), f"{s['code_bytes'] / 1024:.0f}",
            f"{s['code_bytes_of_a_unit'] / 1024:.0f}", number(r["wavefronts"]), number(r["sectors"]),
        ))
    head = ("kernel | unit of work | PTX instructions | SASS instructions | SASS per PTX | agreeing "
            "| integers, predicates, branches, moves | spilled | code, KiB "
            "| of it in a unit, KiB | wavefronts | sectors")
    return (f"{markdown(head, rows)}\n\nWarp instructions of all warps. Agreeing: SASS instructions whose "
            "own PTX line ran as often as their basic block is taken to have run, or a whole number of times "
            "as often. Code in a unit: the instructions that a further unit issues, of all kernels it runs: what the "
            "instruction caches have to hold. "
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
            issued = r["sass"]["stages"].get(stage, (0, 0))
            in_groups = [
                sum(n for kind, n in s["classes"].items() if group_of(kind) in of) for of in COLUMNS.values()
            ]
            rows.append((
                stage, number(s["instructions"]), f"{s['instructions'] / whole:.1%}",
                *map(number, (*issued, *in_groups)),
                number(s["wavefronts"]), number(s["shared_bytes"] / 128), number(s["l2_bytes"]),
            ))
        head = " | ".join([
            "stage | PTX | share | SASS | warp cycles", *COLUMNS, "wavefronts | of them needed | L2 bytes"
        ])
        parts.append(f"**{name}**, a {r['unit']}: {number(whole)} PTX instructions of all warps, "
                     f"{number(r['sass']['instructions'])} of SASS\n\n{markdown(head, rows)}")
    kinds = "; ".join(f"{name}: {what}" for name, what in GROUPS.items())
    return "\n\n".join([*parts, f"Groups: {kinds}. Stages below 0.5% are left out. {COMMAND}"])


def changed(record: dict, saved: dict[str, float], warps: int = 1) -> tuple[float, str]:
    """(ms, limit) of a prediction if stages lost these shares of what they issue and take, and ``warps``
    times as many warps were resident."""
    s, p = record["sass"], record["prediction"]
    of = s["stages"]
    issued = sum(share * of[stage][0] for stage, share in saved.items()) / s["instructions"]
    cycles = sum(share * of[stage][1] for stage, share in saved.items()) / s["warp_cycles"]
    passes = sum(share * record["stages"][stage]["wavefronts"] for stage, share in saved.items())
    passes /= record["wavefronts"]
    left = {"issue": 1 - issued, "warp": (1 - cycles) / warps, "shared": 1 - passes}
    bounds = {name: ms * left.get(name, 1.0) for name, ms in p["bounds_ms"].items()}
    limit = max(bounds, key=lambda name: bounds[name])
    return bounds[limit] + sum(p["added_ms"].values()), limit


def changes(budget: dict) -> str:
    """What the CUDA kernels would take after changes that the counts suggest."""
    plans = (
        ("as it is", {}, 1),
        ("transformed keys once a (row, head), its 4 blocks taking a share each", {"transformed keys": 3 / 4}, 1),
        ("twice as many warps, with half the state each", {}, 2),
    )
    rows = []
    record = budget["cases"].get("prefill C64 D64 N256 cuda sm_90")
    for what, saved, warps in plans if record else ():
        ms, limit = changed(record, saved, warps)
        rate = record["prediction"]["of_matmul"] * record["prediction"]["ms"] / ms
        rows.append((what, f"{ms:.3g}", limit, f"{rate:.1%}"))
    head = "CUDA C++, N = 256, C = 64, sm_90 | predicted, ms | limit | of the GEMM rate"
    return (f"{markdown(head, rows)}\n\n"
            f"What a change itself costs (a barrier, an exchange) is not in it. {COMMAND}")


def verdict(value: float, low: float, high: float) -> str:
    """Of an earlier estimate ``low`` to ``high``; a tenth beyond is near."""
    if low <= value <= high:
        return "confirmed"
    return "nearly" if 0.9 * low <= value <= 1.1 * high else "refuted"


def claims(budget: dict) -> str:
    """What had been said of these kernels before they were counted."""
    of = budget["cases"]
    sass = lambda name: of[name]["sass"]
    predicted_ms = lambda name: of[name]["prediction"]["ms"]
    cuda, small = "prefill C64 D64 N256 cuda sm_90", "prefill C64 D64 N64 cuda sm_90"
    best, step = "prefill C16 D64 N64 cuda sm_90", "step C64 D64 N256 cuda sm_90"
    triton = "prefill C64 D64 N256 triton sm_90"
    share = lambda name, what: of[name]["prediction"][what]
    fla = 1e3 * budget["assumptions"]["H200 SXM"]["FLA"]["value"]
    grad = of["grad C64 D64 N256 triton sm_90"]
    backward = grad["instructions"] / of[triton]["instructions"] - 1
    backward_ms = predicted_ms("grad C64 D64 N256 triton sm_90") / (predicted_ms(triton) / 4) - 1
    rows = [
        (what, said, shown.format(value), verdict(value, low, high))
        for what, said, shown, value, low, high in (
            ("CUDA C++, N = 64, C = 16: SASS instructions a chunk and warp", "5,143", "{:,.0f}",
             sass(best)["instructions"] / 8, 5143, 5143),
            ("of them integers, addresses, predicates, branches, moves", "55%", "{:.0%}",
             sass(best)["overhead"], 0.55, 0.55),
            ("CUDA C++, N = 256, C = 64: SASS instructions a chunk and warp", "15,225", "{:,.0f}",
             sass(cuda)["instructions"] / 32, 15225, 15225),
            ("CUDA C++, N = 256, C = 64: of the GEMM rate", "11 to 13%", "{:.1%}", share(cuda, "of_matmul"),
             0.11, 0.13),
            ("CUDA C++, N = 64, C = 64: time of FLA's", "3.5 to 4", "{:.1f}", predicted_ms(small) / fla,
             3.5, 4),
            ("CUDA C++, decode, N = 256: of the copy rate", "40 to 50%", "{:.0%}", share(step, "of_copy"),
             0.40, 0.50),
            ("Triton, N = 256, C = 64: of the GEMM rate", "6 to 8%", "{:.1%}", share(triton, "of_matmul"),
             0.06, 0.08),
            ("Triton, backward for a forward: PTX instructions", "15 to 20", "{:.1f}", backward, 15, 20),
            (f"the same: time, with {grad['launches']:.0f} launches a chunk from CUDA graphs", "15 to 20", "{:.1f}",
             backward_ms, 15, 20),
        )
    ]
    return f"{markdown('what | said before | by count | verdict', rows)}\n\nNearly: within a tenth. {COMMAND}"


def assumptions(budget: dict) -> str:
    rows = []
    for machine, of in budget["assumptions"].items():
        for name, a in of.items():
            rows.append((machine, name, f"{a['value']:g} {a['unit']}".strip(), a["source"]))
    return f"{markdown('machine | what | taken as | from', rows)}\n\n`benchmarks/budget/bounds.py`."


BLOCKS: dict[str, Callable[[dict], str]] = {
    "budget_claims": claims, "budget_changes": changes, "budget_predictions": predictions,
    "budget_sass": cross_check, "budget_stages": stages, "budget_assumptions": assumptions,
}
