"""The tests of the kernels on the device that is measured, and their outcomes as records."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from benchmarks import gpu_library
from benchmarks import measure as m
from benchmarks.records import Results
from benchmarks.run import line

TESTS = (
    "tests/ops/titans/test_triton*.py", "tests/ops/titans/test_cuda.py", "tests/layers/test_titans_triton.py",
    "tests/ops/conv/test_conv.py", "tests/ops/output_gate/test_output_gate.py",
)
TEST_PROCESSES = 8
OUTCOMES = ("passed", "failed", "skipped", "died")


def outcomes(junit: Path, log: str) -> dict[str, dict]:
    """Every test's outcome: from the junit file, or, where pytest was ended before it wrote one, from the lines
    of its -v output."""
    if junit.exists():
        found = {}
        for case in ElementTree.parse(junit).iter("testcase"):
            bad = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
            status = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
            record = {"status": status, "seconds": float(case.get("time", 0))}
            if bad is not None:
                record["reason"] = ((bad.get("message") or "") + "\n" + (bad.text or "")[-1500:]).strip()
            found[f"{case.get('classname')}::{case.get('name')}"] = record
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
    their time is compilation. Tests for which there was no time are run by the next --resume."""
    env = gpu_library.environment()
    files = sorted(p.relative_to(m.ROOT).as_posix() for pattern in TESTS for p in m.ROOT.glob(pattern))
    tests = collected(["-m", "not slow", *files], env)
    tests += collected(["-m", "gpu and not slow", "tests", *(f"--ignore={name}" for name in files)], env)
    tests = [t for t in tests if recorded_as(t) not in store.cases]
    # no process where no test is left: pytest without a name would run all tests
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
            counts = {s: sum(r["status"] == s for r in found.values()) for s in OUTCOMES}
            record = {"status": "ok", "exit": code, **counts}
            if code != 0 or counts["failed"]:
                reason = "time limit" if code is None else f"pytest exit status {code}"
                status = "died" if code is None else "failed"
                record |= {"status": status, "reason": reason, "log": text[-4000:]}
            store.put(f"pytest {job + 1} of {jobs}", record)
            print(
                line("correctness", f"{job + 1} of {jobs}", record), {k: v for k, v in counts.items() if v},
                flush=True
            )
