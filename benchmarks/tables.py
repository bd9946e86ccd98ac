"""The tables of README and docs, made from the result files.

    python -m benchmarks.tables [--check]

Rewrites what stands between ``<!-- NAME -->`` and ``<!-- end NAME -->`` in DOCUMENTS, for every NAME in
BLOCKS. --check changes nothing and fails where a block is not what the results give. A number in such a block
is never typed.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from benchmarks import plot, verdicts
from benchmarks.budget import table as budget_table
from benchmarks.markdown import markdown
from benchmarks.records import RESULTS, load, runs
from benchmarks.sources import ROOT, at_rest
from benchmarks.speed_tables import accuracy, cms, context, cpu, decode, products, reading, serve, train, writing
from benchmarks.study_tables import (
    FORGETTING,
    REAL,
    forgetting,
    forgetting_real,
    languages,
    learning,
    learning_memory,
    lm,
    mad,
    needles,
    optim,
    rates,
    real,
    recall,
    sinks,
    text_needles,
)

DOCUMENTS = ("README.md", "docs/backends.md", "docs/benchmarks.md", "docs/budget.md", "docs/claims.md",
             "docs/continual.md", "docs/llama.md", "docs/optim.md", "docs/real.md", "docs/serve.md")
WIDTH = 110


def goals(results: Path) -> str:
    """Ages and changed files are left to the command: they change without the results."""
    rows = verdicts.table(verdicts.rows(results))
    return markdown("what | goal | predicted | measured | verdict | on", rows) + (
        "\n\n`python -m benchmarks.report`. Predicted: from counted instructions and bytes and the assumptions of "
        "docs/budget.md, for an H200; nobody has measured these.")


def gpu(results: Path) -> str:
    devices = {name: run for name, run in runs(results).items() if name and not name.startswith("cpu-")}
    return "\n\n".join(device(name, run) for name, run in devices.items()) or "**No GPU figure exists.**"


def device(name: str, run: dict) -> str:
    """One card: every case with a time, and what has none."""
    share = lambda x: "" if x is None else f"{x:.0%}"
    rows, others = [], {}
    for section, data in run.items():
        for case, r in data["cases"].items():
            if section in ("env", "correctness") or r["status"] != "ok" or "ms" not in r:
                key = f"{section}: {r['status']}"
                others[key] = others.get(key, 0) + 1
            else:
                rows.append((case, f"{r['ms']['median']:.4f}",
                             *(f"{r[k]:.1f}" if r.get(k) else "" for k in ("TFLOP/s", "GB/s")),
                             *(share(r.get(k)) for k in ("of_matmul", "of_copy"))))
    mark = next(data["stamp"] for data in run.values())
    return (f"**{name}**, commit {mark['commit']}{', changed files' * mark['dirty']}, {mark['date']}\n\n"
            + markdown("case | ms | TFLOP/s | GB/s | of the GEMM rate | of the copy rate", rows)
            + "\n\nOther records: " + ", ".join(f"{n} {key}" for key, n in sorted(others.items())) + ".")


def figures(run: dict) -> str:
    """What the README shows."""
    return "\n\n".join((
        "**One layer on the CPU**, beside the token loop of nested-learning 0.2.0 (same function, same weights):",
        cpu(run), "**Learning while reading:**", learning(run)))


def plots(results: Path, folder: str) -> str:
    """The plots that there is data for, as images relative to a document; ``folder`` is "docs/" or ""."""
    found = [f"![{p.title}]({folder}{name})" for name, p in plot.drawn(results).items()]
    return "\n\n".join([*found, "`python -m benchmarks.plot` draws them from `benchmarks/results`."])


def blocks(results: Path, document: str) -> dict[str, Callable[[], str]]:
    """{block: what makes its text}; a block whose file is not there says so."""
    run = load(results)
    folder = "" if document.startswith("docs/") else "docs/"
    of_files = {"figures": figures, "cpu": cpu, "learning": learning_memory, "recall": recall,
                "context": context, "accuracy": accuracy, "sinks": sinks, "serve": serve, "decode": decode,
                "writing": writing, "reading": reading, "products": products, "train": train,
                "languages": languages, "mad": mad, "needles": needles, "text_needles": text_needles, "lm": lm,
                "optim": optim,
                **{name: lambda run, make=make: make(run["budget"]) for name, make in budget_table.BLOCKS.items()},
                **{name: lambda run, name=name: real(name, run) for name in REAL},
                "cms": cms, "rates": rates, "forgetting_real": forgetting_real,
                **{name: lambda run, name=name: forgetting(name, run) for name in FORGETTING}}
    absent = lambda name: (f"Not measured yet: `python -m benchmarks.bench_{name}` writes "
                           f"`benchmarks/results/{name}.json`.")
    # what is not called as the block
    file = {"figures": "cpu", "writing": "decode", "forgetting_real": "continual_real",
            **dict.fromkeys(FORGETTING, "continual"), **dict.fromkeys(budget_table.BLOCKS, "budget"),
            **dict.fromkeys(REAL, "real")}
    made = lambda name, make: make(run) if (of := file.get(name, name)) in run else absent(of)
    return {name: lambda name=name, make=make: made(name, make) for name, make in of_files.items()} | {
        "goals": lambda: goals(results), "gpu": lambda: gpu(results), "plots": lambda: plots(results, folder)}


def wrapped(text: str) -> str:
    """Paragraphs and list items in lines of ``WIDTH``; tables, pictures and what stands alone as they are."""
    lines = []
    for line in text.split("\n"):
        keep = line.startswith(("|", "!["))
        indent = "  " if line.startswith("- ") else ""
        lines += [line] if keep or len(line) <= WIDTH else textwrap.wrap(
            line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


def rewritten(text: str, makers: dict[str, Callable[[], str]]) -> tuple[str, list[str]]:
    """A document with its blocks made anew, and the names of those that changed. Raises ValueError for a
    block without an end."""
    changed = []
    for name in re.findall(r"^<!-- (\w+) -->$", text, re.M):
        if name not in makers:
            continue
        begin, end = f"<!-- {name} -->", f"\n<!-- end {name} -->"
        at = text.index(begin + "\n") + len(begin)
        if (stop := text.find(end, at)) < 0:
            raise ValueError(f"tables: block {name!r} has no line <!-- end {name} -->")
        made = "\n" + wrapped(makers[name]())
        if text[at:stop] != made:
            changed.append(name)
        text = text[:at] + made + text[stop:]
    return text, changed


def stale(results: Path, documents: Path = ROOT) -> list[tuple[str, str]]:
    """(document, block) of what differs from the results."""
    return [(name, block) for name in DOCUMENTS
            for block in rewritten((documents / name).read_text(encoding="utf-8"), blocks(results, name))[1]]


@at_rest()


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    p.add_argument("--documents", type=Path, default=ROOT, metavar="DIR")
    args = p.parse_args(argv)
    found = stale(args.results, args.documents)
    for name, block in found:
        print(f"{name}: {block} {'differs' if args.check else 'rewritten'}")
    if not args.check:
        for name in dict.fromkeys(name for name, _ in found):
            path = args.documents / name
            path.write_text(
                rewritten(path.read_text(encoding="utf-8"), blocks(args.results, name))[0], encoding="utf-8"
            )
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
