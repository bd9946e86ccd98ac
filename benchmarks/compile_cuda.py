"""The CUDA C++ half of the compile report: every kernel file through nvcc, gated like the Triton rows.
Without nvcc it is empty."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks import compiled, cubin
from tools import build_cuda

# (file, architectures such as "90a", its kernels want tensor cores)
TARGETS = tuple(map(build_cuda.target, build_cuda.ARCHITECTURES))
SOURCES = tuple((path, TARGETS, True) for path in build_cuda.kernels())
FLAGS = (*build_cuda.DEVICE_FLAGS, "-Xptxas", "-v,-warn-spills")
# C75xx: wgmma serialized; "setmaxnreg ignored" is only an info
COMPLAINT = re.compile(r"warning|\(C7\d+\)|setmaxnreg", re.IGNORECASE)
# instructions of a kernel whose body is for other architectures: what sets up the stack, EXIT, and a branch
# to itself
EMPTY = 4
# mma instructions in a kernel's code, at least: a missing one is a product that was lost. Prefill: those of a
# warp's panel (160), of a scalar memory's loops over groups and its update, and of the keys' products;
# decode: those of both kinds of memory; step: as many, and those of a commit.
PRODUCTS = {
    "titans_prefill<64": 256, "titans_prefill<128": 288, "titans_decode<": 64, "titans_step<64": 280,
    "titans_step<128": 312,
}
# Where a chunk is committed by warpgroups, mma are left for reading and for products of keys, wgmma are what
# ../csrc/cuda/titans/warpgroups/commit.cuh counts, for memories of both kinds, or one_block.cuh.
BY_WARPGROUPS = re.compile(r"titans_\w+<64, hope::bf16, \d, ([23]),")
BY_MMA, BY_WGMMA = 62, {"2": 128, "3": 80}


class Refused(Exception):
    """What nvcc says of a file it does not compile."""


def report(
    archs: list[int] | None, only: str | None, sources=SOURCES, jobs: int = 2, fresh: bool = False,
    again: float = 0
) -> Iterator[tuple[str | None, list[dict]]]:
    """A key and the records of its kernels for every file and architecture, as ``compile_report`` prints
    them. shared: what is static; a kernel's dynamic shared memory is known at its launch only. A file that
    nvcc refuses is a record with that violation, and has no key."""
    compiler = build_cuda.nvcc()
    if compiler is None:
        return
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout

    def work(path: Path, arch: str, mma: bool) -> tuple[str | None, list[dict]]:
        contents = [path, *build_cuda.headers(), Path(__file__), Path(cubin.__file__)]
        key = build_cuda.hash_of(contents, arch, mma, FLAGS, version)
        try:
            return key, compiled.records(key, lambda: compile_file(compiler, path, arch, mma), fresh, again)
        except (Refused, compiled.Differs) as error:
            of = {"kernel": path.stem, "row": label(path), "arch": int(arch.rstrip("af"))}
            return None, [of | {"violations": [compiled.violation(error)]}]

    wanted = [(Path(f), arch, mma) for f, offered, mma in sources for arch in offered
              if (not only or only in label(f)) and (not archs or int(arch.rstrip("af")) in archs)]
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        yield from pool.map(lambda job: work(*job), wanted)


def label(path: Path) -> str:
    """What --only looks at: titans_64_bf16.cu for csrc/cuda/titans/64_bf16.cu."""
    inside = path.is_relative_to(build_cuda.SOURCES)
    return path.relative_to(build_cuda.SOURCES).as_posix().replace("/", "_") if inside else path.name


def lost_products(kernel: str, mma: int, wgmma: int = 0) -> list[str]:
    wanted = next((n for part, n in PRODUCTS.items() if part in kernel), 0)
    pairs = [("mma", mma, wanted), ("wgmma", wgmma, 0)]
    if found := BY_WARPGROUPS.search(kernel):
        pairs = [("mma", mma, BY_MMA), ("wgmma", wgmma, BY_WGMMA[found[1]])]
    return [f"{n} {name} instructions, expected {least} or more" for name, n, least in pairs if n < least]


def compile_file(compiler: str, path: Path, arch: str, wants_mma: bool) -> list[dict]:
    """One record a kernel of the file, none for a file with host code only. Raises Refused."""
    sm, start = int(arch.rstrip("af")), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.cubin"
        done = subprocess.run(
            [compiler, "-cubin", f"-arch=sm_{arch}", *FLAGS, "-o", out, str(path)], capture_output=True, text=True
        )
        if done.returncode:
            raise Refused(done.stderr.strip())
        common = {"row": label(path), "arch": sm, "seconds": round(time.perf_counter() - start, 2)}
        complaints = [line.strip() for line in done.stderr.splitlines() if COMPLAINT.search(line)]
        found = {name: u for name, u in cubin.usage(out).items() if u.instructions > EMPTY}
        of_all = [c for c in complaints if not any(f"'{name}'" in c for name in found)]
        return [
            {"kernel": readable(name), **common, **asdict(u),
             "violations": [*of_all, *(c for c in complaints if f"'{name}'" in c),
                 *lost_products(readable(name), u.mma, u.wgmma),
                            *cubin.violations(u, sm, u.shared, wants_mma)]}
            for name, u in found.items()
        ]


def readable(mangled: str) -> str:
    """A kernel's name with its template arguments, without its parameters; as it is where no c++filt is."""
    if shutil.which("c++filt") is None:
        return mangled
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    return re.sub(r"^void |\(hope::TitansParams.*", "", name)
