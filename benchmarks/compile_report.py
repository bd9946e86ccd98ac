"""Every Triton kernel of every tile row, compiled ahead of time: registers, spills, shared memory and
tensor-core instructions, no GPU.

    python -m benchmarks.compile_report [--check] [--full] [--arch 80 90 100] [--only NAME] [--jobs 2]
        [--fresh] [--again SHARE] [--keep] [--out FILE]

One line per kernel, row and architecture it is offered on. --full: every shape of providers that offer a
choice otherwise (an hour). --check exits with 1 when a kernel spills, uses local memory, asks for more shared
memory than the architecture has, or has no tensor-core instruction where its row wants one. Columns st/ld are
STL and LDL instructions, barr the barriers in the SASS, s the seconds the compilation took when it was last
done: what a compiler found is known under a hash of all it depends on (``compiled.py``). --again 0.02
compiles one in fifty of the known ones again, by chance, and what differs is a violation; --fresh all. --keep
writes what was found into the committed file. CUDA C++ kernels follow where nvcc is found
(``compile_cuda.py``).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

# before the first import of Triton: an interpreted kernel cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)
from benchmarks import compile_cuda, compile_triton, compiled  # noqa: E402
from benchmarks.compile_triton import triton  # noqa: E402
from benchmarks.machine import machine, write_json  # noqa: E402
from benchmarks.rows import PROVIDERS, provided  # noqa: E402
from hope_kernels.ops.shared.triton_build import SHARED_KIB, Specialization  # noqa: E402
from tools import build_cuda  # noqa: E402

COLUMNS = (
    ("shared", "smem"), ("registers", "regs"), ("spill_stores", "st"), ("spill_loads", "ld"),
    ("stack", "stack"), ("wgmma", "wgmma"), ("tcgen05", "tcgen05"), ("mma", "mma"), ("barriers", "barr"),
)


def row(spec: Specialization, arch: int, fresh: bool, again: float) -> tuple[str | None, list[dict]]:
    """The key and the record of one row. A row that Triton refuses is a record with that violation, and has
    no key."""
    key = compile_triton.key(spec, arch)
    try:
        return key, compiled.records(key, lambda: [compile_triton.compile_row(spec, arch)], fresh, again)
    except Exception as error:  # a compiler raises what it likes; the other rows are still wanted
        said = {"kernel": spec.name, "row": spec.row, "arch": arch, "violations": [compiled.violation(error)]}
        return None, [said]


def line(record: dict, widths: tuple[int, int]) -> str:
    cells = " ".join(f"{record.get(key, '-'):>{max(5, len(title))}}" for key, title in COLUMNS)
    head = f"{record['kernel']:{widths[0]}} {record['row']:{widths[1]}} {record['arch']:>5}"
    return f"{head} {cells} {record.get('seconds', '-'):>6}" + ("  VIOLATION" if record["violations"] else "")


# workers are forked after it is filled: kernels need not be pickled
_jobs: list[tuple[Specialization, int, bool, float]] = []


def _work(index: int) -> tuple[str | None, list[dict]]:
    return row(*_jobs[index])


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
    parser.add_argument("--again", type=float, default=0, metavar="SHARE", help="of what is known, by chance")
    parser.add_argument("--keep", action="store_true", help="write the committed file, of all kernels")
    parser.add_argument("--out", metavar="FILE", help="write the records as JSON")
    parser.add_argument("--provider", nargs="+", default=PROVIDERS, metavar="MODULE",
                        help="modules that offer specializations(); no CUDA C++ then")
    args = parser.parse_args(argv)
    if args.keep and (args.only or args.arch or args.full or args.provider != PROVIDERS):
        parser.error("--keep is of all kernels: without --only, --arch, --full and --provider")
    if args.keep and build_cuda.nvcc() is None:
        parser.error("--keep needs nvcc")

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
        _jobs.extend((s, arch, args.fresh, args.again) for s in wanted for arch in s.archs
                     if not args.arch or arch in args.arch)
    widths = tuple(max((len(getattr(s, field)) for s, *_ in _jobs), default=0) for field in ("name", "row"))
    titles = dict.fromkeys((key for key, _ in COLUMNS)) | {key: title for key, title in COLUMNS}
    print(
        line({"kernel": "", "row": "", "arch": "sm_", "seconds": "s", "violations": [], **titles}, widths),
        flush=True
    )

    start, records, found = time.perf_counter(), [], {}

    def add(key: str | None, some: list[dict]) -> None:
        if key is not None:
            found[key] = some
        records.extend(some)
        for record in some:
            print(line(record, widths), flush=True)

    with tempfile.TemporaryDirectory() as scratch:  # Triton's own cache would hide the compile time
        triton.knobs.cache.dir = scratch
        with ProcessPoolExecutor(max(1, args.jobs), multiprocessing.get_context("fork")) as pool:
            for key, some in pool.map(_work, range(len(_jobs))):
                add(key, some)
    if args.provider == PROVIDERS:
        for key, some in compile_cuda.report(args.arch, args.only, jobs=args.jobs, fresh=args.fresh,
                                             again=args.again):
            add(key, some)
    if args.keep:
        compiled.commit(found)
    elif args.provider == PROVIDERS and (new := found.keys() - compiled.committed().keys()):
        print(f"{len(new)} are not in {compiled.COMMITTED.name}, and every fresh clone compiles them: --keep")
    bad = [(r, v) for r in records for v in r["violations"]]
    for record, violation in bad:
        print(f"{record['kernel']} [{record['row']}] sm_{record['arch']}: {violation}", file=sys.stderr)
    print(f"{len(records)} compiled kernels, {len(bad)} violations, {time.perf_counter() - start:.0f} s")
    if args.out:
        write_json(args.out, {"machine": machine(), "triton": triton.__version__, "kernels": records})
    return 1 if bad and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
