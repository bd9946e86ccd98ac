"""Optimizers as memories, on a byte language model: loss by step and by second, and what the optimizer keeps.

    python -m benchmarks.bench_optim [--text FILE] [--optimizers m3 muon ...] [--steps 600] [--seeds 0 1 2]
        [--search-steps 600] [--d-model 64] [--layers 2] [--out benchmarks/results/optim.json] [--table]

The text (the bundled one, or --text) has three parts: the first 80% trains, 10% chooses rates, and the last
10% is judged. For every optimizer rates are tried, a factor of 2 apart, on seed 0 until the best one has a
worse one on either side; then it trains with every seed at the best rate. All see the same bytes in the same
order, the same first weights, and the same schedule (a warm-up, then a cosine). Seconds are of the processor
(--threads 1), so other work on the machine is not in them. All but adamw train the matrices inside the blocks
by their rule (dgd and sgd those of linear layers alone), and embedding, head, vectors and memories by AdamW
at AdamW's best rate. Peers: adamw and muon are PyTorch's; nested_m3 is nested-learning's, where that package
is installed. Every case is written at once, and one that the file has is not run again.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import studies as s
from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig, optim

RESULT = os.path.join(os.path.dirname(__file__), "results", "optim.json")
MATCHED = {"adjust_lr_fn": "match_rms_adamw"}  # rates of orthogonal steps on AdamW's scale
WIDEST = 8  # rates that are tried at most on either side of the first
DECAY = 0.05


class Together:
    """Several optimizers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict:
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def adamw(params: Iterable[Tensor], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=DECAY)


def beside(make: Callable) -> Callable:
    """An optimizer that knows matrices only, and AdamW for the other parameters."""
    def both(model: HopeForCausalLM, lr: float, base: float) -> Together:
        matrices, others = (group["params"] for group in optim.groups(model))
        return Together(make(matrices, lr), adamw(others, base))
    return both


def ours(cls: type[optim.MatrixOptimizer], **options) -> Callable:
    def make(model: HopeForCausalLM, lr: float, base: float) -> optim.MatrixOptimizer:
        groups = model if cls is optim.DGD else optim.groups(model)
        return cls(groups, lr=lr, weight_decay=DECAY, adamw_lr=base / lr, adamw_betas=(0.9, 0.98), **options)
    return make


def nested_m3(matrices: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    from nested_learning.optim.m3 import M3

    return M3(matrices, lr=lr, weight_decay=DECAY)


# by name: how it is made of a model, its rate and AdamW's; the first rate that is tried
OPTIMIZERS: dict[str, tuple[Callable, float]] = {
    "adamw": (lambda model, lr, base: adamw(model.parameters(), lr), 4e-3),
    "muon": (beside(lambda p, lr: torch.optim.Muon(p, lr=lr, weight_decay=DECAY, **MATCHED)), 4e-3),
    "m3": (ours(optim.M3, **MATCHED), 4e-3),
    "m3_paper": (ours(optim.M3, accumulate="paper"), 1e-3),
    "nested_m3": (beside(nested_m3), 1e-3),
    "delta": (ours(optim.DeltaMomentum), 1.0),
    "delta_orthogonal": (ours(optim.DeltaMomentum, orthogonalize=True, **MATCHED), 4e-3),
    "deep": (ours(optim.DeepMomentum, **MATCHED), 4e-3),
    "dgd": (ours(optim.DGD), 0.25),
    "sgd": (ours(optim.DGD, erase=0.0), 0.25),
}


def build(args: argparse.Namespace, seed: int) -> HopeForCausalLM:
    torch.manual_seed(seed)
    d = args.d_model
    titans = TitansConfig(d, max(1, d // 32), chunk_memory=16, chunk_other=16)
    config = HopeConfig(256, d, args.layers, titans=titans, cms=CMSConfig(d, (64, 256), expansion=2.0))
    return HopeForCausalLM(config)


def batch(data: Tensor, args: argparse.Namespace, seed: int, step: int) -> Tensor:
    """[batch, tokens + 1], of (seed, step) alone."""
    g = torch.Generator().manual_seed(1_000_003 * seed + step)
    starts = torch.randint(0, len(data) - args.tokens - 1, (args.batch,), generator=g)
    return torch.stack([data[i : i + args.tokens + 1] for i in starts.tolist()]).long()


def bits(model: HopeForCausalLM, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1])[0]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def judged(model: HopeForCausalLM, data: Tensor, args: argparse.Namespace) -> float:
    """Bits per byte over the text, in rows of ``tokens`` bytes without a past."""
    rows = data[: len(data) // (args.tokens + 1) * (args.tokens + 1)].view(-1, args.tokens + 1).long()
    rows = rows[: args.judge_rows]
    return sum(float(bits(model, part)) * len(part) for part in rows.split(64)) / len(rows)


def schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps))


def train(
    name: str, lr: float, base: float, seed: int, steps: int, text: dict, args: argparse.Namespace
) -> dict:
    """Trains one model. Stops where the loss is no number."""
    model = build(args, seed)
    optimizer = OPTIMIZERS[name][0](model, lr, base)
    rates = [group["lr"] for group in optimizer.param_groups]
    curve, losses, total, inside = [], [], 0.0, 0.0
    for step in range(steps):
        ids, began = batch(text["train"], args, seed, step), time.process_time()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule(step, steps)
        optimizer.zero_grad()
        loss = bits(model, ids)
        (loss * math.log(2)).backward()
        stepped = time.process_time()
        optimizer.step()
        now = time.process_time()
        total, inside = total + now - began, inside + now - stepped
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if (step + 1) % args.every == 0 or step + 1 == steps:
            curve.append([step + 1, round(total, 3), round(mean(losses), 4)])
            losses = []
    kept = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values()
               if isinstance(t, Tensor))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    part = "choose" if text.get("search") else "judge"
    found = judged(model, text[part], args) if math.isfinite(loss.item()) else math.nan
    return {"optimizer": name, "lr": lr, "seed": seed, "bits": s.finite([found])[0], "curve": curve,
            "seconds": round(total, 3), "share": round(inside / total, 4), "state": kept, "weights": weights}


def best_rate(name: str, base: float, study: s.Study, text: dict, args: argparse.Namespace) -> float:
    def loss(lr: float) -> float:
        case = f"search {name} {lr:g}"
        if case not in study.cases:
            study.put(case, train(name, lr, base, 0, args.search_steps, text | {"search": True}, args))
            print(f"{case}: {study.cases[case]['bits']}", flush=True)
        value = study.cases[case]["bits"]
        return math.inf if value is None else value

    return s.best_rate(OPTIMIZERS[name][1], loss, args.widest)


def at_time(curve: list[list[float]], seconds: float) -> float | None:
    """The training loss after ``seconds``, between the points of the curve; None before the first."""
    before = None
    for _, when, value in curve:
        if when >= seconds:
            if before is None:
                return None
            share = (seconds - before[0]) / (when - before[0])
            return before[1] + share * (value - before[1])
        before = (when, value)
    return before[1] if before else None


def table(data: dict) -> str:
    """Markdown: bits per byte over the seeds, and what a step costs."""
    runs: dict[str, list[dict]] = {}
    for case, record in data["cases"].items():
        if case.startswith("run "):
            runs.setdefault(record["optimizer"], []).append(record)
    if not runs:
        return "no runs yet"
    budget = min(r["seconds"] for records in runs.values() for r in records if r["bits"] is not None)
    lines = ["| optimizer | rate | bits per byte | from, to | training loss at equal time | ms a step | "
             "of it the optimizer | state / weights |", "|---|---|---|---|---|---|---|---|"]
    for name, records in sorted(runs.items(), key=lambda item: s.mean([r["bits"] for r in item[1]])):
        values = [r["bits"] for r in records]
        steps = [r["seconds"] / r["curve"][-1][0] for r in records if r["curve"]]
        then = [at_time(r["curve"], budget) for r in records]
        shown = "diverged" if None in values else f"{mean(values):.3f}"
        spread = "" if None in values else f"{min(values):.3f}, {max(values):.3f}"
        equal = "" if None in then else f"{mean(then):.3f}"
        lines.append(
            f"| {name} | {records[0]['lr']:g} | {shown} | {spread} | {equal} | "
            f"{1e3 * mean(steps) if steps else math.nan:.1f} | {mean(r['share'] for r in records):.1%} | "
            f"{records[0]['state'] / records[0]['weights']:.2f} |"
        )
    return "\n".join(lines)


def parts(path: str) -> dict[str, Tensor]:
    data = torch.frombuffer(bytearray(s.text(path)), dtype=torch.uint8)
    a, b = int(0.8 * len(data)), int(0.9 * len(data))
    return {"train": data[:a], "choose": data[a:b], "judge": data[b:]}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--text", default=s.KJV, help="a text file, or .gz")
    p.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--search-steps", type=int, default=600)
    p.add_argument("--widest", type=int, default=WIDEST, help="rates tried on either side of the first")
    p.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    p.add_argument("--d-model", type=int, default=64)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--judge-rows", type=int, default=10**9, help="rows of the text that are judged, at most")
    p.add_argument("--every", type=int, default=20, help="steps between points of a curve")
    args = s.arguments(p, argv, RESULT, table)
    if args is None:
        return
    sizes = ("steps", "search_steps", "widest", "d_model", "layers", "batch", "tokens", "judge_rows", "every")
    setting = {name: getattr(args, name) for name in sizes} | {"text": s.digest(s.text(args.text))}
    study, text = s.Study(args.out, __doc__.split("\n")[0], setting, kind="optimizer"), parts(args.text)
    base = best_rate("adamw", 0.0, study, text, args)
    for name in args.optimizers:
        if name == "nested_m3" and find_spec("nested_learning") is None:
            print("nested_m3: the package nested-learning is not installed")
            continue
        lr = best_rate(name, base, study, text, args)
        for seed in args.seeds:
            case = f"run {name} seed {seed}"
            if case not in study.cases:
                study.put(case, train(name, lr, base, seed, args.steps, text, args))
                print(f"{case}: {study.cases[case]['bits']}", flush=True)
    print(table(study.data))


if __name__ == "__main__":
    main()
