"""docs/*.svg, drawn from the result files.

    python -m benchmarks.plot [--check]

Throughput and decode latency against context length, a roofline, accuracy against key correlation: for the
CPU's results and for every device's folder, each where there is data. Where there is none, the command says
what would measure it. --check writes nothing and fails where a file is not what the results give.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from benchmarks.records import RESULTS, runs
from benchmarks.sources import ROOT, at_rest
from benchmarks.svg import Chart, Series, draw

CONTEXT, ACCURACY = "python -m benchmarks.bench_context", "python -m benchmarks.bench_accuracy"
DEVICE = "python -m benchmarks.gpu"
SHAPE = {"C": 64, "D": 64, "N": 256, "H": 32, "B": 1, "dtype": "bf16"}  # whose throughput is drawn over its T
MODES = {"off": "", "next_token": ", learning"}


def caption(origin: dict, where: str) -> str:
    """Machine, commit and date of a result, on one line."""
    changed = " with changed files" if origin.get("dirty") else ""
    return f"{where}, commit {origin['commit'] or 'unknown'}{changed}, {origin['date'][:10]}"


def processor(machine: dict) -> str:
    return f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"


def kibi(chart_points) -> tuple[tuple[float, str], ...]:
    """Ticks of lengths that are powers of two, every second one where they are many; none (computed ones) for
    other lengths."""
    lengths = sorted({int(x) for points in chart_points for x, _ in points})
    if any(n < 1024 or n & (n - 1) for n in lengths):
        return ()
    return tuple((n, f"{n // 1024}k") for n in lengths[:: 1 + (len(lengths) > 8)])


def ordered(points) -> tuple[tuple[float, float], ...]:
    return tuple(sorted(points))


# -- the CPU -------------------------------------------------------------------------------------------------


def throughput_cpu(run: dict) -> Chart | None:
    if (data := run.get("context")) is None:
        return None
    points = lambda found: ordered((p["tokens"], p["tokens/s"]) for p in found)
    series = [Series(f"model{more}", points(data[mode]["points"])) for mode, more in MODES.items()]
    one = data["layer at once"]
    series.append(Series(f"layer d={one['d']} C={one['C']}, {one['backend']}", points(one["points"])))
    return Chart("Throughput against context length", "tokens read before", "tokens/s", tuple(series),
                 caption(data["machine"], processor(data["machine"])), x_ticks=kibi(s.points for s in series))


def decode_cpu(run: dict) -> Chart | None:
    if (data := run.get("context")) is None:
        return None
    points = lambda found: ordered((p["tokens"], p["decode_ms"]["median"]) for p in found)
    series = tuple(Series(f"model{more}", points(data[mode]["points"])) for mode, more in MODES.items())
    return Chart("Decode latency against context length", "tokens read before", "ms per token, median", series,
                 caption(data["machine"], processor(data["machine"])), log_y=False, from_zero=True,
                 x_ticks=kibi(s.points for s in series))


def accuracy_cpu(run: dict) -> Chart | None:
    if (data := run.get("accuracy")) is None:
        return None
    worst: dict[str, dict[float, float]] = {}
    for c in data["cases"]:
        for part, name in (("o", "output"), ("state", "learned")):
            place = worst.setdefault(f"{c['backend']} {c['dtype']}{' (GPU)' * (c['device'] == 'cuda')}, {name}", {})
            place[c["correlation"]] = max(place.get(c["correlation"], 0.0), c["error"][part])
    place = lambda r: -math.log10(1 - r)
    correlations = sorted({c["correlation"] for c in data["cases"]})
    alphas = sorted({c["alpha"] for c in data["cases"]})
    series = tuple(Series(n, ordered((place(r), e) for r, e in found.items())) for n, found in worst.items())
    return Chart("Error against key correlation",
                 f"correlation of tokens; the worst of retention {', '.join(f'{a:g}' for a in alphas)}",
                 "rms error relative to fp64", series,
                 caption(data["machine"], data["machine"]["gpu"] or processor(data["machine"])),
                 log_x=False, x_ticks=tuple((place(r), f"{r:g}") for r in correlations))


# -- a device's folder ---------------------------------------------------------------------------------------


def timed(run: dict, *sections: str):
    """(section, case, record) of what has a time."""
    for section in sections:
        for record in run.get(section, {}).get("cases", {}).values():
            if record.get("status") == "ok" and record.get("ms") and record.get("case"):
                yield section, record["case"], record


def stamp(run: dict, device: str) -> str:
    return caption(next(run[s]["stamp"] for s in ("ops", "model", "cms", "peers", "env") if s in run), device)


def throughput(run: dict, device: str) -> Chart | None:
    found: dict[str, list] = {}
    for _, case, r in timed(run, "ops", "peers"):
        if case.get("kind") in ("prefill", "fla", "compiled") and all(case.get(k) == v for k, v in SHAPE.items()):
            found.setdefault(case["backend"] or case["kind"], []).append(
                (case["T"], 1e3 * case["B"] * case["T"] / r["ms"]["median"])
            )
    for record in run.get("model", {}).get("cases", {}).values():
        if record.get("status") == "ok" and record.get("parts"):
            found[f"{record['case']['model']}, learning"] = [(p["tokens"], p["tokens/s"]) for p in record["parts"]]
    if not found:
        return None
    series = tuple(Series(n, ordered(p)) for n, p in found.items())
    return Chart("Throughput against context length", "tokens", "tokens/s", series, stamp(run, device),
                 x_ticks=kibi(s.points for s in series))


def decode(run: dict, device: str) -> Chart | None:
    found = {f"{r['case']['model']}, learning": ordered((p["after"], p["p50"]) for p in r["decode_ms"])
             for r in run.get("model", {}).get("cases", {}).values() if r.get("status") == "ok"
             and r.get("decode_ms")}
    if not found:
        return None
    return Chart("Decode latency against context length", "tokens read before", "ms per token, median",
                 tuple(Series(n, p) for n, p in found.items()), stamp(run, device), log_y=False, from_zero=True)


def roofline(run: dict, device: str) -> Chart | None:
    """Counted FLOPs over unavoidable bytes, and the rates reached, under the ceilings that the same run
    measured."""
    found: dict[str, list] = {}
    for _, case, r in timed(run, "ops", "layers", "cms", "peers"):
        if r.get("flops") and r.get("bytes"):
            name = " ".join(filter(None, (case["kind"], case.get("backend"), case.get("dtype"))))
            found.setdefault(name, []).append((r["flops"] / r["bytes"], r["flops"] / r["ms"]["median"] / 1e9))
    ceilings = run.get("env", {}).get("cases", {})
    copy = ceilings.get("copy", {}).get("GB/s")
    if not found or not copy:
        return None
    rates = {n: r for n in ("matmul bf16", "matmul fp32", "fma fp32") if (r := ceilings.get(n, {}).get("TFLOP/s"))}
    # left of it the copy rate bounds, right of it the product
    ridges = {n: 1e3 * r / copy for n, r in rates.items()}
    xs = [x for points in found.values() for x, _ in points]
    low, high = min([*xs, *ridges.values()]) / 2, max([*xs, *ridges.values()]) * 2
    lines = [
        Series(n, ((low, low * copy / 1e3), (ridges[n], rate), (high, rate)), dashed=True)
        for n, rate in rates.items()
    ]
    reached = tuple(Series(n, tuple(p), joined=False) for n, p in found.items())
    return Chart("Roofline", "FLOP per unavoidable byte", "TFLOP/s", (*reached, *lines), stamp(run, device))


OF_CPU = {
    "throughput-cpu": (throughput_cpu, CONTEXT), "decode-cpu": (decode_cpu, CONTEXT),
    "accuracy": (accuracy_cpu, ACCURACY)
}
OF_DEVICE = {"throughput": throughput, "decode": decode, "roofline": roofline}


def attempts(results: Path):
    """(file name, chart or None, the command whose results it needs)."""
    everywhere = runs(results)
    for name, (make, command) in OF_CPU.items():
        yield f"{name}.svg", make(everywhere[""]), command
    devices = {device: run for device, run in everywhere.items() if device}
    for device, run in devices.items():
        for name, make in OF_DEVICE.items():
            if name == "roofline" or not device.startswith("cpu-"):  # a CPU has its own commands for the others
                yield f"{name}-{device}.svg", make(run, device), DEVICE
    if not any(not device.startswith("cpu-") for device in devices):
        for name in OF_DEVICE:
            yield f"{name}-GPU.svg", None, f"{DEVICE} on a CUDA machine"


def drawn(results: Path) -> dict[str, Chart]:
    """{file name: chart} of what there is data for."""
    return {name: chart for name, chart, _ in attempts(results) if chart is not None}


def stale(results: Path, documents: Path = ROOT) -> list[str]:
    """Files of docs that are not what the results give: other, absent, or drawn from results that are no
    longer there."""
    want = {name: draw(chart) for name, chart in drawn(results).items()}
    have = {p.name: p.read_text(encoding="utf-8") for p in (documents / "docs").glob("*.svg")}
    return [f"docs/{name}" for name in sorted({*want, *have}) if want.get(name) != have.get(name)]


@at_rest()
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    p.add_argument("--documents", type=Path, default=ROOT, metavar="DIR")
    args = p.parse_args(argv)
    found = stale(args.results, args.documents)
    charts = drawn(args.results)
    for name in found:
        if name.removeprefix("docs/") not in charts:
            print(f"{name} is drawn from results that are not there: remove it")
        elif args.check:
            print(f"{name} is not what the results give")
    for name, chart, command in attempts(args.results):
        if chart is None:
            print(f"{name} is not drawn: it needs results of {command}")
        elif not args.check and f"docs/{name}" in found:
            (args.documents / "docs" / name).write_text(draw(chart), encoding="utf-8")
            print(f"docs/{name}")
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
