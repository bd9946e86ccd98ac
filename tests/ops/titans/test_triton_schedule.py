"""The persistent kernel under many programs at once: threads of the interpreter that take tickets and wait
for each other."""

import functools
import inspect
import sys
import threading
import time

import pytest
import torch
from problems import problem, results, run, single

from hope_kernels import TitansConfig, available_backends
from hope_kernels.ops import titans_chunk

pytest.importorskip("triton")
import triton.language as tl  # noqa: E402, F401  (the interpreter looks for it among the globals of what it runs)
from triton.runtime.interpreter import GridExecutor  # noqa: E402

from hope_kernels.ops.titans.triton import schedule as scan  # noqa: E402
from hope_kernels.ops.titans.triton.operator import interpreted  # noqa: E402

pytestmark = pytest.mark.skipif(
    available_backends()["triton"] is not None or not interpreted(),
    reason="needs Triton's interpreter (TRITON_INTERPRET=1)"
)


@pytest.fixture
def many_programs(monkeypatch):
    """Every launch runs as six threads that hand over to each other all the time. Returns how many programs
    found work."""
    plain = GridExecutor.__init__

    def init(self, fn, *args, **kwargs):
        @functools.wraps(fn)
        def together(**arguments):
            failures = []

            def program():
                try:
                    fn(**arguments)
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=program) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if failures:
                raise failures[0]

        together.__signature__ = inspect.signature(fn)
        plain(self, together, *args, **kwargs)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    monkeypatch.setattr(GridExecutor, "__init__", init)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("config", [
    TitansConfig(64, 2), pytest.param(TitansConfig(32, 1, chunk_memory=32, chunk_other=16, activation="silu"),
        marks=pytest.mark.slow),
    TitansConfig(32, 1, chunk_memory=16, chunk_other=32),
    pytest.param(TitansConfig.preset("titans", d_model=32, dgd=True), marks=pytest.mark.slow),
    TitansConfig(32, 1, adaptive_q=True, hidden_mult=2),
], ids=range(5))
def test_programs_that_run_at_once_compute_the_same_bits(config, many_programs, request):
    tokens = max(config.chunk_memory, config.chunk_other) + 5
    w_init, inputs = (single(t) for t in problem(config, 2, tokens))
    together = results(*run(config, w_init, inputs, "triton", [tokens, 18]))
    request.getfixturevalue("monkeypatch").undo()
    alone = results(*run(config, w_init, inputs, "triton", [tokens, 18]))
    for name, t in together.items():
        assert torch.equal(t, alone[name]), name


def test_pure_reads_of_a_query_memory_wait_chunk_by_chunk(many_programs, request, monkeypatch):
    """The first task is slow: later chunks' queries may not pass for its own."""
    config = TitansConfig(32, 1, adaptive_q=True)
    w_init, inputs = (single(t) for t in problem(config, 1, 64))
    read_task, first = scan.read_task, []

    def late(*args, **named):
        if not first:
            first.append(1)
            time.sleep(1.5)
        read_task(*args, **named)

    monkeypatch.setattr(scan, "read_task", late)
    with torch.no_grad():
        together, _ = titans_chunk(config, w_init, inputs, update=False, backend="triton")
    assert first
    monkeypatch.undo()
    with torch.no_grad():
        alone, _ = titans_chunk(config, w_init, inputs, update=False, backend="triton")
    assert torch.equal(together, alone)
