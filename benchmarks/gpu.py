"""One command for any CUDA machine: correctness first, then speed, most important first, in a time budget.

    python -m benchmarks.gpu [--minutes 9] [--plan] [--rehearse] [--only NAME ...] [--quick] [--resume]
                             [--out DIR] [--against DIR] [--wheels DIR] [--commit NAME]

A run goes through the steps of ``timeline``; --plan prints them and starts nothing, --rehearse goes the same
way without a GPU, on tiny cases. Writes DIR/<device>/{env,correctness,ops,layers,model,cms,peers}.json (DIR:
benchmarks/results). Each file holds "stamp" (commit, source hash, date), "cases", one record a name with a
"status": ok, refused (wrong result, hence no time), skipped (with the reason), failed, died, started; and,
once a run has ended, "missing": what it did not measure, and why. A file is rewritten after every case and
every test, so a kill loses nothing; --resume keeps what is there for the same code and goes on. The exit
status is 1 where anything failed.

Tests and measurements run in child processes under watchdogs: a kernel that breaks the CUDA context costs its
own case, one that hangs costs its backend the cases that are left, and nothing else. Nothing else runs beside
a case that is timed. At the end the command says what is slower, faster or no longer right against the
committed results of this device (or --against) by more than the spread of the times.

Without a CUDA device the backends of the CPU are measured (3 minutes suffice on two cores), every case
between copies and matrix products of the same moment, whose rates are the ceilings in its record.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import correctness, counters, gpu_library, processes, summary, timeline, watch, wheels
from benchmarks import measure as m
from benchmarks.changes import changes, committed
from benchmarks.device import slug
from benchmarks.plan import SECTIONS, plan, seconds
from benchmarks.records import RESULTS, Results, read, stamp
from benchmarks.run import line, measure, wanted
from benchmarks.script import CARD, REHEARSAL, Script, named

PROCESSES = {"cuda": 8, "triton": 6}  # of the tests; the tools of compute-sanitizer run beside Triton's
COMPILERS = 8


class Compiling:
    """The Triton kernels of the first cases, compiled beside other steps."""

    def __init__(self, script: Script, folder: Path):
        command = [sys.executable, "-m", "benchmarks.precompile", "--arch", str(script.capability()),
                   "--processes", str(min(COMPILERS, os.cpu_count() or 1))]
        command += ["--only", *script.compiled] if script.compiled else []
        self.log, self.began = folder / "precompile", time.time()
        self.process = processes.start(tuple(command), processes.environment(script.variables), self.log)

    def finish(self, until: float) -> dict:
        """Its record. What has not been compiled by then is compiled by the case that launches it."""
        found = processes.record(self.process, self.log, self.began, until)
        return found | {"status": "ok" if found["status"] == "ok" else "skipped"}


def on_card(
    script: Script, module: str, args, results: dict[str, Results], folder: Path, hung: dict[str, str]
) -> None:
    """The steps of a run, each under its watchdog. ``hung`` is told which backends hang, and where."""
    clock = timeline.Clock(args.minutes, lambda text: print(text, flush=True))
    env, tests = results["env"], results["correctness"]
    tested = not args.quick and wanted(args.only, "correctness", "")

    def put(found: dict[str, dict]) -> None:
        for name, record in found.items():
            tests.put(name, record)
            print(line("correctness", name, record), flush=True)

    def timed(name: str, until: float) -> None:
        watch.children(name, script, module, results, args, until, folder, hung)
        env.put("timeline", clock.record())

    def chosen(backend: str, until: float) -> None:
        if where := correctness.tests(tests, backend, script, PROCESSES[backend], until):
            hung[backend] = f"correctness: {where}"

    usable, compiling = False, None
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as beside:
        try:
            with clock.step("environment") as end:
                late = time.time() + gpu_library.BUILD_SECONDS
                library = beside.submit(gpu_library.made_usable, script, end, late)
                compiling = Compiling(script, Path(scratch))
                timed("env", end)
                put(library.result())
                usable = gpu_library.usable(tests.cases)
            if tested:
                clock.shift()
                with clock.step("CUDA tests") as end:
                    if usable:
                        chosen("cuda", end)
                    else:
                        put({"pytest cuda": {"status": "skipped", "reason": "the CUDA library cannot be used"}})
                with clock.step("Triton tests") as end:
                    able = usable and "cuda" not in hung
                    tools = gpu_library.Sanitizers(script, tests.cases) if able else None
                    chosen("triton", end)
                    put(tools.finish(end) if tools else {})
            if compiling:
                env.put("precompiled", compiling.finish(clock.end("Triton tests")))
        finally:
            if compiling:
                processes.end(compiling.process)
    with clock.step("worth") as end:
        timed("worth", end)
    if not args.quick and not args.only:
        with clock.step("counters") as end:
            backends = [b for b in ("cuda", "triton") if b not in hung and (usable or b != "cuda")]
            env.put("counters", counters.counted(script, backends, end, time.time()))
            print(line("env", "counters", env.cases["counters"]), flush=True)
    for name in ("sweeps", "peers"):
        with clock.step(name) as end:
            timed(name, end)
    env.put("timeline", clock.record())
    for name, error in clock.errors.items():
        env.put(f"step {name}", {"status": "failed", "reason": error.strip().splitlines()[-1], "log": error})


def child(script: Script, args, results: dict[str, Results]) -> int:
    """Measures one part of the script in this process."""
    return measure(
        script.device, results, args, args.until, script.parts(args.quick)[args.child], limit=script.limit,
        hung=dict(where.split("=", 1) for where in args.hung), beats=watch.Beats(Path(args.beats)),
        seconds=seconds if script.device == "cuda" else lambda section, name: 0.0
    )


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--minutes", type=float, default=timeline.MINUTES)
    p.add_argument("--plan", action="store_true", help="print the timeline of a run on a card, no more")
    p.add_argument("--rehearse", nargs="?", const=REHEARSAL, metavar="MODULE",
                   help="go through a run on a card without one (benchmarks/rehearsal.py)")
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
    p.add_argument("--wheels", metavar="DIR", default=str(m.ROOT / "wheels"), help="of peers (default: wheels)")
    p.add_argument("--commit", metavar="NAME", help="of this copy, where git cannot say")
    for name in ("--child", "--script", "--beats"):
        p.add_argument(name, help=argparse.SUPPRESS)
    p.add_argument("--until", type=float, help=argparse.SUPPRESS)
    p.add_argument("--hung", action="append", default=[], help=argparse.SUPPRESS)
    return p


def opened(folder: Path, args) -> dict[str, Results]:
    mark = stamp(args.quick)
    kept: Callable[[str, str], bool] = lambda section, name: (
        bool(args.child or args.resume) or not wanted(args.only, section, name))
    return {s: Results(folder / f"{s}.json", mark, lambda name, s=s: kept(s, name)) for s in SECTIONS}


def main(argv: list[str] | None = None) -> int:
    p = arguments()
    args = p.parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)  # in step with what the children print
    if args.commit:
        os.environ["HOPE_KERNELS_COMMIT"] = args.commit
    if args.child:
        return child(named(args.script), args, opened(Path(args.out), args))
    if args.plan:
        parts = named(args.rehearse or CARD).parts(args.quick)
        cases = {part: [(name, seconds(section, name)) for section, name, *_ in items]
                 for part, items in parts.items()}
        print("\n".join(timeline.lines(args.minutes, cases)))
        return 0
    with tempfile.TemporaryDirectory() as unpacked:
        if wheels.use(Path(args.wheels), Path(unpacked)):
            os.environ.update(wheels.variables(Path(unpacked)))
        return run(p, args)


def run(p: argparse.ArgumentParser, args) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = args.rehearse or (CARD if device == "cuda" else None)
    script = named(module) if module else None
    name = script.folder() if script else slug(device)
    out = args.out or (m.ROOT / "build" if args.rehearse else RESULTS)  # a rehearsal is no result
    folder = Path(out).resolve() / (name + "-quick" * args.quick)
    try:
        earlier = read(Path(args.against)) if args.against else committed(RESULTS / name)
    except ValueError as e:
        p.error(str(e))
    results = opened(folder, args)
    mark = results["env"].data["stamp"]
    changed = ", changed files" * mark["dirty"]
    print(f"{name}, commit {mark['commit'] or 'unknown'}, source {mark['source']}{changed}")
    parts, hung, stopped = None, {}, None
    if script:
        parts = script.parts(args.quick)
        watch.unfinished(results, args.only)
        # what was started ends with this process
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            os.environ.setdefault("HOPE_KERNELS_EVIDENCE", str(folder / "evidence"))  # for benchmarks.verified
            on_card(script, module, args, results, folder, hung)
        except SystemExit as ended:
            stopped = ended.code
        finally:
            signal.signal(signal.SIGTERM, before)
    else:
        results["correctness"].put("pytest", {"status": "skipped", "reason": summary.NEEDS_CUDA})
        measure(device, results, args, time.time() + 60 * args.minutes, plan(device, args.quick))
    texts = [*summary.ratios(results["ops"].cases, results["peers"].cases)]
    after = {section: store.data for section, store in results.items()}
    texts += [f"{case}: {text}" for case, text in changes(earlier, after)]
    items = None if parts is None else [item for part in parts.values() for item in part]
    absent = summary.missing("cuda" if script else device, results, args, items)
    for section, cases in absent.items():
        results[section].note(cases)
    if script:
        print("\n".join(summary.screen(results, parts, hung, texts)))
        print(f"results: {folder}" + ", stopped before the end" * bool(stopped))
    else:
        print("\n".join([*texts, *summary.told(absent)]))
        for section, _name, record in summary.bad(results):
            print(f"{record['status']} {section}: {_name}: {summary.first_line(record)}")
    return stopped or (1 if summary.bad(results) else 0)


if __name__ == "__main__":
    sys.exit(main())
