"""Formal languages, trained short and tested long: HOPE, Titans and attention of one size.

    python -m benchmarks.bench_languages [--languages parity ...] [--arms hope ...] [--steps 800] [--seeds 0 1 2]
        [--threads 1] [--out benchmarks/results/languages.json] [--table]

One block is trained to say, at every place of a word, which symbols may follow and whether the word may end
(benchmarks/synthetic/languages.py), and tested on words of up to 8 times the length of those that train. A word is
right when every answer in it is. Training begins with words of 4 symbols; the longest doubles up to 40 whenever the
smoothed loss falls below LONGER, and training ends early where held-out words of the training's own length are
mastered. Rates are chosen from RATES by the loss of other held-out words, up to twice as long, of seed 0, for every
language and arm: the loss at the training's own length does not tell which of two that master it will hold. Then
every seed is trained at the best. Nothing looks at 4 and 8 times the length before the test.

HOPE's and Titans' memories write after every token. HOPE's keep the whole of what they wrote (no retention: what
decays drifts with length), write from one symbol alone (no convolution), and may overwrite a reading exactly:
``step_clip`` ends a step where the write's target is met, and ``eta_scale`` 2 lets a step get there. Every case is
written at once, and one that the file has is not run again.
"""

from __future__ import annotations

import argparse
import math
import os
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import studies as s
from benchmarks.synthetic.arms import ARMS, as_large_as_hope, config, size
from benchmarks.synthetic.fit import SMOOTH, fit
from benchmarks.synthetic.languages import LANGUAGES, Language, Words
from benchmarks.synthetic.paper import LANGUAGES as PAPER
from hope_kernels import HopeConfig, HopeForCausalLM

RESULT = os.path.join(os.path.dirname(__file__), "results", "languages.json")
RATES = (1e-3, 3e-3, 1e-2)
TRAINED, TESTED = 40, (1, 2, 4, 8)  # symbols of the longest words that train; times that length
WORDS = 200  # that a length is tested on
SHORT, LONGER = 4, 0.05  # symbols of the longest words at first; nats a place, below which they get longer
MASTERED, HELD_OUT = 2e-5, 200  # nats a place, below which training ends; words that this, and the rate, are judged by
EVERY_TOKEN = {"chunk_memory": 1, "chunk_other": 1}
MEMORIES = {"hope": {**EVERY_TOKEN, "retention": False, "conv_window": None, "eta_scale": 2.0},
            "titans": EVERY_TOKEN, "attention": {}}


def build(arm: str, language: Language, seed: int, args: argparse.Namespace) -> HopeForCausalLM:
    def make(arm: str, hidden: int) -> HopeConfig:
        heads = args.attention_heads if arm == "attention" else 1
        return config(arm, language.vocabulary, args.d_model, args.layers, heads, hidden, **MEMORIES[arm])

    return as_large_as_hope(arm, seed, args.d_model, make)


def answers(model: HopeForCausalLM, words: Words) -> torch.Tensor:
    """The mean loss of what is said at every place of the words."""
    return F.binary_cross_entropy_with_logits(model(words.ids)[0][words.counted], words.legal[words.counted])


@torch.no_grad()
def right(model: HopeForCausalLM, language: Language, longest: int) -> dict[str, float]:
    """Shares of answers and of words that are right, over words longer than half of ``longest``."""
    words = language.words(WORDS, longest // 2 + 1, longest, torch.Generator().manual_seed(longest))
    logits = torch.cat([model(ids)[0] for ids in words.ids.split(50)])
    good = ((logits > 0) == (words.legal > 0)).all(-1)
    return {"answers": float(good[words.counted].float().mean()),
            "words": float((good | ~words.counted).all(1).float().mean())}


def train(arm: str, language: Language, lr: float, seed: int, args: argparse.Namespace) -> dict:
    model, g = build(arm, language, seed, args), torch.Generator().manual_seed(seed)
    longest, grown, smooth = SHORT, 0, math.inf

    def loss(step: int) -> torch.Tensor:
        nonlocal longest, grown, smooth
        if smooth < LONGER and longest < TRAINED and step - grown > 20:
            longest, grown, smooth = min(2 * longest, TRAINED), step, math.inf
        found = answers(model, language.words(args.batch, 2, longest, g))
        smooth = found.item() if smooth == math.inf else SMOOTH * smooth + (1 - SMOOTH) * found.item()
        return found

    @torch.no_grad()
    def held_out(longest: int) -> float:
        return answers(model, language.words(HELD_OUT, 2, longest, torch.Generator().manual_seed(1_000_000))).item()

    curve = fit(model, loss, args.steps, lr, lambda: longest == TRAINED and held_out(TRAINED) < MASTERED)
    return {"arm": arm, "language": language.name, "lr": lr, "seed": seed, "parameters": size(model),
            "loss": s.finite([held_out(2 * TRAINED)])[0], "longest": longest,
            "curve": [[n, *s.finite([x])] for n, x in curve],
            "right": {str(k): right(model, language, k * TRAINED) for k in TESTED}}


def table(data: dict) -> str:
    """Markdown: share of right words, and of right answers, mean and range over the seeds; the paper's beside them."""
    found: dict[tuple[str, str], list[dict]] = {}
    for case, record in data["cases"].items():
        if case.startswith("run "):
            found.setdefault((record["language"], record["arm"]), []).append(record)
    lines = ["| language | model | words right at " + " | at ".join(f"{k}x" for k in TESTED)
             + f" | answers right at {TESTED[-1]}x | steps | seeds | rate | in the paper: short, long |",
             "|" + "---|" * (len(TESTED) + 7)]
    for language in LANGUAGES:
        for arm in ARMS:
            records = found.get((language, arm))
            if records is None:
                continue
            cells = [[r["right"][str(k)]["words"] for r in records] for k in TESTED]
            cells.append([r["right"][str(TESTED[-1])]["answers"] for r in records])
            shown = (f"{sum(c) / len(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in cells)
            steps = sum(r["curve"][-1][0] for r in records) / len(records)
            paper = "{:g}, {:g}".format(*PAPER[language, arm]) if (language, arm) in PAPER else "-"
            lines.append(f"| {language} | {arm} | {' | '.join(shown)} | {steps:.0f} | {len(records)} "
                         f"| {records[0]['lr']:g} | {paper} |")
    return "\n".join(lines) if found else "no runs yet"


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--languages", nargs="+", choices=list(LANGUAGES), default=list(LANGUAGES))
    p.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    p.add_argument("--d-model", type=int, default=32)
    p.add_argument("--layers", type=int, default=1)
    p.add_argument("--attention-heads", type=int, default=4)
    p.add_argument("--batch", type=int, default=32)
    args = s.arguments(p, argv, RESULT, table)
    if args is None:
        return
    sizes = ("steps", "d_model", "layers", "attention_heads", "batch")
    study = s.Study(args.out, __doc__.split("\n")[0], {name: getattr(args, name) for name in sizes})
    for language in map(LANGUAGES.__getitem__, args.languages):
        for arm in args.arms:
            named = partial(train, arm, language, args=args)
            study.run_at_best(f"{language.name} {arm}", RATES, args.seeds, named, "right")
    print(table(study.data))


if __name__ == "__main__":
    main()
