"""A plugin of pytest for several processes that share one list of tests: each takes the next test that nobody
has taken, and tells what becomes of it, a line of JSON an event. ``correctness`` starts the processes and
reads the lines.

The folder of HOPE_KERNELS_TOLD holds tests.json (a list of ids, in their order), taken/ (an empty file for
every test that a process has taken) and, once no more tests may begin, a file "closed". HOPE_KERNELS_TOLD_LOG
is where this process writes its lines: {"test", "status": taken | started | passed | failed | skipped,
"seconds", "reason"}, or {"file", "reason"} of a file that could not be collected, or {"absent": tests that
are in no file}.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("HOPE_KERNELS_TOLD", "."))
LOG = os.environ.get("HOPE_KERNELS_TOLD_LOG", os.devnull)
_found: dict[str, dict] = {}  # of the test that runs


def tell(**event) -> None:
    with open(LOG, "a") as f:
        f.write(json.dumps(event | {"time": time.time()}) + "\n")


def said(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The error in one line, then the end of what pytest shows of it."""
    if isinstance(report.longrepr, tuple):  # of a test that was skipped
        return report.longrepr[2]
    text, crash = report.longreprtext, getattr(report.longrepr, "reprcrash", None)
    errors = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E  ")]
    first = crash.message.splitlines()[0] if crash and crash.message else next(iter(errors), "")
    return f"{first}\n{text[-1500:]}".strip()


def claim(folder: Path, test: str) -> Path:
    return folder / "taken" / hashlib.sha256(test.encode()).hexdigest()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        tell(file=report.nodeid, reason=said(report))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted, found = json.loads((FOLDER / "tests.json").read_text()), {item.nodeid: item for item in items}
    tell(absent=[name for name in wanted if name not in found])
    items[:] = [found[name] for name in wanted if name in found]


def taken(item: pytest.Item) -> bool:
    """Whether this process is the one that runs the test."""
    if (FOLDER / "closed").exists():
        return False
    try:
        os.close(os.open(claim(FOLDER, item.nodeid), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    tell(test=item.nodeid, status="taken")
    return True


def pytest_runtestloop(session: pytest.Session) -> bool:
    if session.config.option.collectonly:
        return True
    mine = filter(taken, session.items)
    item = next(mine, None)
    while item is not None and not (FOLDER / "closed").exists():
        following = next(mine, None)  # pytest must know what may stay set up
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following
    return True


def pytest_runtest_logstart(nodeid: str) -> None:
    _found.clear()
    _found.update(status="passed", seconds=0.0)
    tell(test=nodeid, status="started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _found["seconds"] += report.duration
    if report.failed or report.skipped and _found["status"] == "passed":
        reason = said(report) or getattr(report, "wasxfail", "") or report.when
        _found.update(status=report.outcome, reason=reason)


def pytest_runtest_logfinish(nodeid: str) -> None:
    tell(test=nodeid, **_found | {"seconds": round(_found["seconds"], 3)})
