"""The default inner learning rates: one rule for every period, on two models and four domains.

    python -m benchmarks.bench_rates [--real FOLDER] [--wiki FILE] [--plays FILE] [--factors 1]
        [--periods 16 64 256 1024 4096] [--out benchmarks/results/rates.json] [--table]

Every block has one level with the period C; the rule (``config.default_rate``) is Adam with steps relative to the
size of the matrices. A cell is (model, domain, C, factor of the default rate): bits per token with learning on
minus off, over the whole excerpt and over its second half, and the most by which any segment of max(C, 256)
tokens became worse. The models are the bundled byte model, whose own two levels are replaced by their first one,
and a converted pre-trained model (``make real``, or --real). The texts are the halves that ``benchmarks.real``
does not judge on. Every case is written at once, and one that the file has is not run again.
"""

from __future__ import annotations

import argparse
import os
from itertools import product

import torch

from benchmarks import studies as s
from benchmarks.real.models import bits, nats, variant
from benchmarks.real.texts import digest, excerpt, half, texts
from hope_kernels import HopeForCausalLM
from hope_kernels.config import default_rate
from hope_kernels.identity import fingerprint
from hope_kernels.text import Tokenizer

RESULT = os.path.join(os.path.dirname(__file__), "results", "rates.json")
PERIODS = (16, 64, 256, 1024, 4096)
BUNDLED, REAL = "hope-byte", "SmolLM2-135M-Instruct"
WINDOW = 256  # tokens over which a worsening counts, at least
# tokens read at each period: several steps, as far as a CPU bears
TOKENS = {BUNDLED: lambda C: max(8192, 4 * C), REAL: lambda C: {16: 2048, 64: 2048, 256: 2048}.get(C, 2 * C + 2048)}


def model_at(model: HopeForCausalLM, C: int, factor: float) -> HopeForCausalLM:
    """``model`` with one level a block of period C, at ``factor`` times the default rate."""
    config = model.config.block_cms[0]
    kept = config.replace(chunks=(C,), optimizer="adam", relative=True, lr=factor * default_rate("adam", C))
    if config.num_levels == 1:
        fields = ("chunks", "optimizer", "lr", "relative")
        return variant(model, {name: getattr(kept, name) for name in fields})
    return s.with_cms(model, config.replace(
        chunks=(C, 4 * C), optimizer="adam", relative=True, lr=(factor * default_rate("adam", C), 0.0)
    ))


def cell(model: HopeForCausalLM, ids: torch.Tensor, C: int, factor: float, off: torch.Tensor) -> dict:
    on, state, _ = nats(model_at(model, C, factor), ids, "next_token", guard=False)
    width, middle = max(C, WINDOW), len(on) // 2
    off = off[: len(on)]
    worst = max(bits(a) - bits(b) for a, b in zip(on.split(width), off.split(width)) if len(a) > width // 2)
    return {"off": round(bits(off), 5), "change": round(bits(on) - bits(off), 5), "worst": round(worst, 5),
            "second_half": round(bits(on[middle:]) - bits(off[middle:]), 5), "tokens": len(on) + 1}


def table(data: dict) -> str:
    """Markdown: the change at the default rate, and the worst segment, by model, domain and period."""
    cases = [c for c in data["cases"].values() if c["factor"] == 1]
    periods = sorted({c["C"] for c in cases})
    lines = ["| model | domain | off | " + " | ".join(f"C = {C}" for C in periods) + " |",
             "|---" * (len(periods) + 3) + "|"]
    for model, domain in dict.fromkeys((c["model"], c["domain"]) for c in cases):
        row = {c["C"]: c for c in cases if (c["model"], c["domain"]) == (model, domain)}
        first = row[max(row)]["off"]
        shown = (f"{row[C]['change']:+.3f} ({row[C]['worst']:+.3f})" if C in row else "" for C in periods)
        lines.append(f"| {model} | {domain} | {first:.3f} | " + " | ".join(shown) + " |")
    better = sum(c["change"] < 0 for c in cases)
    lines.append(f"\nBetter than off in {better} of {len(cases)} cells; no segment worse by more than "
                 f"{max(c['worst'] for c in cases):.3f} bits per token.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--real", help="a converted model beside the bundled one")
    p.add_argument("--wiki", help="a file of WikiText-2")
    p.add_argument("--plays", help="a file of Shakespeare's plays")
    p.add_argument("--periods", type=int, nargs="+", default=PERIODS)
    p.add_argument("--factors", type=float, nargs="+", default=(1.0,))
    args = s.arguments(p, argv, RESULT, table)
    if args is None:
        return
    folders = {BUNDLED: BUNDLED} | ({} if args.real is None else {REAL: args.real})
    found = texts(args.wiki, args.plays)
    models = {name: HopeForCausalLM.from_pretrained(folder) for name, folder in folders.items()}
    setting = {"weights": {name: fingerprint(m) for name, m in models.items()},
               "texts": {name: digest(text) for name, text in found.items()}}
    study = s.Study(args.out, __doc__.split("\n")[0], setting)
    for name, model in models.items():
        tokenizer = Tokenizer.from_pretrained(folders[name])
        longest = max(TOKENS[name](C) for C in args.periods)
        for domain, text in found.items():
            ids, off = excerpt(tokenizer, half(text, second=False), longest, 0, 1), None
            for C, factor in product(args.periods, args.factors):
                case = f"{name} {domain} C{C} x{factor:g}"
                if case in study.cases:
                    continue
                if off is None:
                    off = nats(model, ids)[0]
                record = cell(model, ids[:, : TOKENS[name](C)], C, factor, off)
                study.put(case, {"model": name, "domain": domain, "C": C, "factor": factor} | record)
                print(f"{case}: {record}", flush=True)
    print(table(study.data))


if __name__ == "__main__":
    main()
