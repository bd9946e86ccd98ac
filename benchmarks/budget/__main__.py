"""What the kernels cost by count, and whether they cost more than they did.

    python -m benchmarks.budget [--only NAME ...] [--out benchmarks/results/budget.json]
    python -m benchmarks.budget --check [--full] [--only NAME ...]

Counts every case (cases.py) on the PTX machine, assembles its kernels for the cross-check, predicts the times that
the goals ask for, and writes one file. --check counts again, compares with the file and fails where instructions,
wavefronts or sectors have grown by more than 2%; without --full only the cases that take a second or two. Needs
nvcc and a C++ compiler, and no GPU. Predictions are predictions: nothing here is measured.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is first imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402

from benchmarks.budget.bounds import MACHINES  # noqa: E402
from benchmarks.budget.cases import Case, cases  # noqa: E402
from benchmarks.budget.gate import cheaper, dearer  # noqa: E402
from benchmarks.budget.record import count, counts_record, record  # noqa: E402
from benchmarks.machine import write_json  # noqa: E402
from benchmarks.records import RESULTS, stamp  # noqa: E402
from tools import build_cuda  # noqa: E402

RESULT = RESULTS / "budget.json"


def chosen(only: list[str] | None, cheap: bool) -> list[Case]:
    return [c for c in cases() if (c.cheap or not cheap) and (not only or any(part in c.name for part in only))]


def check(path: Path, wanted: list[Case]) -> int:
    budget, bad = json.loads(path.read_text())["cases"], []
    for case in wanted:
        started = time.perf_counter()
        now = counts_record(count(case))
        if case.name not in budget:
            bad.append(f"{case.name}: not in {path.name}")
            continue
        found = dearer(case.name, budget[case.name], now)
        bad += found
        for line in cheaper(case.name, budget[case.name], now):
            print(f"cheaper: {line}")
        print(f"{case.name:42} {now['instructions']:>12,.0f} instructions a {now['unit']}"
              f"{', TOO EXPENSIVE' * bool(found)}, {time.perf_counter() - started:.1f} s", flush=True)
    for line in bad:
        print(line, file=sys.stderr)
    return int(bool(bad))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true", help="exit with 1 where a count has grown by more than 2%%")
    p.add_argument("--full", action="store_true", help="--check: all cases")
    p.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name contains one of these")
    p.add_argument("--out", type=Path, default=RESULT)
    args = p.parse_args(argv)
    try:
        if args.check:
            return check(args.out, chosen(args.only, cheap=not args.full))
        kept = json.loads(args.out.read_text())["cases"] if args.only and args.out.exists() else {}
        of: dict[str, dict] = {}
        for case in chosen(args.only, cheap=False):
            started = time.perf_counter()
            of[case.name] = record(case)
            print(f"{case.name:42} {of[case.name]['instructions']:>12,.0f} instructions a {case.unit}, "
                  f"{time.perf_counter() - started:.1f} s", flush=True)
        order = {c.name: k for k, c in enumerate(cases())}
        merged = sorted((kept | of).items(), key=lambda item: order.get(item[0], len(order)))
        assumptions = {m.name: {n: asdict(a) for n, a in m.of.items()} for m in MACHINES.values()}
        write_json(str(args.out), {"stamp": stamp(False), "assumptions": assumptions, "cases": dict(merged)})
    except build_cuda.BuildError as reason:
        print(f"benchmarks.budget: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
