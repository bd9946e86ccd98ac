"""What a run of benchmarks.gpu says last: what failed, what was measured, what was not."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.correctness import OUTCOMES
from benchmarks.plan import plan
from benchmarks.records import Results
from benchmarks.run import wanted

BAD = ("failed", "refused", "died")
NEEDS_CUDA = "needs a CUDA device"
WIDTH = 118


def bad(results: dict[str, Results]) -> list[tuple[str, str, dict]]:
    """(section, name, record) of whatever did not do what it should: then the command's exit status is 1."""
    return [(section, name, record) for section, store in results.items()
            for name, record in store.cases.items() if record["status"] in BAD]


def missing(device: str, results: dict[str, Results], args, items=None) -> dict[str, dict[str, str]]:
    """{section: {name: why}} of every case without a figure: of this device's plan (or of ``items``) and,
    where there is no CUDA device, of a GPU's."""
    found: dict[str, dict[str, str]] = {section: {} for section in results}
    items = list(plan(device, args.quick) if items is None else items)
    for section, name, *_ in items:
        record = results[section].cases.get(name)
        if record is None:
            found[section][name] = "the time was up" if wanted(args.only, section, name) else "not asked for"
        elif record["status"] != "ok":
            found[section][name] = f"{record['status']}: {record.get('reason')}"
    if device != "cuda":
        here = {(section, name) for section, name, *_ in items}
        found["correctness"]["tests of the kernels, CUDA library, compute-sanitizer"] = NEEDS_CUDA
        for section, name, *_ in plan("cuda", args.quick):
            if (section, name) not in here:
                found[section][name] = NEEDS_CUDA
    return found


def told(found: dict[str, dict[str, str]]) -> Iterator[str]:
    """One line a section and reason."""
    for section, cases in found.items():
        for why in dict.fromkeys(cases.values()):
            names = [name for name, reason in cases.items() if reason == why]
            yield f"not measured, {section}, {len(names)} ({why}): {'; '.join(names)}"


def ratios(ops: dict, peers: dict) -> Iterator[str]:
    """Ours (any backend) beside a peer of equal shape."""
    for name, peer in peers.items():
        kind, _, shape = name.partition(" ")
        for ours, record in ops.items():
            if ours.rpartition(" ")[0] == f"prefill {shape}" and record["status"] == peer["status"] == "ok":
                yield f"{ours}: {record['ms']['median'] / peer['ms']['median']:.3f} of the time of {kind}"


def first_line(record: dict) -> str:
    return (str(record.get("reason") or "").strip().splitlines() or [""])[0]


def row(name: str, record: dict) -> str:
    ms = record.get("ms", {}).get("median")
    if record["status"] != "ok" or ms is None:
        return f"{name:48} {record['status']} {first_line(record)}"
    shares = [f"{record[k]:6.1%} {k}" for k in ("of_matmul", "of_fma", "of_copy") if record.get(k)]
    others = ("tokens/s", "backward_per_forward", "pairs_at_once")
    shares += [f"{record[k]:.4g} {k}" for k in others if record.get(k)]
    return f"{name:48} {ms:10.4f} ms  {', '.join(shares)}"


def screen(
    results: dict[str, Results], parts: dict[str, list], hung: dict[str, str], texts: list[str]
) -> list[str]:
    """At most some forty lines. texts: comparisons, of which the first ones are shown."""
    env, tests = results["env"].cases, results["correctness"].cases
    lines = ["== summary"]
    steps = env.get("timeline", {}).get("steps", {})
    lines.append("steps: " + ", ".join(f"{name} {end - began:.0f} s" for name, (began, end) in steps.items()))
    for name, record in tests.items():
        if name.startswith(("CUDA library", "compute-sanitizer")):
            lines.append(f"{name}: {record['status']} {first_line(record)}")
        elif name.startswith("pytest"):
            counts = ", ".join(f"{record[k]} {k}" for k in OUTCOMES if record.get(k))
            not_run = f", {len(record['not run'])} not run" if record.get("not run") else ""
            lines.append(f"{name}: {counts or record['status']}{not_run}")
    rates = [f"{n} {r[u]:.0f} {u}" for n, r in env.items() for u in ("GB/s", "TFLOP/s") if r.get(u)]
    lines.append("ceilings: " + (", ".join(rates) or "none"))
    for section, name, *_ in parts["worth"]:
        lines.append(row(name, results[section].cases.get(name, {"status": "not measured"})))
    counts = env.get("counters", {})
    lines.append(f"counters: {counts.get('status', 'not taken')} {first_line(counts)}")
    for kernel, values in counts.get("kernels", {}).items():
        busy = next((v for n, v in values.items() if n.startswith("smsp__issue_active.avg.pct")), "?")
        lines.append(f"  {kernel[:60]}: issue slots {busy}")
    lines += texts[:5]
    done = {s: sum(r["status"] == "ok" for r in store.cases.values()) for s, store in results.items()}
    lines.append("measured: " + ", ".join(f"{section} {n}" for section, n in done.items() if n))
    lines += [f"{backend} HANGS in {where}: its other cases were skipped" for backend, where in hung.items()]
    found = bad(results)
    lines += [f"{r['status']:8} {section}: {name}: {first_line(r)}" for section, name, r in found[:10]]
    lines.append(f"{len(found)} failed" if found else "nothing failed")
    return [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines]
