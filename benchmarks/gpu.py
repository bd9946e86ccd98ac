"""One command for any CUDA machine: correctness first, then speed, most important first, inside a time budget.

    python -m benchmarks.gpu [--minutes 8] [--only NAME ...] [--quick] [--resume] [--out DIR] [--against DIR]

Writes DIR/<device>/{env,correctness,ops,layers,model,cms,peers}.json (DIR: benchmarks/results). Each file
holds "stamp" (commit, source hash, date), "cases", one record a name with a "status": ok, refused (wrong
result, hence no time), skipped (with the reason), failed, died, started; and, once a run has ended,
"missing": what it did not measure, and why. A file is rewritten after every case, so a kill loses nothing;
--resume keeps what is there for the same code and goes on.

Measurements run in a child process under a watchdog: a kernel that hangs or breaks the CUDA context costs its
own case, and the next child goes on behind it. At the end it says what is slower, faster or no longer right
against the committed results of this device (or --against) by more than the spread of the times. Without a
CUDA device the backends of the CPU are measured (3 minutes suffice on two cores), every case between copies
and matrix products of the same moment, whose rates are the ceilings in its record.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import gpu_library, report
from benchmarks import measure as m
from benchmarks.machine import machine, write_json
from benchmarks.sources import kernel_hash

RESULTS = m.ROOT / "benchmarks" / "results"
SECTIONS = ("env", "correctness", "ops", "layers", "model", "cms", "peers")
CEILINGS = {"copy": "GB/s", "matmul bf16": "TFLOP/s", "matmul fp16": "TFLOP/s", "matmul fp32": "TFLOP/s"}
TESTS = (
    "tests/ops/titans/test_triton*.py", "tests/ops/titans/test_cuda.py", "tests/layers/test_titans_triton.py",
    "tests/ops/conv/test_conv.py", "tests/ops/output_gate/test_output_gate.py",
)
TEST_PROCESSES = 8
SANITIZER_SECONDS = 60  # beyond the time of the tests
CASE_SECONDS = 150  # compilation included; what takes longer hangs
LONG_SECONDS = {"cuda": 90, "cpu": 15}  # then a long run stops by itself
NEEDS_CUDA = "needs a CUDA device"
RESTART = 3  # exit status of a child that wants a fresh one to go on


class Results:
    """One JSON file: {"stamp", "cases": {name: record}}, rewritten whole after every record; ``path`` None
    keeps it in memory.

    Records of the same code that ``keep(name)`` wants are taken over from the file; a file of other code is
    replaced by the first record.
    """

    def __init__(self, path: Path | None, stamp: dict, keep: Callable[[str], bool] = lambda name: True):
        self.path, self.data = path, {"stamp": stamp, "cases": {}}
        if path is None or not path.exists():
            return
        found = json.loads(path.read_text())
        if all(found["stamp"].get(k) == stamp[k] for k in ("commit", "source", "quick")):
            self.data = {"stamp": found["stamp"], "cases": {n: r for n, r in found["cases"].items() if keep(n)}}
            if len(self.cases) < len(found["cases"]):
                write_json(str(path), self.data)

    @property
    def cases(self) -> dict[str, dict]:
        return self.data["cases"]

    def put(self, name: str, record: dict) -> None:
        self.cases[name] = record
        if self.path is not None:
            write_json(str(self.path), self.data)

    def reload(self) -> None:
        """What another process has written meanwhile."""
        self.data = Results(self.path, self.data["stamp"]).data

    def note(self, missing: dict[str, str]) -> None:
        """The end of a run: what was not measured, and why."""
        self.data["missing"] = missing
        if self.path is not None:
            write_json(str(self.path), self.data)

    def drop(self, name: str) -> None:
        self.data["cases"].pop(name)
        write_json(str(self.path), self.data)


def stamp(quick: bool) -> dict:
    found = machine()
    return {
        "commit": found["commit"], "dirty": found["dirty"], "source": m.source_hash(), "quick": quick,
        "date": found["date"]
    }


def slug(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu " + machine()["cpu"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def nvidia_smi() -> str:
    """Name, driver, clocks, power and temperature as the driver reports them now; only reads."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
    try:
        done = subprocess.run(
            ("nvidia-smi", f"--query-gpu={query}", "--format=csv"), capture_output=True, text=True, timeout=20
        )
        return (done.stdout or done.stderr).strip()
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"nvidia-smi: {e}"


def describe(device: str) -> dict:
    from hope_kernels import available_backends

    found: dict = {"machine": machine(), "device": device, "backends": available_backends()}
    for package in (
        "torch", "triton", "numpy", "nested-learning", "titans-pytorch", "flash-linear-attention", "flash-qla"
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= {"name": p.name, "capability": [p.major, p.minor],
                  "multiprocessors": p.multi_processor_count, "L2": p.L2_cache_size,
                  "memory": p.total_memory, "cuda": torch.version.cuda, "nvidia_smi": nvidia_smi()}
    return found


def ceilings_of(device: str) -> tuple[str, ...]:
    return tuple(CEILINGS) if device == "cuda" else ("copy", "matmul fp32")


def plan(device: str, quick: bool) -> Iterator[tuple[str, str, dict, Callable]]:
    """(section, name, case as data, call with (ceilings) -> record): the order of a run, correctness aside;
    the rows people ask for first, ours and the peers', then the sweeps."""
    from benchmarks import bench_cms, bench_layers, bench_model, bench_titans, peers

    yield "env", "machine", {}, lambda _: describe(device)
    for name in ceilings_of(device):
        yield "env", name, {}, lambda _, name=name: m.ceiling(name, device, quick)
    if device == "cuda":
        yield "env", "after the matrix products", {}, lambda _: {"nvidia_smi": nvidia_smi()}
    ops = [("ops", *item) for item in bench_titans.items(device, quick)]
    others = [("peers", *item) for item in peers.items(device, quick)]
    layers = [("layers", *item) for item in bench_layers.items(device, quick)]
    models = [("model", *item) for item in bench_model.items(device, quick, limit=LONG_SECONDS[device])]
    cms = [("cms", *item) for item in bench_cms.items(device, quick)]
    parts = ((ops, bench_titans.FIRST), (others, 6 if device == "cuda" else 3), (layers, bench_layers.FIRST),
             (models, bench_model.FIRST),
             (cms, bench_cms.FIRST))
    for items, early in parts:
        yield from items[:early]
    for items, early in (parts[0], *parts[2:], parts[1]):
        yield from items[early:]


def wanted(only: list[str], section: str, name: str) -> bool:
    return not only or section == "env" or any(o == section or o in name for o in only)


def measure(device: str, results: dict[str, Results], args, until: float, items: list | None = None) -> int:
    """Every case of the plan (or of ``items``) that is not there yet; returns RESTART when this process
    should not go on."""
    for section, name, case, call in plan(device, args.quick) if items is None else items:
        store = results[section]
        if name in store.cases or not wanted(args.only, section, name):
            continue
        case = case and case | {"device": device}
        if time.time() > until:
            print(f"  the time is up before {section}: {name}")
            return 0
        store.put(name, {"status": "started", "case": case})
        if device == "cuda":
            faulthandler.dump_traceback_later(min(CASE_SECONDS, until - time.time() + 20), exit=True)
        ceilings = {n: results["env"].cases.get(n, {}).get(unit) for n, unit in CEILINGS.items()}
        now = m.Beside(args.quick) if device == "cpu" and section != "env" else {}
        began, restart = time.time(), False
        try:
            record = {"status": "ok"} | call(now or ceilings) | ({"ceilings": dict(now)} if now else {})
            restart = record.pop("restart", False)
            if not restart:  # an asynchronous error belongs to this case
                m.sync(device)
        # a configuration that the backend does not serve, a peer that is not installed
        except (m.Unserved, ImportError) as e:
            record = {"status": "skipped", "reason": str(e)}
        except m.WrongResult as e:
            record = {"status": "refused", "reason": str(e)}
        except torch.OutOfMemoryError as e:
            record = {"status": "skipped", "reason": f"out of memory: {e}".splitlines()[0]}
        except Exception as e:  # whatever else: recorded, and the CUDA context may be broken
            record, restart = {"status": "failed", "reason": f"{type(e).__name__}: {e}"[:2000]}, device == "cuda"
        faulthandler.cancel_dump_traceback_later()
        kernel = kernel_hash(case)
        store.put(
            name, {"case": case} | record | {"seconds": round(time.time() - began, 2)}
            | ({"kernel": kernel} if kernel else {})
        )
        print(line(section, name, store.cases[name]), flush=True)
        if restart:
            return RESTART
        if device == "cuda":
            torch.cuda.empty_cache()
    return 0


def line(section: str, name: str, r: dict) -> str:
    ms = r.get("ms", {}).get("median")
    parts = [f"{section:11} {name:52} {r['status']:8}", f"{ms:10.4f} ms" if ms is not None else ""]
    parts += [f"{r[k]:8.1f} {k}" for k in ("TFLOP/s", "GB/s", "tokens/s") if r.get(k)]
    parts += [f"{r[k]:7.1%} {k}" for k in ("of_matmul", "of_copy") if r.get(k)]
    return " ".join([p for p in parts if p] + [str(r.get("reason") or "")[:200]]).rstrip()


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


# -- correctness --------------------------------------------------------------------------------------------------------------


def outcomes(junit: Path, log: str) -> dict[str, dict]:
    """Every test's outcome: from the junit file, or, where pytest did not live to write it, from the lines of
    its -v output."""
    if junit.exists():
        found = {}
        for case in ElementTree.parse(junit).iter("testcase"):
            bad = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
            status = (
                "passed" if bad is None else {"failure": "failed", "error": "failed", "skipped": "skipped"}[bad.tag]
            )
            found[f"{case.get('classname')}::{case.get('name')}"] = {"status": status, "seconds": float(case.get("time", 0))} | (
                {} if bad is None
                else {"reason": ((bad.get("message") or "") + "\n" + (bad.text or "")[-1500:]).strip()})
        return found
    found: dict[str, dict] = {}
    for name, word in re.findall(r"^(\S+::.+?) ?(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS|$)", log, re.M):
        found[recorded_as(name.removesuffix(" "))] = {
            "status": {"PASSED": "passed", "": "died"}.get(word,
                "skipped" if word in ("SKIPPED", "XFAIL") else "failed")
        }
    return found


def collected(extra: list[str], env: dict) -> list[str]:
    """Ids of the tests that pytest finds."""
    command = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *extra)
    found = subprocess.run(command, cwd=m.ROOT, env=env, capture_output=True, text=True).stdout.splitlines()
    return [name for name in found if ".py::" in name]


def recorded_as(test: str) -> str:
    """A test's id as junit files write it: file and class by points, then the name."""
    place, bracket, parameters = test.partition("[")
    *place, name = place.replace(".py::", "::").replace("/", ".").split("::")
    return f"{'.'.join(place)}::{name}{bracket}{parameters}"


def record_all(store: Results, found: Iterator[tuple[str, dict]]) -> None:
    for name, record in found:
        store.put(name, record)
        print(line("correctness", name, record), flush=True)


def correctness(store: Results, until: float) -> None:
    """The kernels' tests on the GPU and every other test marked gpu, in several processes, since most of
    their time is compilation. Tests that the time did not suffice for are run by the next --resume."""
    env = gpu_library.environment()
    files = sorted(p.relative_to(m.ROOT).as_posix() for pattern in TESTS for p in m.ROOT.glob(pattern))
    tests = collected(["-m", "not slow", *files], env)
    tests += collected(["-m", "gpu and not slow", "tests", *(f"--ignore={name}" for name in files)], env)
    tests = [t for t in tests if recorded_as(t) not in store.cases]
    # none, where no test is left: pytest without a name would run all
    jobs = min(TEST_PROCESSES, len(tests), os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for job in range(jobs):
            junit, log = Path(folder, f"{job}.xml"), Path(folder, f"{job}.log")
            command = (
                sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junit-xml={junit}",
                *tests[job::jobs]
            )
            with open(log, "w") as out:
                running.append(
                    (subprocess.Popen(command, cwd=m.ROOT, env=env, stdout=out, stderr=subprocess.STDOUT),
                        junit, log)
                )
        for job, (process, junit, log) in enumerate(running):
            try:
                code = process.wait(timeout=max(1.0, until - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
            text = log.read_text(errors="replace")
            found = outcomes(junit, text)
            store.cases.update(found)
            counts = {
                s: sum(r["status"] == s for r in found.values()) for s in ("passed", "failed", "skipped", "died")
            }
            record = {"status": "ok", "exit": code, **counts}
            if code != 0 or counts["failed"]:
                reason = "time limit" if code is None else f"pytest exit status {code}"
                record |= {"status": "died" if code is None else "failed", "reason": reason, "log": text[-4000:]}
            store.put(f"pytest {job + 1} of {jobs}", record)
            print(
                line("correctness", f"{job + 1} of {jobs}", record), {k: v for k, v in counts.items() if v},
                flush=True
            )


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
        "--against", metavar="DIR", help="a device's folder to compare with (default: what is committed for this device)"
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
            {} if args.child else report.read(Path(args.against)) if args.against
            else report.committed(RESULTS / slug(device))
        )
    except ValueError as e:
        p.error(str(e))

    def opened(section: str) -> Results:
        old = (lambda n: True) if args.child or args.resume else (lambda n: not wanted(args.only, section, n))
        return Results(folder / f"{section}.json", mark, old)

    results = {section: opened(section) for section in SECTIONS}
    if args.child:
        return measure(device, results, args, until)
    print(
        f"{slug(device)}, commit {mark['commit'] or 'unknown'}, source {mark['source']}{', changed files' * mark['dirty']}"
    )
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
        measure(device, results, args, until)
    for text in ratios(results["ops"].cases, results["peers"].cases):
        print(text)
    for name, text in report.changes(earlier, {section: store.data for section, store in results.items()}):
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
