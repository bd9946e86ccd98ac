"""Every case of benchmarks.gpu as a test of pytest-benchmark, with its choice of cases, tables, files and
comparisons.

    python -m pytest benchmarks/bench_suite.py --benchmark-only [-k "layers and cpp"] [--quick] [--benchmark-json FILE]

A case checks its result, times itself (CUDA events, inputs in rotation) and returns a record; a result that
is wrong fails the test and has no time. The times of the record are what pytest-benchmark is told, by a clock
that moves by them; the rest of the record (FLOPs, bytes, rates, fractions of the ceilings, errors) is in
``extra_info``. Without --benchmark-only nothing is measured. Unlike benchmarks.gpu it has no child process
that a hanging kernel may end, no time budget, and does not run the kernels' tests first.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks import measure as m
from benchmarks.device import ceilings_of
from benchmarks.plan import plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Clock:
    """Seconds, as measured before: ``pass_`` lets one time of the list pass."""

    def __init__(self):
        self.now, self.coming = 0.0, iter(())

    def __call__(self) -> float:
        return self.now

    def pass_(self) -> None:
        self.now += next(self.coming)


CLOCK = Clock()


def pytest_generate_tests(metafunc) -> None:
    quick = metafunc.config.getoption("--quick", False)
    cases = [(section, name, call) for section, name, _, call in plan(DEVICE, quick) if section != "env"]
    marked = lambda section: pytest.mark.benchmark(group=section, timer=CLOCK)
    metafunc.parametrize(
        "call", [pytest.param(call, id=f"{section}: {name}", marks=marked(section)) for section, name,
            call in cases]
    )


@cache
def ceilings(quick: bool) -> dict:
    return {
        name: m.ceiling(name, DEVICE, quick)[unit]
        for name, unit in ceilings_of(DEVICE).items()
    }


def test_case(call, benchmark, request):
    quick = request.config.getoption("--quick", False)
    if benchmark.disabled or not request.config.getoption("benchmark_only"):
        pytest.skip("measured with --benchmark-only")
    now = m.Beside(quick) if DEVICE == "cpu" else ceilings(quick)
    try:
        record = {"status": "ok"} | call(now)
    except (m.Unserved, ImportError, torch.OutOfMemoryError) as e:
        pytest.skip(str(e))
    if record["status"] == "skipped":
        pytest.skip(record["reason"])
    assert record["status"] == "ok", record["reason"]
    benchmark.extra_info.update(record, device=DEVICE, ceilings=dict(now))
    samples = times(record)
    if not samples:
        pytest.skip("nothing is timed here")
    CLOCK.coming = iter([ms / 1e3 for ms in samples])
    benchmark.pedantic(CLOCK.pass_, rounds=len(samples), iterations=1)


def times(record: dict) -> list[float]:
    """ms: all samples of the record, or its median alone where it keeps no more; what has rates and no single
    call: ms a token."""
    ms = record.get("ms")
    if ms is None:
        return [1e3 / record["tokens/s"]] if record.get("tokens/s") else []
    return getattr(ms, "samples", [ms["median"]])
