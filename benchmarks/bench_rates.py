"""Which inner learning rate a CMS level of period C needs: the default (``config.default_rate``) against a
search, on two kinds of text.

    python -m benchmarks.bench_rates [--text FILE --title NAME] [--jobs 2] [--minutes 60]
        [--out benchmarks/results/rates.json]

Level 1 of the bundled model is given the period C and learns; level 2 (period 4 C) is frozen. Three disjoint
excerpts of each text are read as the rows of one batch. A figure is the bits per byte of their last halves
over the same with learning off; a rate that ends in NaN in any row has diverged. Texts: one of the model's
own domain, held out of its training, and --text (any file, read as bytes).

gd and momentum descend a gradient that is a sum over C tokens, so their rates are searched as multiples of 1
/ C (momentum 0.9 adds steps up to tenfold: its search begins lower); muon's is normalised and searched as it
is. All in octaves of the base rate: three coarse ones, outwards by two until the best is inside, between its
neighbours down to half an octave, then upwards to the edge: the smallest rate that is worse than learning
off. Every case is written at once and a case that the file has is not run again: a killed run, or one that
--minutes ended, goes on by the same command.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache

import torch

from benchmarks import studies as s
from hope_kernels import CMSConfig, HopeForCausalLM
from hope_kernels.identity import fingerprint

RESULT = os.path.join(os.path.dirname(__file__), "results", "rates.json")
PERIODS = (16, 64, 256, 1024, 8192)
BASE = {"gd": 0.5, "momentum": 0.5, "muon": 0.03}  # octave 0; gd and momentum: over C
COARSE = {"gd": (-2.0, 0.0, 2.0), "momentum": (-4.0, -2.0, 0.0), "muon": (-2.0, 0.0, 2.0)}
# one rate for every period: what was the default before this study, and what it made of it
RULES = {
    "gd": {"0.5 / C": lambda C: 0.5 / C, "0.25 / C^(3/4)": lambda C: 0.25 * C**-0.75,
        "1 / (8 sqrt C)": lambda C: 1 / (8 * C**0.5)},
    "momentum": {"0.5 / C": lambda C: 0.5 / C, "0.05 / C": lambda C: 0.05 / C,
        "1 / (64 sqrt C)": lambda C: 1 / (64 * C**0.5)},
    "muon": {"0.03": lambda C: 0.03, "0.03 min(2, sqrt(C / 256))": lambda C: 0.03 * min(2, (C / 256) ** 0.5)},
}
FINEST = 0.5
FURTHEST = 12
EDGE = 6  # octaves above the best within which the edge is looked for
LEAST, MOST = 12 * 1024, 64 * 1024  # bytes of an excerpt
PERIODS_READ = 32


@dataclass(frozen=True)
class Cell:
    """What gets a best rate of its own."""

    optimizer: str
    C: int
    text: str

    def name(self, octave: float) -> str:
        return f"{self.optimizer} C{self.C} {self.text} {octave:+g}"

    def rate(self, octave: float) -> float:
        return BASE[self.optimizer] * 2.0**octave / (1 if self.optimizer == "muon" else self.C)

    def octave(self, rate: float) -> float:
        return round(math.log2(rate / self.rate(0)), 6) + 0.0

    @property
    def default(self) -> float:
        """The octave of the rate a configuration without ``lr`` has."""
        return self.octave(CMSConfig(1, (self.C,), optimizer=self.optimizer).learning_rates[0])


def length(C: int, least: int = LEAST, most: int = MOST) -> int:
    """Bytes of an excerpt: 32 periods, at least ``least``, at most ``most``."""
    return min(max(PERIODS_READ * C, least), most)


def next_octave(tried: dict[float, float], coarse: tuple[float, ...]) -> float | None:
    """The octave to try next, given on / off of those tried (infinite: diverged); None when the search is over."""
    for octave in coarse:
        if octave not in tried:
            return octave
    order = sorted(tried)
    best = min(order, key=lambda k: (tried[k], k))
    if best == order[0] and best > -FURTHEST:
        return best - 2
    if best == order[-1] and best < FURTHEST:
        return best + 2
    at = order.index(best)
    beside = [order[i] for i in (at - 1, at + 1) if 0 <= i < len(order)]
    widest = max(beside, key=lambda k: (abs(k - best), k))
    if abs(widest - best) > FINEST:
        return (widest + best) / 2
    worse = [k for k in order if k > best and tried[k] >= 1]
    if not worse:
        return order[-1] + 1 if order[-1] < best + EDGE else None
    below = max(k for k in order if k < worse[0])
    return (below + worse[0]) / 2 if worse[0] - below > 1 else None


def tried(cases: dict, cell: Cell) -> dict[float, float]:
    """Octave -> on / off of what the file has of a cell. Empty without its baseline."""
    found = {}
    for record in cases.values():
        if record["cell"] == asdict(cell):
            off = cases.get(off_name(cell.text, record["bytes"]))
            if off is not None:
                found[record["octave"]] = s.mean(record["bits"]) / s.mean(off["bits"])
    return found


def off_name(text: str, size: int) -> str:
    return f"off {text} {size}"


# -- one case, in a process of its own -----------------------------------------------------------------------


@cache
def _model(name: str) -> HopeForCausalLM:
    return HopeForCausalLM.from_pretrained(name)


@cache
def _text(path: str) -> bytes:
    return s.text(path)


def run(job: dict) -> dict:
    """The record of one job: {"model", "path", "bytes", "longest", "seed", "cell", "octave"}; cell None reads
    with learning off."""
    torch.set_num_threads(1)
    model, cell = _model(job["model"]), job["cell"]
    ids = s.excerpts(_text(job["path"]), job["bytes"], job["longest"], job["seed"])
    began = time.perf_counter()
    record = {"cell": cell, "octave": job["octave"], "bytes": job["bytes"]}
    if cell is None:
        found, _ = s.last_half(model, ids, "off")
    else:
        rate, old = Cell(**cell).rate(job["octave"]), model.config.block_cms[0]
        more = [4**l * cell["C"] for l in range(old.num_levels)]
        cms = old.replace(chunks=tuple(more), lr=(rate, *[0.0] * (len(more) - 1)), optimizer=cell["optimizer"])
        found, _ = s.last_half(s.with_cms(model, cms), ids, "next_token")
        record["lr"] = rate
    seconds = time.perf_counter() - began
    return record | {
        "bits": s.finite(found), "seconds": round(seconds, 2), "bytes_per_s": round(ids.numel() / seconds)
    }


class _Inline:
    """An executor for one job at a time in this process."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, call, job):
        from concurrent.futures import Future

        done: Future = Future()
        done.set_result(call(job))
        return done


def search(
    study: s.Study, cells: list[Cell], texts: dict[str, str], model: str, seed: int, least: int, most: int,
    jobs: int, until: float
) -> None:
    """Runs the baselines, then for the cell with the fewest runs what it needs next, ``jobs`` at a time,
    until nothing is left or the time is up."""
    sizes = {C: length(C, least, most) for C in {c.C for c in cells}}

    def job(text: str, size: int, cell: Cell | None = None, octave: float | None = None) -> dict:
        return {"model": model, "path": texts[text], "bytes": size, "longest": most, "seed": seed,
                "cell": None if cell is None else asdict(cell), "octave": octave}

    queue = [(off_name(t, n), job(t, n)) for t in texts for n in sorted(set(sizes.values()))]
    queue = [(name, j) for name, j in queue if name not in study.cases]
    running: dict = {}

    def following() -> tuple[str, dict] | None:
        if queue:
            return queue.pop(0)
        if any(name.startswith("off ") for name, _ in running.values()):
            return None  # a ratio needs its baseline
        busy = {name.rpartition(" ")[0] for name, _ in running.values()}
        free = [
            (len(found := tried(study.cases, c)), i, c, found)
            for i, c in enumerate(cells) if c.name(0).rpartition(" ")[0] not in busy
        ]
        for _, _, cell, found in sorted(free, key=lambda f: f[:2]):
            octave = next_octave(found, COARSE[cell.optimizer])
            if octave is not None:
                return cell.name(octave), job(cell.text, sizes[cell.C], cell, octave)
        return None

    pool = _Inline() if jobs == 1 else ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    with pool:
        while True:
            while len(running) < jobs and time.time() < until and (one := following()) is not None:
                running[pool.submit(run, one[1])] = one
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                name, _ = running.pop(done)
                study.cases[name] = record = done.result()
                study.put(name, record, **conclusions(study.cases, cells))
                print(line(name, study.cases), flush=True)


# -- what follows --------------------------------------------------------------------------------------------


def between(found: dict[float, float], octave: float) -> float:
    """on / off at an octave: as tried, or the straight line between its neighbours in the logarithm, infinite
    beside a diverged one; NaN outside what was tried."""
    if octave in found:
        return found[octave]
    below, above = (
        max((k for k in found if k < octave), default=None), min((k for k in found if k > octave), default=None)
    )
    if below is None or above is None:
        return math.nan
    if not (math.isfinite(found[below]) and math.isfinite(found[above])):
        return math.inf
    share = (octave - below) / (above - below)
    return math.exp((1 - share) * math.log(found[below]) + share * math.log(found[above]))


def number(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else x


def summary(cases: dict, cells: list[Cell]) -> list[dict]:
    """Per cell with at least one finite run: the best rate, the default, the edge."""
    rows = []
    for cell in cells:
        found = tried(cases, cell)
        finite = {k: r for k, r in found.items() if math.isfinite(r)}
        if not finite:
            continue
        best = min(finite, key=lambda k: (finite[k], k))
        edge = min((k for k in found if k > best and found[k] >= 1), default=None)
        per_row = [r["bits"] for r in cases.values() if r["cell"] == asdict(cell) and r["octave"] == best][0]
        off = next(
            cases[off_name(cell.text, r["bytes"])]["bits"] for r in cases.values() if r["cell"] == asdict(cell)
        )
        rows.append(asdict(cell) | {
            "runs": len(found), "best_octave": best, "best_lr": cell.rate(best), "best_on_over_off": finite[best],
            "best_per_excerpt": [a / b for a, b in zip(per_row, off)],
            "default_octave": cell.default, "default_lr": cell.rate(cell.default),
            "default_on_over_off": number(at_default := between(found, cell.default)),
            "default_tried": not math.isnan(at_default),
            "edge_octave": edge, "edge_lr": None if edge is None else cell.rate(edge),
            "edge_diverged": None if edge is None else not math.isfinite(found[edge]),
            "finished": next_octave(found, COARSE[cell.optimizer]) is None,
        })
    return rows


def rules(cases: dict, cells: list[Cell]) -> dict:
    """Per optimizer what a rule for all periods and texts loses against each cell's best: the default, the
    best common octave, and ``RULES``. Of the cells whose coarse rates have been tried."""
    result = {}
    for optimizer in dict.fromkeys(c.optimizer for c in cells):
        found = [(c, tried(cases, c)) for c in cells if c.optimizer == optimizer]
        found = [
            (c, t) for c, t in found if set(COARSE[optimizer]) <= set(t) and any(map(math.isfinite, t.values()))
        ]
        if not found:
            continue

        def loss(octave: Callable[[Cell], float], found=found) -> list[float]:
            return [between(t, octave(c)) / min(t.values()) - 1 for c, t in found]

        def total(octave: float) -> float:
            losses = loss(lambda c: octave)
            return math.inf if any(map(math.isnan, losses)) else sum(losses)

        candidates = [k / 2 for k in range(-2 * FURTHEST, 2 * FURTHEST + 1)]
        best = min(candidates, key=lambda k: (total(k), k))
        served = math.isfinite(total(best))
        result[optimizer] = {
            "cells": len(found), "default": excess(loss(lambda c: c.default)),
            "best_octave": best if served else None,
            "best_base": BASE[optimizer] * 2.0**best if served else None,
            "best": excess(loss(lambda c, best=best: best)),
            "tried": {name: excess(loss(lambda c, rule=rule: c.octave(rule(c.C))))
                for name, rule in RULES[optimizer].items()},
        }
    return result


def excess(losses: list[float]) -> dict:
    known = all(map(math.isfinite, losses))
    return {
        "mean_excess": sum(losses) / len(losses) if known else None, "max_excess": max(losses) if known else None
    }


def conclusions(cases: dict, cells: list[Cell]) -> dict:
    return {"summary": summary(cases, cells), "rules": rules(cases, cells)}


def line(name: str, cases: dict) -> str:
    record = cases[name]
    if record["cell"] is None:
        return f"{name:64} {s.mean(record['bits']):.4f} bits per byte"
    ratio = tried(cases, Cell(**record["cell"]))[record["octave"]]
    shown = f"on/off {ratio:.4f}" if math.isfinite(ratio) else "diverged"
    return f"{name:64} lr {record['lr']:<11.4g} {shown:16} {record['bytes_per_s']} bytes/s"


def table(result: dict) -> str:
    """Markdown of a result file."""
    rows = ["| optimizer | period | text | default lr | on / off | best lr | of the default | on / off "
            "| worse than off from |",
            "|---|---|---|---|---|---|---|---|---|"]
    show = lambda x: "diverged" if x is None else f"{x:.3f}"
    for r in result["summary"]:
        edge = (
            "not reached" if r["edge_lr"] is None
            else f"{r['edge_lr']:.3g}{' (diverges)' if r['edge_diverged'] else ''}"
        )
        default = show(r["default_on_over_off"]) if r["default_tried"] else "not tried"
        times = 2 ** (r["best_octave"] - r["default_octave"])
        rows.append(f"| {r['optimizer']} | {r['C']} | {r['text']} | {r['default_lr']:.3g} | {default} "
                    f"| {r['best_lr']:.3g} | {times:.3g} x | {show(r['best_on_over_off'])} | {edge} |")
    rows.append("")

    def of(e: dict) -> str:
        if e["mean_excess"] is None:
            return "not known (diverged or not tried somewhere)"
        return f"{e['mean_excess']:.1%} on average, {e['max_excess']:.1%} at most"

    for optimizer, r in result["rules"].items():
        unit = "" if optimizer == "muon" else " / C"
        said = [f"by default {of(r['default'])}", *(f"with {name} {of(e)}" for name, e in r["tried"].items())]
        if r["best_octave"] is not None:
            said.append(f"with {r['best_base']:.3g}{unit}, the best of this form, {of(r['best'])}")
        rows.append(f"- {optimizer}: bits above those of each row's best rate: {'; '.join(said)}.")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--text", help="a file of another domain, read as bytes; .gz is unpacked")
    p.add_argument("--title", help="how the result names it (default: the file's name)")
    p.add_argument("--model", default="kjv-byte")
    p.add_argument("--periods", type=int, nargs="+", default=list(PERIODS))
    p.add_argument("--optimizers", nargs="+", default=list(BASE), choices=list(BASE))
    p.add_argument("--least", type=int, default=LEAST, help="bytes of an excerpt, at least")
    p.add_argument("--most", type=int, default=MOST)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    p.add_argument("--minutes", type=float, default=60)
    p.add_argument("--out", default=RESULT)
    p.add_argument("--table", action="store_true", help="only print what the file says, as Markdown")
    args = p.parse_args(argv)
    if args.table:
        print(table(s.load(args.out)))
        return
    texts = {s.KJV_TITLE: s.KJV} | ({args.title or os.path.basename(args.text): args.text} if args.text else {})
    cells = [Cell(o, C, t) for t in texts for C in args.periods for o in args.optimizers]
    setting = {
        "model": args.model, "weights": fingerprint(_model(args.model)),
        "texts": {t: s.digest(_text(path)) for t, path in texts.items()},
        "excerpts": s.ROWS, "least": args.least, "most": args.most, "seed": args.seed, "base": BASE,
    }
    study = s.Study(args.out, __doc__.split("\n")[0], setting)
    search(
        study, cells, texts, args.model, args.seed, args.least, args.most, args.jobs,
        time.time() + 60 * args.minutes
    )
    print(table(conclusions(study.cases, cells)))


if __name__ == "__main__":
    main()
