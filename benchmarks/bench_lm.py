"""Language modelling against equals: HOPE, Titans and attention of one size, and HOPE without one of its parts.

    python -m benchmarks.bench_lm --text FILE[=WEIGHT] ... [--test NAME=FILE ...] [--other NAME=FILE ...]
        [--arms hope ...] [--steps 576] [--seeds 0 1 2] [--threads 1] [--out benchmarks/results/lm.json] [--table]

Bytes are tokens. Models have equal parameters (within 2%) and read the same bytes in the same order: contexts of 1k,
4k and 16k bytes, a third of the bytes in each, in steps of 256 bytes a row. What they hold (memories, or the keys and
values of attention) is carried from step to step, and gradients are cut there. Nothing but the memories learns while
training reads. Embeddings begin wide (SPREAD of benchmarks/synthetic/arms.py): from 0.02 attention spends its first
hundreds of steps on their length. Rates, a factor of 2 apart, are tried for each of the models with seed 0 until
the best has a worse one on either side; what chooses is the last 2% of every text, which does not train. HOPE without
one of its parts takes HOPE's rate.

Tested are texts that the training has not seen: of its domains (--test) and of others (--other), three excerpts of
each. Judged is the last quarter of a context, and the same bytes for every length. Learning off: the CMS stays as it
was trained (memories write all the same); on: it learns what is read. Seconds are of the processor. Every case is
written at once, and one that the file has is not run again.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from itertools import islice

import torch
import torch.nn.functional as F

from benchmarks import studies as s
from benchmarks.bench_optim import schedule
from benchmarks.lm.arms import ABLATIONS, TITLES, build
from benchmarks.lm.reading import contexts, judged, sources
from benchmarks.synthetic.arms import size
from hope_kernels import HopeForCausalLM

RESULT = os.path.join(os.path.dirname(__file__), "results", "lm.json")
LENGTHS = (1024, 4096, 16384)
TAIL = 0.02  # of every text: chooses the rates
FIRST_RATE, WIDEST = 8e-3, 4
DEFAULT = [name for name in TITLES if name != "momentum"]  # which has no kernel, and takes five times as long
LEARN = ("off", "next_token")


def train(arm: str, lr: float, seed: int, steps: int, args: argparse.Namespace) -> tuple[HopeForCausalLM, dict]:
    """Stops where the loss is no number."""
    model = build(arm, seed, args.d_model, args.layers)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    stream = contexts([t.data for t in args.found], [t.weight for t in args.found], args.batch, args.tokens,
                      tuple(args.lengths), seed)
    curve, losses, state, seconds = [], [], None, 0.0
    for step, (ids, fresh) in enumerate(islice(stream, steps)):
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        logits, state = model(ids[:, :-1], None if fresh else state)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = state.detach()
        losses.append(loss.item() / math.log(2))
        seconds += time.process_time() - began
        if not math.isfinite(losses[-1]):
            break
        if (step + 1) % args.every == 0 or step + 1 == steps:
            curve.append([step + 1, round(sum(losses) / len(losses), 4)])
            losses = []
    trained = math.isfinite(loss.item())
    return model.eval(), {"arm": arm, "lr": lr, "seed": seed, "parameters": size(model), "curve": curve,
                          "trained": trained, "seconds": round(seconds, 2)}


def chosen(arm: str, study: s.Study, args: argparse.Namespace) -> float:
    """The rate whose model predicts the tails best, learning off, in the mean over texts and lengths."""
    tails = [s.excerpts(raw(t.heldout), max(args.lengths), max(args.lengths), 0, 1) for t in args.found]

    def loss(lr: float) -> float:
        case = f"search {arm} {lr:g}"
        if case not in study.cases:
            model, record = train(arm, lr, 0, args.search_steps, args)
            found = [judged(model, tail, n, "off") for tail in tails for n in args.lengths] if record["trained"] else []
            value = s.finite([s.mean(found)])[0] if found else None
            study.put(case, record | {"bits": value})
            print(case, value, flush=True)
        value = study.cases[case]["bits"]
        return math.inf if value is None else value

    return s.best_rate(FIRST_RATE, loss, args.widest)


def tested(model: HopeForCausalLM, args: argparse.Namespace) -> dict:
    """{"bits": {text: {learn: {length: bits per byte}}}, "microseconds": {learn: a byte in the longest contexts}}"""
    longest, bits, took = max(args.lengths), {}, {}
    for name, data in args.tests.items():
        rows = s.excerpts(data, longest, longest, 0, args.excerpts)
        bits[name] = {}
        for learn in LEARN if model.learns else LEARN[:1]:
            bits[name][learn] = {}
            for length in args.lengths:
                began = time.process_time()
                bits[name][learn][str(length)] = judged(model, rows, length, learn)
                if length == longest:
                    took.setdefault(learn, []).append(1e6 * (time.process_time() - began) / rows.numel())
    return {"bits": bits, "microseconds": {learn: round(s.mean(found), 2) for learn, found in took.items()}}


def table(data: dict) -> str:
    """Markdown: bits per byte of the training's domains, and of others; mean and range over the seeds."""
    setting, runs = data["setting"], {}
    for case, record in data["cases"].items():
        if case.startswith("run "):
            runs.setdefault(record["arm"], []).append(record)
    if not runs:
        return "no runs yet"
    parts = {"the training's domains": setting["test"], "other domains": setting["other"]}
    return "\n\n".join(f"Of {title} ({', '.join(names)}):\n\n{part(data, runs, list(names))}"
                       for title, names in parts.items() if names)


def part(data: dict, runs: dict[str, list[dict]], names: list[str]) -> str:
    """The table of some texts, in the mean over them."""
    setting = data["setting"]
    columns = [(length, learn) for length in setting["lengths"] for learn in LEARN]
    titles = [f"{length:,}: off" if learn == "off" else "on" for length, learn in columns]
    lines = [" | ".join(["| model", "parameters", *titles, "bytes/s: training", "reading", "and learning", "rate",
                         "seeds |"]), "|" + "---|" * (len(columns) + 7)]
    for arm, title in TITLES.items():
        found = runs.get(arm)
        if found is None:
            continue
        cells = [title, f"{found[0]['parameters']:,}"]
        for length, learn in columns:
            values = [s.mean([r["bits"][name][learn][str(length)] for name in names]) if r["trained"] else math.inf
                      for r in found if not r["trained"] or learn in r["bits"][names[0]]]
            cells.append(spread(values))
        read = setting["batch"] * setting["tokens"]
        trained = [r["curve"][-1][0] * read / r["seconds"] for r in found if r["curve"]]
        cells.append(f"{s.mean(trained):,.0f}" if trained else "-")
        for learn in LEARN:
            took = [r["microseconds"][learn] for r in found if learn in r.get("microseconds", {})]
            cells.append(f"{1e6 / s.mean(took):,.0f}" if took else "-")
        lines.append(" | ".join(["| " + cells[0], *cells[1:], f"{found[0]['lr']:g}", f"{len(found)} |"]))
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    if math.inf in values:
        return "diverged"
    return f"{s.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def raw(data: torch.Tensor) -> bytes:
    return data.to(torch.uint8).numpy().tobytes()


def named(specs: list[str]) -> dict[str, bytes]:
    """The bytes of files given as NAME=FILE."""
    return {name: s.text(path) for name, path in (spec.split("=", 1) for spec in specs)}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--text", nargs="+", default=[], metavar="FILE[=WEIGHT]", help="files or folders to train on")
    p.add_argument("--test", nargs="+", default=[f"KJV={s.KJV}"], metavar="NAME=FILE", help="of the same domains")
    p.add_argument("--other", nargs="+", default=[], metavar="NAME=FILE", help="of other domains")
    p.add_argument("--arms", nargs="+", choices=list(TITLES), default=DEFAULT)
    p.add_argument("--steps", type=int, default=576)
    p.add_argument("--search-steps", type=int, default=192)
    p.add_argument("--widest", type=int, default=WIDEST, help="rates tried on either side of the first")
    p.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    p.add_argument("--d-model", type=int, default=64)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--tokens", type=int, default=256, help="a row reads in a step")
    p.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of contexts; each divides the next")
    p.add_argument("--excerpts", type=int, default=s.ROWS, help="of every text that is tested")
    p.add_argument("--every", type=int, default=48, help="steps between points of a curve")
    args = s.arguments(p, argv, RESULT, table)
    if args is None:
        return
    if not args.text:
        p.error("--text: nothing to train on")
    args.found, test, other = sources(args.text, TAIL), named(args.test), named(args.other)
    args.tests = test | other
    for t in args.found:
        if len(t.heldout) < max(args.lengths):
            p.error(f"--text {t.name}: its last {TAIL:.0%} are {len(t.heldout)} bytes, expected at least "
                    f"{max(args.lengths)}, which choose the rates")
    sizes = ("steps", "search_steps", "widest", "d_model", "layers", "batch", "tokens", "lengths", "excerpts", "every")
    setting = {name: getattr(args, name) for name in sizes} | {
        "text": {t.name: [t.weight, s.digest(raw(t.data))] for t in args.found},
        "test": {name: s.digest(data) for name, data in test.items()},
        "other": {name: s.digest(data) for name, data in other.items()},
    }
    study = s.Study(args.out, __doc__.split("\n")[0], setting, kind="train")
    rates = {arm: chosen("hope" if arm in ABLATIONS else arm, study, args) for arm in args.arms}
    for seed in args.seeds:
        for arm, lr in rates.items():
            case = f"run {arm} seed {seed}"
            if case not in study.cases:
                model, record = train(arm, lr, seed, args.steps, args)
                study.put(case, record | (tested(model, args) if record["trained"] else {}))
                print(case, study.cases[case].get("bits"), flush=True)
    print(table(study.data))


if __name__ == "__main__":
    main()
