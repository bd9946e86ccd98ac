"""Compression, recall, copying, memorisation: HOPE with the preset "recall", Titans and attention of one size.

    python -m benchmarks.bench_mad [--tasks compression ...] [--arms hope ...] [--steps 800] [--seeds 0 1 2]
        [--threads 1] [--out benchmarks/results/mad.json] [--table]

Six tasks after "Mechanistic design and scaling of hybrid architectures" (benchmarks/synthetic/mad.py), each learned
by a model of its own, of one block, or of two for attention: one that looks back, one that finds. Every step has
fresh sequences; training ends early where held-out sequences are mastered, and others, of which training knows
nothing, are the test. Rates are chosen from RATES by the held-out loss of seed 0, for every task and arm; then every
seed is trained at the best. HOPE's and Titans' memories write after every second token, so that a pair is known when
its next one is asked for. Every case is written at once, and one that the file has is not run again.
"""

from __future__ import annotations

import argparse
import os
from functools import partial

import torch

from benchmarks import studies as s
from benchmarks.synthetic.arms import ARMS, as_large_as_hope, config, size
from benchmarks.synthetic.fit import fit
from benchmarks.synthetic.mad import TASKS, VOCABULARY, score
from benchmarks.synthetic.paper import MAD as PAPER
from hope_kernels import HopeConfig, HopeForCausalLM, TitansConfig

RESULT = os.path.join(os.path.dirname(__file__), "results", "mad.json")
RATES = (3e-3, 1e-2, 3e-2)
TESTED, HELD_OUT = 500, 100  # sequences: of the test; that a rate and the end of training are judged by
MASTERED = 0.01  # nats an answer, below which training ends
CHUNKS = {"chunk_memory": 2, "chunk_other": 2}
MEMORIES = {"hope": {**TitansConfig.PRESETS["recall"], **CHUNKS}, "titans": CHUNKS, "attention": {}}


def build(arm: str, seed: int, args: argparse.Namespace) -> HopeForCausalLM:
    def make(arm: str, hidden: int) -> HopeConfig:
        layers, heads = (2, args.attention_heads) if arm == "attention" else (1, 1)
        return config(arm, VOCABULARY, args.d_model, layers, heads, hidden, **MEMORIES[arm])

    return as_large_as_hope(arm, seed, args.d_model, make)


@torch.no_grad()
def unseen(model: HopeForCausalLM, task: str, seed: int, rows: int) -> tuple[float, float]:
    """(loss, share of right answers) of ``rows`` sequences that no training draws."""
    sample = TASKS[task](rows, torch.Generator().manual_seed(1_000_000 + seed))
    loss, right = score(torch.cat([model(ids)[0] for ids in sample.ids.split(100)]), sample)
    return float(loss), float(right)


def train(arm: str, task: str, lr: float, seed: int, args: argparse.Namespace) -> dict:
    model, g = build(arm, seed, args), torch.Generator().manual_seed(seed)

    def loss(step: int) -> torch.Tensor:
        sample = TASKS[task](args.batch, g)
        return score(model(sample.ids)[0], sample)[0]

    curve = fit(model, loss, args.steps, lr, lambda: unseen(model, task, 0, HELD_OUT)[0] < MASTERED)
    return {"arm": arm, "task": task, "lr": lr, "seed": seed, "parameters": size(model),
            "loss": s.finite([unseen(model, task, 0, HELD_OUT)[0]])[0],
            "right": unseen(model, task, 1, TESTED)[1],
            "curve": [[n, *s.finite([x])] for n, x in curve]}


def table(data: dict) -> str:
    """Markdown: share of right answers by task and arm, mean and range over the seeds, the steps they took, and what
    the paper's models reach."""
    found: dict[tuple[str, str], list[dict]] = {}
    for case, record in data["cases"].items():
        if case.startswith("run "):
            found.setdefault((record["task"], record["arm"]), []).append(record)
    if not found:
        return "no runs yet"
    lines = ["| task | " + " | ".join(f"{arm} | steps" for arm in ARMS) + " | in the paper: HOPE, Transformer |",
             "|" + "---|" * (2 * len(ARMS) + 2)]
    for task in (task for task in TASKS if any((task, arm) in found for arm in ARMS)):
        cells = []
        for arm in ARMS:
            records = found.get((task, arm), [])
            right, steps = [r["right"] for r in records], [r["curve"][-1][0] for r in records]
            cells += ([f"{sum(right) / len(right):.3f} ({min(right):.3f} to {max(right):.3f})",
                       f"{sum(steps) / len(steps):.0f} at {records[0]['lr']:g}"] if records else ["-", "-"])
        paper = ", ".join(f"{PAPER[task, arm]:g}" for arm in ("hope", "attention") if (task, arm) in PAPER)
        lines.append(f"| {task} | {' | '.join(cells)} | {paper or '-'} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    p.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    p.add_argument("--d-model", type=int, default=64)
    p.add_argument("--attention-heads", type=int, default=4)
    p.add_argument("--batch", type=int, default=32)
    args = s.arguments(p, argv, RESULT, table)
    if args is None:
        return
    sizes = ("steps", "d_model", "attention_heads", "batch")
    study = s.Study(args.out, __doc__.split("\n")[0], {name: getattr(args, name) for name in sizes})
    for task in args.tasks:
        for arm in args.arms:
            study.run_at_best(f"{task} {arm}", RATES, args.seeds, partial(train, arm, task, args=args), "right")
    print(table(study.data))


if __name__ == "__main__":
    main()
