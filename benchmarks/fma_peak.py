"""The ceiling of this machine's cores: a loop of nothing but fused multiply-adds in fp32 (fma_peak.c), compiled for
the machine and run by as many threads as are asked for."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("fma_peak.c")
STEPS, REPEATS = 1_000_000, 10


@cache
def _library() -> ctypes.CDLL:
    """Raises FileNotFoundError without a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("the ceiling of this machine needs a C compiler (gcc or clang)")
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/fma_peak.so"
        command = [compiler, "-O2", "-march=native", "-ffp-contract=fast", "-funroll-loops", "-shared", "-fPIC"]
        subprocess.run([*command, str(SOURCE), "-o", out], check=True)
        lib = ctypes.CDLL(out)
    for name in ("wide", "half"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = [ctypes.c_long], ctypes.c_float
    lib.flops.restype = ctypes.c_long
    return lib


def fma_rate(threads: int) -> float:
    """FLOP/s of ``threads`` threads together, on vectors of the better width: the best of some milliseconds, since
    whatever else the machine does can only lower it."""
    lib = _library()
    ways = [(getattr(lib, name), lib.flops(name == "wide")) for name in ("wide", "half")]
    return max(_rate(loop, flops, threads) for _ in range(REPEATS) for loop, flops in ways)


def _rate(loop, flops: int, threads: int) -> float:
    others = [threading.Thread(target=loop, args=(STEPS,)) for _ in range(threads - 1)]
    began = time.perf_counter()
    for other in others:
        other.start()
    loop(STEPS)
    for other in others:
        other.join()
    return threads * STEPS * flops / (time.perf_counter() - began)
