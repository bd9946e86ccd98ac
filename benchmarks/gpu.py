"""One command for any CUDA machine: correctness first, then speed, most important first, inside a time budget.

    python -m benchmarks.gpu [--minutes 8] [--only NAME ...] [--quick] [--resume] [--out DIR] [--against DIR]

Writes DIR/<device>/{env,correctness,ops,layers,model,cms,peers}.json (DIR: benchmarks/results). Each file
holds "stamp" (commit, source hash, date), "cases", one record a name with a "status": ok, refused (wrong
result, hence no time), skipped (with the reason), failed, died, started; and, once a run has ended,
"missing": what it did not measure, and why. A file is rewritten after every case, so a kill loses nothing;
--resume keeps what is there for the same code and goes on.

Measurements run in a child process under a watchdog: a kernel that hangs or breaks the CUDA context costs its
own case, and the next child goes on with the following one. At the end it says what is slower, faster or no
longer right against the committed results of this device (or --against) by more than the spread of the times.
Without a CUDA device the backends of the CPU are measured (3 minutes suffice on two cores), every case between
copies and matrix products of the same moment, whose rates are the ceilings in its record.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import gpu_library
from benchmarks import measure as m
from benchmarks.changes import changes, committed
from benchmarks.correctness import correctness, record_all
from benchmarks.device import slug
from benchmarks.plan import SECTIONS, plan
from benchmarks.records import RESULTS, Results, read, stamp
from benchmarks.run import CASE_SECONDS, line, measure, wanted

SANITIZER_SECONDS = 60  # beyond the time of the tests
NEEDS_CUDA = "needs a CUDA device"


def missing(device: str, results: dict[str, Results], args) -> dict[str, dict[str, str]]:
    """{section: {name: why}} of every case without a figure: of this device's plan and, where there is no
    CUDA device, of a GPU's."""
    found: dict[str, dict[str, str]] = {section: {} for section in results}
    for section, name, *_ in plan(device, args.quick):
        record = results[section].cases.get(name)
        if record is None:
            found[section][name] = "the time was up" if wanted(args.only, section, name) else "not asked for"
        elif record["status"] != "ok":
            found[section][name] = f"{record['status']}: {record.get('reason')}"
    if device != "cuda":
        here = {(section, name) for section, name, *_ in plan(device, args.quick)}
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


def children(results: dict[str, Results], only: list[str], quick: bool, until: float, folder: Path) -> None:
    """Runs the plan in child processes until one finishes it, each going on where the last one ended."""
    command = [
        sys.executable, "-m", "benchmarks.gpu", "--child", "--until", str(until), "--out", str(folder),
        *["--quick"] * quick
    ]
    command += ["--only", *only] if only else []
    while time.time() < until:
        before = sum(len(store.cases) for store in results.values())
        done = subprocess.run(command, cwd=m.ROOT, stderr=subprocess.PIPE, text=True, errors="replace")
        sys.stderr.write(done.stderr[-4000:])
        for section, store in results.items():
            store.reload()
            bury(section, store, done.returncode, done.stderr[-2000:], time.time() > until)
        if done.returncode == 0:
            return
        if before == sum(len(store.cases) for store in results.values()):
            print(f"the measuring process ends with status {done.returncode} before any case: given up")
            return


def bury(section: str, store: Results, status: int, log: str, late: bool) -> None:
    """The case a child ended in: died, unless only the time was up (``late``); then it counts as not begun."""
    for name in [n for n, r in store.cases.items() if r["status"] == "started"]:
        if late:
            store.drop(name)
            continue
        reason = f"the process ended inside this case with status {status} (hangs are ended after {CASE_SECONDS} s)"
        store.put(name, store.cases[name] | {"status": "died", "reason": reason, "log": log})
        print(line(section, name, store.cases[name]))


def ratios(ops: dict, peers: dict) -> Iterator[str]:
    """Ours (any backend) beside a peer of equal shape."""
    for name, peer in peers.items():
        kind, _, shape = name.partition(" ")
        for ours, record in ops.items():
            if ours.rpartition(" ")[0] == f"prefill {shape}" and record["status"] == peer["status"] == "ok":
                yield f"{ours}: {record['ms']['median'] / peer['ms']['median']:.3f} of the time of {kind}"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--minutes", type=float, default=8)
    p.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help=f"a section ({', '.join(SECTIONS[1:])}), or a part of a name"
    )
    p.add_argument("--quick", action="store_true", help="small sizes, no tests: does the command itself work")
    p.add_argument("--resume", action="store_true", help="keep what is there for the same commit and source")
    p.add_argument("--out", metavar="DIR", help="folder of the result folders")
    p.add_argument(
        "--against", metavar="DIR",
        help="a device's folder to compare with (default: what is committed for this device)"
    )
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)  # in step with what the children print
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
    until = args.until or time.time() + 60 * args.minutes
    folder = Path(args.out or RESULTS)
    if not args.child:
        folder = folder.resolve() / (slug(device) + "-quick" * args.quick)
    mark = stamp(args.quick)
    try:
        earlier = (
            {} if args.child else read(Path(args.against)) if args.against
            else committed(RESULTS / slug(device))
        )
    except ValueError as e:
        p.error(str(e))

    def opened(section: str) -> Results:
        old = (lambda n: True) if args.child or args.resume else (lambda n: not wanted(args.only, section, n))
        return Results(folder / f"{section}.json", mark, old)

    results = {section: opened(section) for section in SECTIONS}
    if args.child:
        return measure(device, results, args, until, plan(device, args.quick))
    changed = ", changed files" * mark["dirty"]
    print(f"{slug(device)}, commit {mark['commit'] or 'unknown'}, source {mark['source']}{changed}")
    if device == "cuda":
        for store in results.values():
            for name in [n for n, r in store.cases.items() if r["status"] == "started"]:
                store.drop(name)  # a killed run; the watchdog ends what hangs
        children(results, ["env"], args.quick, until, folder)
        if not args.quick and wanted(args.only, "correctness", ""):
            share = 1.0 if args.only else 0.4
            limit = time.time() + share * (until - time.time())
            major, minor = torch.cuda.get_device_capability()
            record_all(results["correctness"], gpu_library.built(10 * major + minor, limit))
            correctness(results["correctness"], limit)
            record_all(
                results["correctness"], gpu_library.sanitized(results["correctness"].cases,
                    limit + SANITIZER_SECONDS)
            )
        children(results, args.only, args.quick, until, folder)
    else:
        results["correctness"].put("pytest", {"status": "skipped", "reason": NEEDS_CUDA})
        measure(device, results, args, until, plan(device, args.quick))
    for text in ratios(results["ops"].cases, results["peers"].cases):
        print(text)
    for name, text in changes(earlier, {section: store.data for section, store in results.items()}):
        print(f"{name}: {text}")
    for section, store in results.items():
        counts: dict[str, int] = {}
        for record in store.cases.values():
            counts[record["status"]] = counts.get(record["status"], 0) + 1
        print(f"{section}: {counts or 'nothing'}{f' in {store.path}' if store.path else ''}")
    absent = missing(device, results, args)
    for section, cases in absent.items():
        results[section].note(cases)
    print("\n".join(told(absent)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
