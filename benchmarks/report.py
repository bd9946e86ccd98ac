"""Goals against committed results, and whether those results still describe the code.

    python -m benchmarks.report [--check] [--results DIR] [--against OLD NEW]

Prints a row for each goal (``goals.py``): met, missed by how much, or not measured and by which command it
would be. Then: results measured in a working tree with changed files, results older than the code they
measured (``sources.py``), results that do not say which code that was. --check fails, naming them, for
results that are older, and for tables or plots in README and docs that are not what the results give. Of
studies, whose figures are what a model predicted and not how fast, and of the budget, it only says that they are
older.
--against compares two runs, files or folders: what got slower or faster beyond its spread (with --check,
slower fails).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import plan, plot, tables
from benchmarks.changes import changes
from benchmarks.goals import unplanned
from benchmarks.records import RESULTS, dirty, measured, read, runs
from benchmarks.sources import ROOT, age, at_rest
from benchmarks.verdicts import rows, table

# hours of reading; that the code still computes the same is what the tests are for. The budget is counts, which
# `python -m benchmarks.budget --check` compares with the code's.
STUDIES = ("rates.json", "continual.json", "continual_real.json", "learning.json", "languages.json", "lm.json",
           "mad.json", "needles.json", "optim.json", "recall.json", "text_needles.json", "sinks.json", "real.json",
           "budget.json")


def ages(results: Path) -> dict[str, list[tuple[str, str]]]:
    """{"older" or "unknown": [(file, record)]} over all results."""
    found: dict[str, list[tuple[str, str]]] = {"older": [], "unknown": []}
    for device, run in runs(results).items():
        for stem, data in run.items():
            if stem in ("env", "correctness"):
                continue
            for name, record in measured(data):
                if (how := age(record)) in found:
                    found[how].append((f"{device}/{stem}.json".removeprefix("/"), name))
    return found


# -- goals ---------------------------------------------------------------------------------------------------


def columns(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def goals(results: Path) -> str:
    """The table, what there is to say about its figures, and what would measure the others."""
    found, planned = rows(results), plan.names("cuda", False)
    lines = [columns([("what", "goal", "predicted", "measured", "verdict", "on"), *table(found)]), ""]
    for r in found:
        notes = [{"older": "older than the code", "unknown": "of unknown age"}[r.age]] if r.age else []
        if notes := [*notes, *["measured with changed files"] * r.dirty]:
            lines.append(f"{r.goal.what}, on {r.device}: {', '.join(notes)}")
    for why in dict.fromkeys(r.why for r in found if r.value is None):
        lines += ["", f"Not measured ({why}); what would:"]
        for r in found:
            if r.value is None and r.why == why:
                where = "; ".join(dict.fromkeys(f"{k.file}.json: {k.name}" for k in r.goal.figure.keys))
                lines.append(
                    f"  {r.goal.command} -> {where}{', NO SUCH CASE YET' * any(unplanned(r.goal, planned))}"
                )
    counts = {"met": 0, "missed": 0, "not": 0}
    for r in found:
        counts[r.verdict.split()[0]] += 1
    return "\n".join([*lines, "", f"{counts['met']} met, {counts['missed']} missed, {counts['not']} not measured"])


# -- the command ---------------------------------------------------------------------------------------------


def older(results: Path) -> dict[str, str]:
    """{file: what is said of a result that is older than the code it measured}."""
    bad: dict[str, list[str]] = {}
    for file, name in ages(results)["older"]:
        bad.setdefault(file, []).append(name)
    return {file: f"{file}: older than the code it measured{': ' if names != [''] else ''}{', '.join(names[:5])}"
                  f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}" for file, names in bad.items()}


def check(results: Path, documents: Path) -> list[str]:
    """What is wrong with committed results and what is written about them."""
    problems = [text for file, text in older(results).items() if file not in STUDIES]
    made = "not what the results give (python -m benchmarks."
    problems += [f"{file}: table {block} is {made}tables)" for file, block in tables.stale(results, documents)]
    problems += [f"{name} is {made}plot)" for name in plot.stale(results, documents)]
    return problems


@at_rest()
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument(
        "--check", action="store_true",
        help="fail where a result is older than its code or a document differs from results"
    )
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    p.add_argument("--documents", type=Path, default=ROOT, metavar="DIR", help="where README.md and docs are")
    p.add_argument(
        "--against", type=Path, nargs=2, metavar=("OLD", "NEW"),
        help="two result files, or folders of one device each"
    )
    args = p.parse_args(argv)
    if args.against:
        try:
            found = list(changes(*(read(path) for path in args.against)))
        except ValueError as e:
            p.error(str(e))
        print(
            "\n".join(f"{name}: {text}" for name, text in found) or "nothing is slower or faster beyond its spread"
        )
        return int(args.check and any(not text.startswith("faster") for _, text in found))
    print(goals(args.results))
    for file in dirty(args.results):
        print(f"{file}: measured in a working tree with changed files")
    old = ages(args.results)
    for file in dict.fromkeys(file for file, _ in old["unknown"] if file != "verified.json"):  # says it itself
        print(f"{file}: does not say which code it measured, age unknown")
    for file, text in older(args.results).items():
        if file in STUDIES:
            print(f"note: {text}")
    problems = check(args.results, args.documents)
    for text in problems:
        print(f"{'WRONG' if args.check else 'note'}: {text}")
    return int(args.check and bool(problems))


if __name__ == "__main__":
    sys.exit(main())
