"""The tests of one backend's kernels, in several processes (``told`` is their plugin), and their outcomes as
records.

A test that takes too long is ended with its process, and no other test of the backend begins: a kernel that
hangs would hang them too. A process that dies costs the test that it was in; another process takes the rest.
Whatever could not be run is told with the reason: files that cannot be collected, tests that are in no file.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import measure as m
from benchmarks import processes
from benchmarks.records import Results
from benchmarks.run import line
from benchmarks.script import Script
from benchmarks.told import claim

START_SECONDS = 90  # from a process's start to its first test
OUTCOMES = ("passed", "failed", "skipped", "died")
ABSENT = re.compile(r"No module named '(\w+)")


def lacking(error: str) -> str | None:
    """The package without which a file cannot be imported, if it is none of this repository's modules."""
    package = ABSENT.search(error)
    ours = package and any((m.ROOT / place / package[1]).with_suffix(end).exists()
                           for place in ("", "tests") for end in ("", ".py"))
    return package[1] if package and not ours else None


class Worker:
    """One process of pytest, and what it has told so far."""

    def __init__(self, number: int, folder: Path, files: list[str], env: dict[str, str], root: Path):
        self.told, self.log = folder / f"{number}.jsonl", folder / f"{number}.log"
        # test: the one that runs; moved: when it last told
        self.moved, self.read, self.test = time.time(), 0, None
        self.taken: set[str] = set()  # and not begun
        self.finished = 0
        options = ("-q", "-p", "no:cacheprovider", "-p", "benchmarks.told", "--continue-on-collection-errors",
                   "-o", "minversion=7.0")
        self.process = processes.start(
            (sys.executable, "-m", "pytest", *options, *files),
            env | {"HOPE_KERNELS_TOLD": str(folder), "HOPE_KERNELS_TOLD_LOG": str(self.told)}, self.log,
            folder=root
        )

    def events(self) -> list[dict]:
        """Whole lines told since the last look."""
        if not self.told.exists():
            return []
        text = self.told.read_bytes()[self.read :]
        text = text[: text.rfind(b"\n") + 1]
        self.read += len(text)
        self.moved = time.time() if text else self.moved
        return [json.loads(found) for found in text.splitlines()]

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


class Run:
    """The tests of one backend."""

    def __init__(self, store: Results, backend: str, script: Script, count: int):
        self.store, self.backend, self.root = store, backend, script.root
        self.limit, self.env = script.test_seconds[backend], processes.environment(script.variables)
        self.left = [test for test in script.tests[backend] if test not in store.cases]
        self.failures: dict[str, str] = {}  # by file: what kept its tests from running
        self.lacking: dict[str, str] = {}  # by file: a package that is not installed here
        self.hang: str | None = None
        self.processes = min(count, len(self.left), os.cpu_count() or 1)
        self.counts = dict.fromkeys(OUTCOMES, 0)

    def put(self, test: str, record: dict) -> None:
        self.left.remove(test)
        self.counts[record["status"]] += 1
        self.store.put(test, record)
        if record["status"] in ("failed", "died"):
            print(line("correctness", test, record), flush=True)

    def take(self, worker: Worker, event: dict) -> None:
        """One line of a worker."""
        status, test = event.get("status"), event.get("test")
        if "file" in event:
            package = lacking(event["reason"])
            (self.lacking if package else self.failures)[event["file"]] = package or event["reason"]
        elif "absent" in event:
            for name in event["absent"]:
                self.missing(name)
        elif status == "taken":
            worker.taken.add(test)
        elif status == "started":
            worker.taken.discard(test)
            worker.test = test
        else:
            worker.test, worker.finished = None, worker.finished + 1
            self.put(test, {k: event[k] for k in ("status", "seconds", "reason") if k in event})

    def missing(self, test: str) -> None:
        """A test that no process has found."""
        if test not in self.left:
            return
        file = test.partition("::")[0]
        if file in self.lacking:
            self.put(test, {"status": "skipped", "reason": f"needs {self.lacking[file]}"})
        else:
            why = self.failures.get(file, "there is no such test")
            self.put(test, {"status": "failed", "reason": f"not collected: {why}"})

    def ended(self, worker: Worker, folder: Path, reason: str) -> None:
        """A process is gone: the test it was in has died, what it had taken is anybody's."""
        for event in worker.events():
            self.take(worker, event)
        if worker.test in self.left:
            self.put(worker.test, {"status": "died", "reason": reason, "log": worker.tail()})
        for test in worker.taken & set(self.left):
            claim(folder, test).unlink(missing_ok=True)
        if reason and not worker.finished and not worker.test and not worker.events():
            self.failures[""] = f"{reason}: {worker.tail()}"

    def until(self, end: float) -> None:
        files = list(dict.fromkeys(test.partition("::")[0] for test in self.left))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "taken").mkdir()
            (folder / "tests.json").write_text(json.dumps(self.left))
            workers = [Worker(i, folder, files, self.env, self.root) for i in range(self.processes)]
            started = len(workers)
            try:
                while workers and self.left:
                    for worker in list(workers):
                        for event in worker.events():
                            self.take(worker, event)
                        status, now = worker.process.poll(), time.time()
                        late = now - worker.moved > (self.limit if worker.test else START_SECONDS)
                        if status is None and not late and now < end:
                            continue
                        workers.remove(worker)
                        if status is not None:  # 0, 1: it has run what it could; 5: nothing was left for it
                            usual = status in (0, 1, 5) and worker.test is None
                            self.ended(worker, folder, "" if usual else f"pytest ends with status {status}")
                        elif now >= end:
                            processes.end(worker.process)
                            worker.test = None  # only the time was up
                            self.ended(worker, folder, "")
                            continue
                        else:
                            self.hang = worker.test or "the start of its tests"
                            (folder / "closed").touch()
                            processes.end(worker.process)
                            self.ended(worker, folder, f"hangs: took more than {now - worker.moved:.0f} s")
                        more = started < 3 * self.processes and not self.hang and "" not in self.failures
                        if self.left and not workers and more:  # what a process that died had taken
                            workers.append(Worker(started, folder, files, self.env, self.root))
                            started += 1
                    time.sleep(0.05)
            finally:
                for worker in workers:
                    processes.end(worker.process)

    def record(self) -> dict:
        """Of the whole: what did not run, and why."""
        if self.hang:
            for test in list(self.left):
                self.put(test, {"status": "skipped", "reason": f"{self.backend} hangs in {self.hang}"})
        why = [f"{file}: {reason}" if file else reason for file, reason in self.failures.items()]
        bad = self.counts["failed"] + self.counts["died"] > 0 or bool(why)
        found = {"status": "failed" if bad else "ok", **self.counts, "not run": list(self.left)}
        if bad:
            found["reason"] = "; ".join(why)[:3000] or "tests failed"
        return found


def tests(store: Results, backend: str, script: Script, count: int, end: float) -> str | None:
    """Runs the chosen tests of a backend that have no record yet, in ``count`` processes, until ``end``.
    Returns where the backend hangs, if it does. Tests for which there was no time get no record: --resume
    runs them."""
    run = Run(store, backend, script, count)
    run.until(end)
    record = run.record()
    store.put(f"pytest {backend}", record)
    print(line("correctness", f"pytest {backend}", record), {k: v for k, v in run.counts.items() if v},
          f"not run: {len(run.left)}" * bool(run.left), flush=True)
    return run.hang
