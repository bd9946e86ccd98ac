"""Timed cases in child processes under a watchdog: a case that hangs or breaks the CUDA context costs itself,
and the next child goes on with the following one."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import processes
from benchmarks.records import Results
from benchmarks.run import LATE, RESTART, line, wanted
from benchmarks.script import Script

GRACE = 3  # seconds after a case's limit, in which a child says where it hangs and ends by itself
START_SECONDS = 90  # of a child, until its first case
WAITS = "Timeout ("  # what faulthandler writes first


class Beats:
    """How a child tells by when its case will be over: the time of change of a file; 0 between two cases."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, deadline: float) -> None:
        self.path.touch()
        os.utime(self.path, (deadline, deadline))

    def deadline(self) -> float:
        return self.path.stat().st_mtime if self.path.exists() else 0.0


def children(
    part: str, script: Script, module: str, results: dict[str, Results], args, until: float, folder: Path,
    hung: dict[str, str],
) -> None:
    """Runs one part of the script's cases, each child going on where the last one ended. A backend whose case
    hangs is entered in ``hung``, and has no further case."""
    with tempfile.TemporaryDirectory() as scratch:
        log, beats = Path(scratch, "log"), Path(scratch, "beats")
        items = [(section, name) for section, name, *_ in script.parts(args.quick)[part]
                 if wanted(args.only, section, name)]
        while time.time() < until and any(name not in results[section].cases for section, name in items):
            command = [sys.executable, "-m", "benchmarks.gpu", "--child", part, "--script", module,
                       "--until", str(until), "--out", str(folder), "--beats", str(beats)]
            command += ["--quick"] * args.quick
            command += [f"--hung={backend}={where}" for backend, where in hung.items()]
            command += ["--only", *args.only] if args.only else []
            before = sum(len(store.cases) for store in results.values())
            beats.unlink(missing_ok=True)
            status = watched(command, processes.environment(script.variables), log, Beats(beats), until)
            errors = log.read_text(errors="replace")
            for section, store in results.items():
                store.reload()
                bury(section, store, status, errors[-3000:], hung, time.time() > until)
            if status == 0:
                return
            if status != RESTART:
                print(f"  the measuring process ends with status {status}", flush=True)
            if before == sum(len(store.cases) for store in results.values()):
                reason = f"the measuring process ends with status {status} before any case"
                record = {"status": "died", "reason": reason, "log": errors[-3000:]}
                results["env"].put(f"child {part}", record)
                print(f"{reason}:\n{errors[-2000:]}", flush=True)
                return


def watched(command: list[str], env: dict[str, str], log: Path, beats: Beats, until: float) -> int | None:
    """The child's exit status; None where it did not end by itself after its case's time was up. Its output
    is passed on, its errors are kept in ``log``."""
    began = time.time()
    process = processes.start(tuple(command), env, errors=log)
    try:
        while process.poll() is None:
            now, deadline = time.time(), beats.deadline()
            if deadline > 0 and now > deadline + GRACE or now > until + LATE + GRACE or (
                    not beats.path.exists() and now > began + START_SECONDS):
                return None
            time.sleep(0.05)
        return process.returncode
    finally:
        processes.end(process)


def bury(
    section: str, store: Results, status: int | None, log: str, hung: dict[str, str], late: bool = False
) -> None:
    """The case a child ended in has died; one that took too long hangs, and its backend with it. Where only
    the time was up (``late``), it counts as not begun."""
    for name in [n for n, r in store.cases.items() if r["status"] == "started"]:
        if late:
            store.drop(name)
            continue
        hangs = status is None or WAITS in log
        what = "took too long" if hangs else f"the process ended inside this case with status {status}"
        store.put(name, store.cases[name] | {"status": "died", "reason": what, "log": log})
        print(line(section, name, store.cases[name]), flush=True)
        backend = (store.cases[name].get("case") or {}).get("backend")
        if hangs and backend:
            hung.setdefault(backend, f"{section}: {name}")


def unfinished(results: dict[str, Results], only: list[str]) -> None:
    """Cases that a killed run left as started count as not begun."""
    for section, store in results.items():
        started = [name for name, record in store.cases.items() if record["status"] == "started"]
        for name in started:
            if wanted(only, section, name):
                store.drop(name)
