"""Needles in noise at lengths never trained: HOPE with the preset "recall", Titans and attention of one size.

    python -m benchmarks.bench_needles [--arms recall ...] [--steps 700] [--seeds 0 1 2] [--lengths 256 1024 ...]
        [--threads 1] [--out benchmarks/results/needles.json] [--table]

Four pairs (key, value) stand somewhere among T tokens of noise and are asked for at the end
(benchmarks/synthetic/needles.py); chance is 1/32. Training begins with T = 16, which doubles up to 1024 whenever the
smoothed loss falls below 0.8 nats. "attention_conv" is attention behind the two taps that the memories of "recall" have
before theirs (benchmarks/convolved.py), which show it a key beside its value; attention without them takes lessons
before (benchmarks/synthetic/lessons.py), or it never finds a value by its key. Both take more steps than the others
(TIMES). Rates are chosen from RATES by the training loss of seed 0.
Once T is 1024 the arm "recall" is also pressed to write little: PRESS times the mean logit of the step size, over all
tokens, is added to the loss, so that noise is hardly written at all. The arm "unpressed" is the same without. Tested
are 200 sequences of each length, 4 answers each; attention up to 4096 tokens, for its cost grows with the square.
Every case is written at once, and one that the file has is not run again.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import studies as s
from benchmarks.convolved import convolved
from benchmarks.synthetic.arms import same_size, size
from benchmarks.synthetic.lessons import teach
from benchmarks.synthetic.needles import KEYS, NEEDLES, VALUES, VOCABULARY, needles
from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig

RESULT = os.path.join(os.path.dirname(__file__), "results", "needles.json")
ATTENTION = ("attention", "attention_conv")
ARMS = ("recall", "unpressed", "titans", *ATTENTION)
NAMES = {"attention_conv": "attention and a convolution"}  # in the table
RATES = (2e-3, 4e-3, 8e-3)
# times --steps that an arm takes, where it is not once: when its rate is chosen, and in a run; lessons come before
TIMES = {"attention": (2, 6), "attention_conv": (1, 4)}
FIRST, LAST, MASTERED = 16, 1024, 0.8  # tokens of noise that training begins and ends with; nats
PRESS, DEEPEST = 0.01, -18.0  # nats a unit of the logit; the logit that is low enough
ATTENTION_LONGEST = 4096  # tokens of noise
SEQUENCES, LENGTHS = 200, (256, 1024, 4096, 16384, 65536)
PIECE = 1 << 16  # tokens of all rows read at once in tests

Build = Callable[[str, int, int, int], HopeForCausalLM]  # of arm, seed, width and chunk
Sample = Callable[[int, int, int, torch.Generator], tuple[Tensor, Tensor]]  # of rows, length, chunk and generator
TOLD = torch.arange(KEYS)[:, None], torch.arange(KEYS, KEYS + VALUES)  # keys and values, for lessons


def configuration(arm: str, d: int, chunk: int, hidden: int) -> HopeConfig:
    fields = {"cms": CMSConfig(d, (1 << 20,), intermediate_size=hidden, lr=0.0)}
    if arm in ATTENTION:  # a pair takes two layers of it: one that looks back, one that finds
        return HopeConfig(VOCABULARY, d, 2, mixer="attention", num_heads=4, **fields)
    preset, mixer = ("titans", "titans") if arm == "titans" else ("recall", "self_modifying")
    titans = TitansConfig.preset(preset, d_model=d, chunk_memory=chunk, chunk_other=chunk)
    return HopeConfig(VOCABULARY, d, 1, mixer=mixer, titans=titans, **fields)


def build(
    arm: str, seed: int, d: int, chunk: int, configuration: Callable[..., HopeConfig] = configuration
) -> HopeForCausalLM:
    config = recall = configuration("recall", d, chunk, 2 * d)
    if arm in ("titans", *ATTENTION):
        config = same_size(size(HopeForCausalLM(recall)), lambda hidden: configuration(arm, d, chunk, hidden))
    torch.manual_seed(seed)
    model = HopeForCausalLM(config)
    # tied embeddings at 0.02 make flat logits: the first hundreds of steps would go into their length
    torch.nn.init.normal_(model.embed.weight, std=0.3)
    return convolved(model, recall.titans.conv_window) if arm == "attention_conv" else model


def write_logits(model: HopeForCausalLM, ids: Tensor) -> Tensor:
    """[B, T]: the step size's logit at every token, as the first block's memory of eta has it before it learns."""
    block = model.blocks[0]
    mixer, x = block.mixer, block.norm(model.embed(ids)).transpose(1, 2)
    taps = mixer.conv
    x = F.conv1d(F.pad(x, (taps.shape[1] - 1, 0)), taps[:, None], groups=len(taps)).transpose(1, 2)
    memory = mixer.memory_init("eta")
    hidden = F.gelu(x @ memory["w2"][0].T, approximate="tanh")
    return (hidden @ memory["w1"][0].T)[..., 0] + mixer.eta_bias[0]


def train(
    arm: str, lr: float, seed: int, args: argparse.Namespace, build: Build = build, sample: Sample = needles,
    told: tuple[Tensor, Tensor] = TOLD, times: int = 1,
) -> tuple[HopeForCausalLM, dict]:
    """times: of ``args.steps``."""
    model, g = build(arm, seed, args.d_model, args.chunk), torch.Generator().manual_seed(seed)
    lessons = teach(model, *told, seed) if arm == "attention" else 0
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": biases}], betas=(0.9, 0.95), weight_decay=0.01)
    T, smooth, since, curve, steps = FIRST, None, 0, [], args.steps * times
    for step in range(steps):
        rows = max(2, min(64, args.tokens // (T + args.chunk + 2 * NEEDLES)))
        ids, at = sample(rows, T, args.chunk, g)
        found = F.cross_entropy(model(ids)[0][:, at].flatten(0, 1), ids[:, at + 1].flatten())
        loss = found
        if arm == "recall" and T == LAST:
            loss = found + PRESS * write_logits(model, ids).clamp(min=DEEPEST).mean()
        cycle = min(1.0, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        for group, factor in zip(optimizer.param_groups, (1.0, 3.0)):
            group["lr"] = lr * cycle * factor
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value = found.item()
        if not math.isfinite(value):
            break
        smooth = value if smooth is None else 0.9 * smooth + 0.1 * value
        if step % 50 == 49 or step == steps - 1:
            curve.append([step + 1, T, smooth])
        if smooth < MASTERED and T < LAST and step - since > 20:
            T, smooth, since = 2 * T, None, step
    loss = smooth if math.isfinite(value) and smooth is not None else math.inf
    return model.eval(), {"arm": arm, "lr": lr, "seed": seed, "parameters": size(model), "loss": s.finite([loss])[0],
                          "reached": T, "lessons": lessons, "curve": curve}


def rank(record: dict) -> tuple[float, float]:
    """Rates are compared by this, the least is the best: the longest length that was reached, and the loss there."""
    return -record["reached"], math.inf if record["loss"] is None else record["loss"]


@torch.no_grad()
def found(model: HopeForCausalLM, T: int, chunk: int, sequences: int, sample: Sample = needles) -> float:
    """Share of right answers, over ``sequences`` of T tokens of noise, the same for every model."""
    g, right = torch.Generator().manual_seed(T), []
    rows = max(1, min(sequences, (1 << 20) // T))
    for first in range(0, sequences, rows):
        ids, at = sample(min(rows, sequences - first), T, chunk, g)
        state, asked = None, int(at[0])
        for piece in ids[:, :asked].split(max(1, PIECE // len(ids)), 1):
            state = model(piece, state)[1]
        logits = model(ids[:, asked:], state)[0]
        right.append((logits[:, at - asked].argmax(-1) == ids[:, at + 1]).float().flatten())
    return float(torch.cat(right).mean())


def table(data: dict) -> str:
    """Markdown: share of right answers by length, mean and range over the seeds."""
    runs: dict[str, list[dict]] = {}
    for case, record in data["cases"].items():
        if case.startswith("run "):
            runs.setdefault(record["arm"], []).append(record)
    lengths = data["setting"]["lengths"]
    lines = ["| model | parameters | " + " | ".join(f"{T:,}" for T in lengths) + " | seeds | steps | rate |",
             "|" + "---|" * (len(lengths) + 5)]
    for arm in ARMS:
        if arm in runs:
            cells = [[r["found"][str(T)] for r in runs[arm] if str(T) in r["found"]] for T in lengths]
            shown = (f"{sum(c) / len(c):.3f} ({min(c):.3f} to {max(c):.3f})" if c else "-" for c in cells)
            name, size, lr = NAMES.get(arm, arm), f"{runs[arm][0]['parameters']:,}", f"{runs[arm][0]['lr']:g}"
            reached = min(r["reached"] for r in runs[arm])
            lr += "" if reached == LAST else f", stuck at {reached} tokens"
            steps = f"{runs[arm][0]['curve'][-1][0]:,}"
            steps += " after lessons" if any(r.get("lessons") for r in runs[arm]) else ""
            lines.append(f"| {name} | {size} | {' | '.join(shown)} | {len(runs[arm])} | {steps} | {lr} |")
    return "\n".join(lines) if runs else "no runs yet"


def compare(study: s.Study, args: argparse.Namespace, build: Build = build, sample: Sample = needles,
            tests: Sample = needles, told: tuple[Tensor, Tensor] = TOLD,
            times: dict[str, tuple[int, int]] = TIMES) -> None:
    """Runs what the study does not have yet: rates of every arm, then every seed at the best. sample: what trains."""
    for arm in args.arms:
        ranks, (search, run) = {}, times.get(arm, (1, 1))
        for lr in RATES:
            case = f"search {arm} {lr:g}"
            if case not in study.cases:
                study.put(case, train(arm, lr, 0, args, build, sample, told, search)[1])
                print(case, study.cases[case]["reached"], study.cases[case]["loss"], flush=True)
            ranks[lr] = rank(study.cases[case])
        lr = min(ranks, key=ranks.__getitem__)
        for seed in args.seeds:
            case = f"run {arm} seed {seed}"
            if case not in study.cases:
                model, record = train(arm, lr, seed, args, build, sample, told, run)
                lengths = [T for T in args.lengths if arm not in ATTENTION or T <= ATTENTION_LONGEST]
                shares = {str(T): found(model, T, args.chunk, args.sequences, tests) for T in lengths}
                study.put(case, record | {"found": shares})
                print(case, study.cases[case]["found"], flush=True)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    p.add_argument("--steps", type=int, default=700)
    p.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    p.add_argument("--d-model", type=int, default=64)
    p.add_argument("--chunk", type=int, default=16)
    p.add_argument("--tokens", type=int, default=8192, help="of a step")
    p.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    p.add_argument("--sequences", type=int, default=SEQUENCES, help="that each length is tested on")
    args = s.arguments(p, argv, RESULT, table)
    if args is None:
        return
    sizes = ("steps", "d_model", "chunk", "tokens", "lengths", "sequences")
    study = s.Study(args.out, __doc__.split("\n")[0], {name: getattr(args, name) for name in sizes})
    compare(study, args)
    print(table(study.data))


if __name__ == "__main__":
    main()
