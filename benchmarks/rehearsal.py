"""What `python -m benchmarks.gpu --rehearse` is made of: a run on a card, on a machine without one.

Everything goes the way of a real run: its steps, processes, limits, files, exit status. Tensors lie in the
CPU's memory and are tiny, CUDA C++ kernels run on the emulator of csrc/emulator, Triton's in its interpreter,
times are the host's clock; ncu and compute-sanitizer are used where they are found, which is recorded as
anything else is.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

from benchmarks import bench_cms, bench_titans, card, peers
from benchmarks import measure as m
from benchmarks.device import describe
from benchmarks.plan import Item
from benchmarks.script import Script

LOAD = """
from hope_kernels.ops.shared import cuda_library
from tools import build_cuda
cuda_library.emulate(str(build_cuda.build_emulated()))
"""
SECONDS = 0.05
SMALL = {"C": 16, "N": 64, "H": 1, "B": 1}
PREFILL = bench_titans.Case("prefill", T=40, dtype="bf16", backend="cuda", **SMALL)
CONV = bench_titans.Case("conv", T=5, dtype="fp32", backend="triton", **SMALL)
GATE = replace(CONV, kind="gate")
REFRESH = bench_cms.Case("refresh", 32, 16, backend="chunked")


def emulated(case: bench_titans.Case, ceilings: dict) -> dict:
    exec(LOAD, {})
    return bench_titans.measured(case, "cpu", ceilings, SECONDS)


def parts(quick: bool) -> dict[str, list[Item]]:
    copy = partial(m.ceiling, "copy", "cpu", True)
    peer = next(peers.items("cpu", True))
    small = lambda case: partial(bench_titans.elementwise, case, "cpu", seconds=SECONDS)
    return {
        "env": [("env", "machine", {}, lambda _: describe("cpu")), ("env", "copy", {}, lambda _: copy())],
        "worth": [
            ("ops", PREFILL.name, asdict(PREFILL), partial(emulated, PREFILL)),
            ("ops", CONV.name, asdict(CONV), small(CONV)),
            ("cms", REFRESH.name, asdict(REFRESH),
             partial(bench_cms.measured, REFRESH, "cpu", seconds=SECONDS, quick=True)),
        ],
        "sweeps": [("ops", GATE.name, asdict(GATE), small(GATE))],
        "peers": [("peers", *peer)],
    }


TESTS = {
    "cuda": (card.SANITIZED, f"{card.CUDA}::test_how_many_rows_and_heads_run_at_once",
             f"{card.CUDA}::test_two_streams_at_once"),
    "triton": ("tests/ops/conv/test_conv.py::test_values[3-128-4-dtype0]",),
}
SCRIPT = Script(
    device="cpu", folder=lambda: "rehearsal", parts=parts, tests=TESTS, sanitized=card.SANITIZED,
    capability=lambda: 90, load=LOAD, compiled=("K3 shared",),
    variables={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
)
