"""In-context recall: can the memory bring back, after its chunk has closed, what a sequence told it once,
twice, or corrected?

    python -m benchmarks.bench_recall [--only NAME ...] [--resume] [--out benchmarks/results/recall.json]

A sequence is 28 pairs (key, value), 8 fillers, then one query per key. Of its 20 distinct keys 12 are told
once, 4 twice with one value, 4 twice with two values (the newer counts); the order is random. Pairs and
fillers are 64 tokens, so every chunk of 16 or 64 has closed when the queries begin. At a query the model sees
the key and must name the value (then it sees the value). Keys and values are drawn anew for every sequence
from 32 keys and 32 values, so nothing about a pair can be stored in the weights: chance is 1/32. Training
starts on 6 distinct keys and goes through 12 to these 20, early when a stage is mastered.

The model is one block: a self-modifying layer and an MLP, trained from scratch by AdamW on fresh sequences
for a fixed number of steps. The table runs chunk 16/64, step_clip on/off, dgd on/off; the default has three
seeds. JSON after every run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.machine import machine, write_json
from benchmarks.sources import mark
from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig

RESULT = os.path.join(os.path.dirname(__file__), "results", "recall.json")
KEYS = VALUES = 32
FILLER, VOCAB = KEYS + VALUES, KEYS + VALUES + 1
KINDS = ("once", "repeated", "updated", "updated in a chunk")
# latest share of the steps; keys told once, repeated, updated
STAGES = ((0.5, (4, 1, 1)), (0.7, (8, 2, 2)), (1.0, (12, 4, 4)))
MASTERED = 0.5  # smoothed loss, nats, at which the next stage begins early


def batch(
    size: int, g: torch.Generator, chunk: int, counts: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [B, T]; positions [n] at which a query's key stands; kind [B, n] of each query, of KINDS."""
    once, repeated, updated = counts
    distinct = sum(counts)
    keys = torch.rand(size, KEYS, generator=g).argsort(1)[:, :distinct]
    values = KEYS + torch.randint(0, VALUES, (size, 2, distinct), generator=g)
    index = torch.cat([torch.arange(distinct), torch.arange(once, distinct)]).expand(size, -1)
    late = torch.cat([torch.zeros(distinct), torch.ones(repeated + updated)]).long().expand(size, -1)
    order = torch.rand(size, index.shape[1], generator=g)
    # of two tellings of one key the second comes later
    low, high = torch.minimum(
        order[:, once:distinct], order[:, distinct:]
    ), torch.maximum(order[:, once:distinct], order[:, distinct:])
    order = torch.cat([order[:, :once], low, high], 1).argsort(1)
    within = 2 * order.argsort(1) // chunk  # the chunk of each telling
    index, late = index.gather(1, order), late.gather(1, order)
    newer = torch.where(torch.arange(distinct) >= once + repeated, values[:, 1], values[:, 0])
    told = torch.where(late == 1, newer.gather(1, index), values[:, 0].gather(1, index))
    pairs = torch.stack([keys.gather(1, index), told], -1).flatten(1)
    start = -(-pairs.shape[1] // chunk) * chunk
    filler = torch.full((size, start - pairs.shape[1]), FILLER)
    asked = torch.rand(size, distinct, generator=g).argsort(1)
    queries = torch.stack([keys.gather(1, asked), newer.gather(1, asked)], -1).flatten(1)
    both = F.pad(within[:, once:distinct] == within[:, distinct:], (once, 0))  # tellings of one key in one chunk
    kind = (asked >= once).long() + (asked >= once + repeated).long()
    kind += ((kind == 2) & both.gather(1, asked)).long()
    return torch.cat([pairs, filler, queries], 1), start + 2 * torch.arange(distinct), kind


def build(args, chunk: int, step_clip: bool, dgd: bool) -> HopeForCausalLM:
    d = args.d_model
    titans = TitansConfig(d, args.heads, hidden_mult=args.hidden_mult, chunk_memory=chunk, chunk_other=chunk,
                          step_clip=step_clip, dgd=dgd,
                          alpha_bias=args.alpha_bias, eta_bias=args.eta_bias, eta_scale=args.eta_scale,
                          conv_window=args.conv_window, in_proj=not args.no_in_proj)
    cms = CMSConfig(d, (1024,), expansion=2.0, lr=0.0)
    model = HopeForCausalLM(HopeConfig(VOCAB, d, args.layers, titans=titans, cms=cms))
    with torch.no_grad():
        # tied embeddings at 0.02 make flat logits: the first hundreds of steps would go into their length
        model.embed.weight.normal_(std=args.embed_std)
        for block in model.blocks:
            block.mixer.q_proj.weight.copy_(torch.eye(d))
    return model


def accuracy(model, g: torch.Generator, chunk: int, sequences: int = 640) -> dict:
    """Share of right answers by kind; 640 sequences are 7680 queries of keys told once, 2560 repeated, 2560 updated."""
    right, total = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
    with torch.no_grad():
        for _ in range(sequences // 64):
            ids, at, kind = batch(64, g, chunk, STAGES[-1][1])
            hit = (model(ids)[0][:, at].argmax(-1) == ids[:, at + 1]).float()
            for i in range(len(KINDS)):
                right[i] += hit[kind == i].sum()
                total[i] += (kind == i).sum()
    return {name: float(r / t) if t else None for name, r, t in zip(KINDS, right, total)}


def train(args, chunk: int, step_clip: bool, dgd: bool, seed: int) -> dict:
    torch.manual_seed(seed)
    model = build(args, chunk, step_clip, dgd)
    fast = [p for n, p in model.named_parameters() if "bias" in n]
    rest = [p for n, p in model.named_parameters() if "bias" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": rest}, {"params": fast}], lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [args.lr, 3 * args.lr], total_steps=args.steps, pct_start=0.1
    )
    g = torch.Generator().manual_seed(seed)
    curve, began, stage, smooth = [], time.perf_counter(), 0, None
    with tqdm(range(args.steps), desc=f"chunk {chunk} clip {step_clip} dgd {dgd} seed {seed}") as bar:
        for step in bar:
            if stage + 1 < len(STAGES) and (
                step >= STAGES[stage][0] * args.steps or (smooth is not None and smooth < MASTERED)
            ):
                stage, smooth = stage + 1, None
            ids, at, _ = batch(args.batch, g, chunk, STAGES[stage][1])
            logits, _ = model(ids[:, :-1])
            loss = F.cross_entropy(logits[:, at].flatten(0, 1), ids[:, at + 1].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            smooth = loss.item() if smooth is None else 0.9 * smooth + 0.1 * loss.item()
            if step % 50 == 0 or step == args.steps - 1:
                curve.append([step, stage, round(smooth, 4) if math.isfinite(smooth) else None])
                bar.set_postfix(loss=f"{smooth:.3f}", keys=sum(STAGES[stage][1]))
    seconds = time.perf_counter() - began
    return {"chunk": chunk, "step_clip": step_clip, "dgd": dgd, "seed": seed, "steps": args.steps,
            "seconds": seconds, "loss_curve": curve,
            "accuracy": accuracy(model.eval(), torch.Generator().manual_seed(10_000 + seed), chunk)}


def runs():
    """(name, chunk, step_clip, dgd, seed) of the table."""
    for seed in (0, 1, 2):
        yield "default", 16, True, True, seed
    for chunk in (16, 64):
        for clip in (True, False):
            for dgd in (True, False):
                if (chunk, clip, dgd) != (16, True, True):
                    yield f"chunk{chunk}{'' if clip else '-noclip'}{'' if dgd else '-nodgd'}", chunk, clip, dgd, 0


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--steps", type=int, default=900)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--d-model", type=int, default=64)
    p.add_argument("--heads", type=int, default=1)
    p.add_argument("--layers", type=int, default=1)
    p.add_argument("--hidden-mult", type=int, default=1)
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--embed-std", type=float, default=0.3)
    p.add_argument("--weight-decay", type=float, default=0.01)
    p.add_argument("--alpha-bias", type=float, default=6.0)
    p.add_argument("--eta-bias", type=float, default=0.0)
    p.add_argument("--eta-scale", type=float, default=2.0)
    p.add_argument(
        "--conv-window", type=int, default=2, help="2: a token and the one before, which is what a pair is"
    )
    p.add_argument("--no-in-proj", action="store_true")
    p.add_argument("--only", nargs="+", help="names of the table's rows")
    p.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--resume", action="store_true", help="keep the runs that the JSON already has")
    p.add_argument("--out", default=RESULT)
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = {k: v for k, v in vars(args).items() if k not in ("only", "seeds", "resume", "out", "threads")}
    recipe["kinds"] = list(KINDS)
    result = {
        "what": __doc__.split("\n")[0], "chance": 1 / VALUES, "recipe": recipe, "machine": machine(), "runs": []
    }
    if args.resume and os.path.exists(args.out):
        with open(args.out) as f:
            kept = json.load(f)
        if kept["recipe"] == recipe:
            result["runs"] = kept["runs"]
    done = {(r["name"], r["seed"]) for r in result["runs"]}
    for name, chunk, clip, dgd, seed in runs():
        if (name, seed) in done or (args.only and name not in args.only) or (args.seeds and seed not in args.seeds):
            continue
        result["runs"].append({"name": name, **mark("model", device="cpu"), **train(args, chunk, clip, dgd, seed)})
        write_json(args.out, result)
    print(" " * 24 + "".join(f"{kind:>20}" for kind in KINDS))
    for r in result["runs"]:
        shares = "".join(f"{'-':>20}" if share is None else f"{share:20.3f}" for share in r["accuracy"].values())
        name = f"{r['name']} seed {r['seed']}"
        print(f"{name:24}{shares}   {r['seconds']:.0f} s")


if __name__ == "__main__":
    main()
