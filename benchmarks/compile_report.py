"""Every Triton kernel of every tile row, compiled ahead of time: registers, spills, shared memory and
tensor-core instructions, no GPU.

    python -m benchmarks.compile_report [--check] [--full] [--arch 80 90 100] [--only NAME] [--jobs 2] [--fresh]
        [--out FILE]

One line per kernel, row and architecture it is offered on. --full: every shape of providers that offer a
choice otherwise (an hour). --check exits with 1 when a kernel spills, uses local memory, asks for more shared
memory than the architecture has, or has no tensor-core instruction where its row wants one. Columns st/ld are
STL and LDL instructions, barr the barriers in the SASS, s the seconds the compilation took when it was last
done: results are kept in build/compile_report under a hash of the kernel's source (with all it calls), the
row, the architecture and Triton's version. CUDA C++ kernels follow where nvcc is found (``compile_cuda.py``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

# before the first import of Triton: an interpreted kernel cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks import compile_cuda, cubin  # noqa: E402
from benchmarks.machine import machine, write_json  # noqa: E402
from benchmarks.rows import PROVIDERS, provided  # noqa: E402
from hope_kernels.files import write_atomically  # noqa: E402
from hope_kernels.ops.shared.triton_build import SHARED_KIB, Specialization  # noqa: E402

CACHE = compile_cuda.CACHE
COLUMNS = (
    ("shared", "smem"), ("registers", "regs"), ("spill_stores", "st"), ("spill_loads", "ld"),
    ("stack", "stack"), ("wgmma", "wgmma"), ("tcgen05", "tcgen05"), ("mma", "mma"), ("barriers", "barr"),
)


def compile_row(spec: Specialization, arch: int) -> dict:
    """Compiles one row for one architecture and reads the result. Returns a flat record."""
    signature, constexprs, attrs = spec.source()
    source = ASTSource(fn=spec.fn, signature=signature, constexprs=constexprs, attrs=attrs)
    start = time.perf_counter()
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "maxnreg": spec.maxnreg}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        used = cubin.usage(f.name)[kernel.metadata.name]
    return {
        "kernel": spec.name, "row": spec.row, "arch": arch, "num_warps": spec.num_warps, **asdict(used),
        "shared": kernel.metadata.shared,
        "seconds": round(seconds, 2), "violations": cubin.violations(used, arch, kernel.metadata.shared,
            spec.wants_mma),
    }


def cached_row(spec: Specialization, arch: int, fresh: bool) -> dict:
    """``compile_row``, or what it found the last time nothing was different. A row that Triton refuses is a
    record with that violation."""
    signature, constexprs, attrs = spec.source()
    source = ASTSource(fn=spec.fn, signature=signature, constexprs=constexprs, attrs=attrs)
    readers = b"".join(Path(path).read_bytes() for path in (__file__, cubin.__file__))
    options = (spec.num_warps, spec.num_stages, spec.maxnreg, spec.wants_mma)
    identity = (source.hash(), list(signature.items()), spec.name, spec.row, *options, arch, triton.__version__,
                hashlib.sha256(readers).hexdigest())
    path = CACHE / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.json"
    if path.exists() and not fresh:
        return json.loads(path.read_text())
    try:
        record = compile_row(spec, arch)
    except Exception as error:  # a compiler raises what it likes; the other rows are still wanted
        return {
            "kernel": spec.name, "row": spec.row, "arch": arch,
            "violations": [f"does not compile: {type(error).__name__}: {error}"]
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(str(path), json.dumps(record).encode())
    return record


def line(record: dict, widths: tuple[int, int]) -> str:
    cells = " ".join(f"{record.get(key, '-'):>{max(5, len(title))}}" for key, title in COLUMNS)
    head = f"{record['kernel']:{widths[0]}} {record['row']:{widths[1]}} {record['arch']:>5}"
    return f"{head} {cells} {record.get('seconds', '-'):>6}" + ("  VIOLATION" if record["violations"] else "")


# workers are forked after it is filled: kernels need not be pickled
_jobs: list[tuple[Specialization, int, bool]] = []


def _work(index: int) -> dict:
    return cached_row(*_jobs[index])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 on a violation")
    parser.add_argument("--full", action="store_true", help="every shape, not a representative set")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(SHARED_KIB), help="default: all a row is offered on"
    )
    parser.add_argument("--only", metavar="NAME", help="kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--fresh", action="store_true", help="compile again what is known")
    parser.add_argument("--out", metavar="FILE", help="write the records as JSON")
    parser.add_argument("--provider", nargs="+", default=PROVIDERS, metavar="MODULE",
                        help="modules that offer specializations(); no CUDA C++ then")
    args = parser.parse_args(argv)

    _jobs.clear()
    for module in args.provider:
        try:
            specs = list(provided(module, args.full))
        except ModuleNotFoundError as missing:
            if missing.name not in (None, module):
                raise
            print(f"{module}: no such module, nothing to compile")
            continue
        wanted = [s for s in specs if not args.only or args.only in s.name]
        _jobs.extend(
            (s, arch, args.fresh) for s in wanted for arch in s.archs if not args.arch or arch in args.arch
        )
    widths = tuple(max((len(getattr(s, field)) for s, _, _ in _jobs), default=0) for field in ("name", "row"))
    titles = dict.fromkeys((key for key, _ in COLUMNS)) | {key: title for key, title in COLUMNS}
    print(
        line({"kernel": "", "row": "", "arch": "sm_", "seconds": "s", "violations": [], **titles}, widths),
        flush=True
    )

    start, records = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:  # Triton's own cache would hide the compile time
        triton.knobs.cache.dir = scratch
        with ProcessPoolExecutor(max(1, args.jobs), multiprocessing.get_context("fork")) as pool:
            for record in pool.map(_work, range(len(_jobs))):
                records.append(record)
                print(line(record, widths), flush=True)
    cuda = (
        compile_cuda.report(args.arch, args.only, jobs=args.jobs, fresh=args.fresh)
        if args.provider == PROVIDERS else ()
    )
    for record in cuda:
        records.append(record)
        print(line(record, widths), flush=True)
    bad = [(r, v) for r in records for v in r["violations"]]
    for record, violation in bad:
        print(f"{record['kernel']} [{record['row']}] sm_{record['arch']}: {violation}", file=sys.stderr)
    print(f"{len(records)} compiled kernels, {len(bad)} violations, {time.perf_counter() - start:.0f} s")
    if args.out:
        write_json(args.out, {"machine": machine(), "triton": triton.__version__, "kernels": records})
    return 1 if bad and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
