"""In-context recall: what a sequence told once, twice, or corrected, is asked for after its chunk has closed.

    python -m benchmarks.bench_recall [--arms recall ...] [--steps 800] [--seeds 0 1 2] [--threads 1]
        [--out benchmarks/results/recall.json] [--table]

A sequence is 28 tellings of 20 keys, 8 fillers, then one question per key (benchmarks/synthetic/pairs.py); 12 keys
are told once, 4 twice, 4 are told two values of which the newer counts. Training begins with 6 keys and goes on to
12 and 20 whenever the smoothed loss falls below MASTERED nats. Corrections within a chunk are scored apart: the
writes of a chunk are computed from the memory at its start, so there the later of two is told by the erasure alone.
What was trained at one chunk is asked again by the same weights in the shorter chunks of READ, where fewer share one.
Beside the questions of 20 keys are those of more keys told once each, up to all 32, which shows what the memory has
room for.

The arms have one size: the preset "recall" with chunks of 16 and of 4 tokens; the default preset; two layers of
attention, once as the others and once after lessons (benchmarks/synthetic/lessons.py); "delta", the preset of linear
memories by the delta rule, W (I - eta k k^T) + eta v k^T, which keeps the order inside a chunk. Rates are chosen from
RATES by the loss that seed 0 ends with. Every case is written at once, and one that the file has is not run again.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import studies as s
from benchmarks.synthetic.arms import same_size, size
from benchmarks.synthetic.fit import fit
from benchmarks.synthetic.lessons import teach
from benchmarks.synthetic.pairs import KEYS, KINDS, VALUES, VOCABULARY, Counts, pairs
from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig

RESULT = os.path.join(os.path.dirname(__file__), "results", "recall.json")
RATES = (2e-3, 4e-3, 8e-3)
STAGES = (Counts(4, 1, 1), Counts(8, 2, 2), Counts(12, 4, 4))
MASTERED, AT_LEAST = 0.5, 20  # nats; steps of a stage
ROOM = (8, 16, 24, KEYS)  # keys told once each
READ = (4, 1)  # tokens of the chunks that tests read in, beside the model's own
ROWS = 64  # sequences read at once in tests
TOLD = torch.arange(KEYS)[:, None], torch.arange(KEYS, KEYS + VALUES)  # keys and values, for lessons


class Arm(NamedTuple):
    """Of models with memories: the preset and the chunk. No preset: attention."""

    preset: str | None
    chunk: int = 16
    lessons: bool = False  # before the training


ARMS = {
    "recall": Arm("recall"),
    "recall, chunk 4": Arm("recall", 4),
    "default": Arm("default"),
    "attention": Arm(None),
    "attention after lessons": Arm(None, lessons=True),
    "delta": Arm("delta"),
}


def configuration(arm: Arm, d: int, hidden: int) -> HopeConfig:
    cms = CMSConfig(d, (1 << 20,), intermediate_size=hidden, lr=0.0)
    if arm.preset is None:  # a pair takes two layers of it: one that looks back, one that finds
        return HopeConfig(VOCABULARY, d, 2, mixer="attention", num_heads=4, cms=cms)
    chunks = {"chunk_memory": arm.chunk, "chunk_other": arm.chunk}
    titans = TitansConfig.preset(arm.preset, d_model=d, **chunks)
    return HopeConfig(VOCABULARY, d, 1, titans=titans, cms=cms)


def build(arm: Arm, seed: int, d: int) -> HopeForCausalLM:
    wanted = size(HopeForCausalLM(configuration(ARMS["recall"], d, 2 * d)))
    config = same_size(wanted, lambda hidden: configuration(arm, d, hidden))
    torch.manual_seed(seed)
    model = HopeForCausalLM(config)
    # tied embeddings at 0.02 make flat logits: the first hundreds of steps would go into their length
    torch.nn.init.normal_(model.embed.weight, std=0.3)
    return model


def in_chunks(model: HopeForCausalLM, chunk: int) -> HopeForCausalLM:
    """The same weights, reading in chunks of another length."""
    titans = model.config.titans
    assert titans is not None
    titans = titans.replace(chunk_memory=chunk, chunk_other=chunk)
    other = HopeForCausalLM(model.config.replace(titans=titans))
    other.load_state_dict(model.state_dict())
    return other.eval()


class Lessons:
    """The loss of a step, on fresh sequences of a stage, which is left when it is mastered."""

    def __init__(self, model: HopeForCausalLM, chunk: int, rows: int, seed: int):
        self.model, self.chunk, self.rows = model, chunk, rows
        self.g = torch.Generator().manual_seed(seed)
        self.stage, self.since, self.smooth = 0, 0, math.inf

    def __call__(self, step: int) -> Tensor:
        if self.smooth < MASTERED and self.stage + 1 < len(STAGES) and step - self.since >= AT_LEAST:
            self.stage, self.since, self.smooth = self.stage + 1, step, math.inf
        ids, at, _ = pairs(self.rows, STAGES[self.stage], self.chunk, self.g)
        logits = self.model(ids[:, :-1])[0][:, at]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, at + 1].flatten())
        value = loss.item()
        self.smooth = value if self.smooth == math.inf else 0.9 * self.smooth + 0.1 * value
        return loss


@torch.no_grad()
def answered(model: HopeForCausalLM, counts: Counts, chunk: int, sequences: int) -> dict[str, float]:
    """Share of right answers by kind, over sequences that are the same for every model."""
    g = torch.Generator().manual_seed(10_000)
    right, total = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
    for first in range(0, sequences, ROWS):
        ids, at, kind = pairs(min(ROWS, sequences - first), counts, chunk, g)
        hit = (model(ids)[0][:, at].argmax(-1) == ids[:, at + 1]).float()
        right.index_add_(0, kind.flatten(), hit.flatten())
        total += kind.flatten().bincount(minlength=len(KINDS))
    return {name: float(r / n) for name, r, n in zip(KINDS, right, total) if n}


def run(name: str, lr: float, seed: int, args: argparse.Namespace) -> dict:
    arm = ARMS[name]
    model = build(arm, seed, args.d_model)
    taught = teach(model, *TOLD, seed) if arm.lessons else 0
    lessons = Lessons(model, arm.chunk, args.rows, seed)
    curve = fit(model, lessons, args.steps, lr)
    model.eval()
    room = {str(n): answered(model, Counts(n), arm.chunk, args.sequences // 4)["once"] for n in ROOM}
    shares = {str(arm.chunk): answered(model, STAGES[-1], arm.chunk, args.sequences)}
    for chunk in READ if arm.preset else ():
        if chunk < arm.chunk:
            shares[str(chunk)] = answered(in_chunks(model, chunk), STAGES[-1], chunk, args.sequences)
    return {"arm": name, "lr": lr, "seed": seed, "parameters": size(model), "chunk": arm.chunk,
            "lessons": taught, "stage": lessons.stage, "loss": s.finite([curve[-1][1]])[0],
            "curve": [[step, *s.finite([loss])] for step, loss in curve],
            "answered": shares, "room": room}


def rank(record: dict) -> tuple[int, float]:
    """Rates are compared by this, the least is the best: the last stage that was reached, and the loss there."""
    return -record["stage"], math.inf if record["loss"] is None else record["loss"]


def spread(shares: list[float]) -> str:
    return f"{statistics.fmean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})" if shares else "-"


def stuck(runs: list[dict]) -> str:
    reached = min(r["stage"] for r in runs)
    return "" if reached == len(STAGES) - 1 else f", stuck at {sum(STAGES[reached])} keys"


def table(data: dict) -> str:
    """Markdown: share of right answers by kind, mean and range over the seeds."""
    lines = [f"| model | parameters | told once | told twice | {' | '.join(KINDS[2:])} | {KEYS} keys | seeds | rate |",
             "|" + "---|" * (len(KINDS) + 5)]
    for arm in ARMS:
        cases = [record for record in data["cases"].values() if record["arm"] == arm]
        searched = [record for record in cases if record["seed"] == 0]
        if not searched:
            continue
        if len(searched) < len(RATES):
            continue  # the search of its rate goes on
        lr = min(searched, key=rank)["lr"]
        runs = [record for record in cases if record["lr"] == lr]
        for chunk in runs[0]["answered"]:
            own = chunk == str(runs[0]["chunk"])
            shares = [r["answered"][chunk] for r in runs]
            cells = [spread([share[kind] for share in shares if kind in share]) for kind in KINDS]
            cells += [spread([r["room"][str(KEYS)] for r in runs if own]), str(len(runs)), f"{lr:g}{stuck(runs)}"]
            name = arm if own else f"{arm}, read in chunks of {chunk}"
            lines.append(f"| {name} | {runs[0]['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "no runs yet"


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--arms", nargs="+", choices=ARMS, default=tuple(ARMS))
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--rows", type=int, default=32, help="sequences of a step")
    p.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    p.add_argument("--d-model", type=int, default=64)
    p.add_argument("--sequences", type=int, default=640, help="that are asked in the test")
    args = s.arguments(p, argv, RESULT, table)
    if args is None:
        return
    sizes = ("steps", "rows", "d_model", "sequences")
    study = s.Study(args.out, __doc__.split("\n")[0], {name: getattr(args, name) for name in sizes})

    def case(arm: str, lr: float, seed: int) -> dict:
        name = f"{arm} rate {lr:g} seed {seed}"
        if name not in study.cases:
            study.put(name, run(arm, lr, seed, args))
            print(name, study.cases[name]["loss"], study.cases[name]["answered"], flush=True)
        return study.cases[name]

    for arm in args.arms:
        lr = min(RATES, key=lambda rate: rank(case(arm, rate, 0)))
        for seed in args.seeds:
            case(arm, lr, seed)
    print(table(study.data))


if __name__ == "__main__":
    main()
