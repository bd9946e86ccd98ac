"""Which kernel has run where: docs/verified.md.

    python -m benchmarks.verified                    the page from what is committed
    python -m benchmarks.verified FOLDER ... [--device NAME]
                                                     takes in the evidence that test runs left there
                                                     (HOPE_KERNELS_EVIDENCE=FOLDER python -m pytest ...;
                                                     benchmarks.gpu leaves it in evidence/ of its results, and
                                                     --device is the card's name)

A record of benchmarks/results/verified.json says that tests which passed launched a kernel: how, with which
operands, for which architecture, with a hash of the kernel's code. It is taken out where its code has changed.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import write_json
from benchmarks.records import RESULTS
from benchmarks.rows import PROVIDERS, leaves, provided
from benchmarks.sources import Code, at_rest, digest

FILE, PAGE = RESULTS / "verified.json", RESULTS.parents[1] / "docs" / "verified.md"
CUDA = ("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp")
HEAD = """# Where every kernel has run

Made by `python -m benchmarks.verified` from test runs ({file}); not typed. A number is
how many tests that passed launched the kernel with operands of that type; a dash: none. `make test` runs a third
of the rows of Triton's tables as PTX, `make test-full` all of them; where the numbers come from the former, rows of
the latter are missing here. All kernels are compiled for sm_100 too, and nothing of that has run.

- **interpreted**: Triton's source, by its interpreter, in NumPy: no layouts, barriers or tensor cores. It has no
  bf16 products.
- **emulated source**: the CUDA C++ source by a host compiler, a fiber a thread (csrc/emulator).
- **emulated PTX**: what Triton and nvcc compile, instruction by instruction on warps of 32 lanes, programs running
  at once in random orders, with races, bounds and deadlocks looked for (csrc/emulator/ptx, tools/ptx).
- **GPU**: a real one.

"""


class Kernel(NamedTuple):
    name: str  # family.function
    dtype: str
    entry: str  # as sources.py names code, "" for CUDA C++


def offered() -> list[Kernel]:
    """Every kernel and type that the tables offer."""
    found: dict[tuple[str, str], str] = {}
    for spec in (s for module in PROVIDERS for s in provided(module)):
        function = spec.fn.fn
        module = function.__module__.removeprefix("hope_kernels.")
        kinds = set(leaves(spec.source()[0].values()))
        dtype = next((d for d in ("bf16", "fp16") if f"*{d}" in kinds), "fp32")
        key = f"{module.removeprefix('ops.').split('.')[0]}.{function.__name__}", dtype
        found[key] = f"{module}:{function.__name__}"
    kernels = [Kernel(*key, entry) for key, entry in found.items()]
    for width in (64, 128):
        for name in ("prefill", "decode"):
            kernels += [Kernel(f"cuda.titans_{name}<{width}>", dtype, "") for dtype in ("bf16", "fp16")]
    order = {"bf16": 0, "fp16": 1, "fp32": 2}
    return sorted(kernels, key=lambda k: (k.name, order[k.dtype]))


def hash_of(kernel: Kernel) -> str:
    return digest(Code((kernel.entry,)) if kernel.entry else Code(CUDA))


def gathered(folders: Iterable[Path]) -> dict[tuple[str, int, str, str], int]:
    """(how, architecture, kernel, dtype) -> tests that passed, of all processes' files."""
    found: dict[tuple[str, int, str, str], int] = {}
    for path in (p for folder in folders for p in sorted(folder.glob("*.json"))):
        for *what, count in json.loads(path.read_text()):
            key = tuple(what)
            found[key] = found.get(key, 0) + count
    return found


def taken_in(
    old: list[dict], seen: dict[tuple[str, int, str, str], int], date: str, device: str = "a GPU"
) -> list[dict]:
    """Records of kernels as they are now: a new one replaces an old one of the same kernel and kind. device: the
    GPU on which ``seen`` was seen, where it was one."""
    known = {(k.name, k.dtype): k for k in offered()}
    records = {(r["how"], r["arch"], r["name"], r["dtype"]): r for r in old}
    with at_rest():
        for (how, arch, name, dtype), count in seen.items():
            if (name, dtype) in known:
                records[how, arch, name, dtype] = {
                    "how": how, "arch": arch, "name": name, "dtype": dtype, "tests": count, "date": date,
                    "code": hash_of(known[name, dtype]),
                } | ({"device": device} if how == "gpu" else {})
    return [records[key] for key in sorted(records)]


def current(records: list[dict]) -> list[dict]:
    known = {(k.name, k.dtype): k for k in offered()}
    with at_rest():
        codes = {key: hash_of(k) for key, k in known.items()}
    return [r for r in records if codes.get((r["name"], r["dtype"])) == r["code"]]


def page(records: list[dict]) -> str:
    """The Markdown."""
    by = {(r["how"], r["arch"], r["name"], r["dtype"]): r["tests"] for r in records}
    titles = ["kernel", "operands", "interpreted", "emulated source", "emulated PTX, sm_80", "emulated PTX, sm_90",
              "GPU"]
    rows = []
    for k in offered():
        cells = [by.get(("interpreted", 0, k.name, k.dtype)) if k.entry else "",
                 "" if k.entry else by.get(("source", 0, k.name, k.dtype)),
                 *(by.get(("ptx", arch, k.name, k.dtype)) for arch in (80, 90))]
        gpus = [f"{r['tests']} on {r['device']}, {r['date']}" for r in records
                if (r["how"], r["name"], r["dtype"]) == ("gpu", k.name, k.dtype)]
        rows.append([f"`{k.name}`", k.dtype, *("–" if c is None else str(c) for c in cells), "; ".join(gpus) or "–"])
    lines = ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]
    return HEAD.format(file="`" + FILE.relative_to(RESULTS.parents[1]).as_posix() + "`") + "\n".join(lines) + "\n"


def present() -> str:
    """The page of what is committed."""
    records = json.loads(FILE.read_text())["kernels"] if FILE.exists() else []
    return page(current(records))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("evidence", nargs="*", type=Path, help="folders that test runs have left")
    parser.add_argument("--device", default="a GPU", help="the GPU on which they ran, where it was one")
    args = parser.parse_args(argv)
    if args.evidence:
        old = json.loads(FILE.read_text())["kernels"] if FILE.exists() else []
        today = datetime.date.today().isoformat()
        records = current(taken_in(old, gathered(args.evidence), today, args.device))
        write_json(str(FILE), {"kernels": records})
    PAGE.write_text(present(), encoding="utf-8")
    print(f"{PAGE}: {sum(line.startswith('| `') for line in PAGE.read_text().splitlines())} kernels and types")


if __name__ == "__main__":
    main()
