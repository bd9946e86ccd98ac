"""The Triton kernels of the timed cases, compiled into Triton's cache while a run is busy with other things.

    python -m benchmarks.precompile --arch 90 [--processes 8] [--only NAME ...]

Cases make the calls that they will make on the card, on CPU tensors and with few tokens; every launch goes
through Triton's own binder and compiler for the architecture, and ends there (``compile_only``). So the key
under which a kernel is kept is that of the launch on the card: tensors differ in their addresses alone, which
are multiples of 16 bytes in both places. No CUDA context is made, and no GPU is needed.

Prints one JSON line a case: {"case", "seconds", "kernels": {name: hash}} or {"case", "seconds", "reason"}.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

os.environ.pop("TRITON_INTERPRET", None)  # before the first import of Triton
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks import bench_cms, bench_layers, bench_titans  # noqa: E402
from benchmarks import measure as m  # noqa: E402
from hope_kernels.ops import titans_chunk  # noqa: E402
from hope_kernels.ops.cms.triton import operator as cms_operator  # noqa: E402
from hope_kernels.ops.shared import triton_library  # noqa: E402
from hope_kernels.ops.titans.triton import operator as titans_operator  # noqa: E402


class Absent(DriverBase):
    """A GPU that is not there: its architecture is all that compiling asks for."""

    def __init__(self, arch: int):
        self.arch = arch

    @classmethod
    def is_active(cls):
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("nothing is launched")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(arch: int) -> Iterator[dict[str, str]]:
    """Launches compile for ``arch`` and do nothing else; yields {kernel: hash of the last one compiled}. What
    they should have written holds anything."""
    found: dict[str, str] = {}
    run, driver = JITFunction.run, triton.runtime.driver
    # tensors of the CPU are let through as they are for Triton's interpreter
    places = ((triton_library, "on_cpu"), (titans_operator, "on_cpu"), (titans_operator, "interpreted"),
              (cms_operator, "on_cpu"))
    before = [getattr(*place) for place in places]

    def compiled(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found[self.__name__] = kernel.hash
        return kernel

    driver.set_active(Absent(arch))
    JITFunction.run = compiled
    for place in places:
        setattr(*place, lambda: True)
    try:
        yield found
    finally:
        JITFunction.run = run
        driver.set_active(None)  # the default one again, looked for when it is needed
        for place, old in zip(places, before):
            setattr(*place, old)


# -- what the timed cases launch -----------------------------------------------------------------------------


def memory(case: bench_titans.Case) -> None:
    """A call of one token; its kernel serves any number of them."""
    c, (w, inputs) = case.config, bench_titans.problem(replace(case, T=1), "cpu", 0)
    if case.kind != "grad":
        with torch.no_grad():
            titans_chunk(c, w, inputs, backend="triton")
        return
    w, inputs = bench_titans.problem(replace(case, T=2 * case.C + 1), "cpu", 0)
    leaves = [inputs.x.requires_grad_(), inputs.q.requires_grad_(), w.w2.requires_grad_()]
    o, _ = titans_chunk(c, w, inputs, backend="triton")
    torch.autograd.grad(o, leaves, torch.ones_like(o))


@torch.no_grad()
def layer(case: bench_layers.Case) -> None:
    x = bench_layers.inputs_of(case, 2, "cpu", 0)
    bench_layers.read(bench_layers.module_of(case, "cpu"), x, "triton")


@torch.no_grad()
def levels(case: bench_cms.Case) -> None:
    if case.kind == "refresh":
        for given in bench_cms.factors(case, "cpu", 0):
            bench_cms.refresh_matrix_(case, given)
    elif case.kind == "forward":
        bench_cms.read_levels(case, torch.zeros(case.B, 2, case.d, dtype=m.DTYPES[case.dtype]),
                              bench_cms.levels_of(case, "cpu"))
    else:
        learner, x, error = bench_cms.learner(case, "cpu")
        bench_cms.one_segment(learner, learner.init_state(case.B), x, error, "triton")


T, C, X = bench_titans.Case, bench_cms.Case, bench_cms.X
# What takes longest first, then as a run needs them. A model of 1.3 billion weights launches what its layer
# and its two levels launch.
CASES = (
    (memory, T("grad")), (memory, T("prefill")), (memory, T("prefill", N=64)),
    (memory, T("prefill", C=16, N=64)),
    (levels, C("refresh", 1024, 64, **X)), (levels, C("refresh", 4096, 64, **X)),
    (levels, C("segment", 2048, 512, **X)), (levels, C("segment", 1024, 64, **X)),
    (layer, bench_layers.Case("layer")), (memory, T("prefill", C=16)),
    (levels, C("forward", 1024, 512, K=3, B=8, **X)),
    (levels, C("forward", 1024, 512, K=3, B=8, rows="own", **X)),
    (memory, T("prefill", D=128, N=128, H=16)), (memory, T("prefill", D=128, N=512, H=16)),
    (memory, T("prefill", C=256)),
)


def compiled(arch: int, make: Callable, case) -> dict:
    began, record = time.perf_counter(), {"case": case.name}
    with compile_only(arch) as kernels:
        try:
            make(case)
            record["kernels"] = kernels
        except Exception as e:  # the launch on the card will compile it, or fail the same way
            record["reason"] = f"{type(e).__name__}: {e}"[:500]
    return record | {"seconds": round(time.perf_counter() - began, 2)}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--arch", type=int, required=True)
    p.add_argument("--processes", type=int, default=8)
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts of cases' names")
    args = p.parse_args(argv)
    wanted = [(make, case) for make, case in CASES if not args.only or any(o in case.name for o in args.only)]
    torch.set_num_threads(1)
    failed = 0
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("fork")) as pool:
        for done in [pool.submit(partial(compiled, args.arch), *job) for job in wanted]:
            print(json.dumps(done.result()), flush=True)
            failed += "reason" in done.result()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
