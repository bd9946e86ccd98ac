"""What is left of one text when others have been learned, rule by rule at equal gain on the new text.

    python -m benchmarks.bench_continual --text FILE FILE ... [--title NAME ...] [--model bundled|FOLDER]
        [--parts pairs levels chain slow bank] [--rules gd ...] [--start 1] [--together 3] [--length 4096]
        [--out benchmarks/results/continual.json] [--table]

Texts: the bundled model's own (John and Acts, held out of its training) and one per --text; three disjoint excerpts
of each are the rows of a batch. Measured are the last halves of texts, in pure reads with the learned CMS from empty
memories. Parts:

    pairs   six ordered pairs (A, B) of the first three texts, by rule: gradient descent, momentum, Muon, Adam,
            preconditioned steps, replay, EWC, learning only what surprises. Gain: bits of B before it was read minus
            after. Forgotten: bits of A after B minus before it. Each rule is run at several rates, and what it
            forgets is interpolated where it gains as much as the model's own rule does at its own rates.
    levels  the same for gd with other levels and periods: 1, 2 and 3 levels, also of equal state
    chain   all texts in turn, every rule at the rate of equal gain
    slow    the same in excerpts of --slow-length tokens, gd at its rate of equal gain, with a third level of periods
            of up to 64k
    bank    the first halves of all texts in turn, then their second halves, by a bank of deltas that is not told
            which text it reads

A case that the file has is not run again: a killed run goes on by the same command. Lengths are in tokens, bytes of
the bundled model.
"""

from __future__ import annotations

import argparse
import os

from torch import Tensor

from benchmarks import studies as s
from benchmarks.continual import bank, chain, pairs
from benchmarks.continual.rules import RULES, levels, slow_levels
from hope_kernels import HopeForCausalLM
from hope_kernels.identity import fingerprint

RESULT = os.path.join(os.path.dirname(__file__), "results", "continual.json")
BUNDLED = "hope-byte"
PARTS = ("pairs", "levels", "chain", "slow", "bank")


def excerpts(model_name: str, texts: dict[str, bytes], length: int, seed: int) -> dict[str, Tensor]:
    """[rows, length] tokens of each text: bytes for the bundled model, else by the model's own tokenizer."""
    if model_name == BUNDLED:
        return {name: s.excerpts(data, length, length, seed) for name, data in texts.items()}
    from hope_kernels.text import Tokenizer

    tokenizer = Tokenizer.from_pretrained(model_name)
    most = 3 * 16 * length  # characters, of which even a poor tokenizer makes enough
    ids = {n: tokenizer.encode(data.decode("utf-8", "replace")[:most]) for n, data in texts.items()}
    return {name: s.excerpts(found, length, length, seed) for name, found in ids.items()}


def table(data: dict) -> str:
    parts = {"Rules, over pairs": pairs.table(data), "Levels, over pairs": pairs.table(data, "levels"),
             "A chain": chain.table(data), "Slow levels, a long chain": slow_table(data),
             "A bank of deltas": bank.table(data)}
    return "\n\n".join(f"{title}:\n\n{made}" for title, made in parts.items())


def slow_table(data: dict) -> str:
    return chain.table(data, "slow", next((r["rule"] for r in data["cases"].values() if r.get("part") == "slow"), ""))


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--text", nargs="+", default=[], help="files of other domains; .gz is unpacked")
    p.add_argument("--title", nargs="+", help="how the result names them (default: the files' names)")
    p.add_argument("--model", default="bundled", help="bundled, or a folder (that of make real, say)")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    p.add_argument("--rules", nargs="+", choices=tuple(RULES), default=tuple(RULES), help="beside own and gd")
    p.add_argument("--start", type=float, help="the rate that every rule's search begins with, but for own (default: "
                   "each its own, for the bundled model), in units of its first")
    p.add_argument("--together", type=int, default=s.ROWS, choices=range(1, s.ROWS + 1),
                   help="excerpts that are read side by side: fewer take less memory")
    p.add_argument("--length", type=int, default=4096, help="of each excerpt, in tokens")
    p.add_argument("--slow-length", type=int, default=49152)
    p.add_argument("--seed", type=int, default=0)
    args = s.arguments(p, argv, RESULT, table)
    if args is None:
        return
    if len(args.text) < 2:
        p.error("--text: expected at least two files")
    if args.title and len(args.title) != len(args.text):
        p.error(f"--title names {len(args.title)} texts, --text has {len(args.text)}")
    titles = args.title or [os.path.basename(path) for path in args.text]
    data = {s.KJV_TITLE: s.text(s.KJV)} | {t: s.text(path) for t, path in zip(titles, args.text)}
    name = BUNDLED if args.model == "bundled" else args.model
    model = HopeForCausalLM.from_pretrained(name)
    texts = excerpts(name, data, args.length, args.seed)
    block = 2 * bank.BLOCK * model.segment
    if "bank" in args.parts and args.length < block:
        p.error(f"--length is {args.length}, expected at least {block}: a bank reads whole blocks of half a text")
    study = s.Study(args.out, __doc__.split("\n")[0], {
        "model": os.path.basename(os.path.normpath(name)), "weights": fingerprint(model), "length": args.length,
        "excerpts": s.ROWS, "seed": args.seed, "texts": {t: s.digest(of) for t, of in data.items()},
    })
    three = dict(list(texts.items())[:3])
    rules = {name: rule for name, rule in RULES.items() if name in ("own", "gd", *args.rules)}
    search = {"together": args.together, "start": args.start}
    if "pairs" in args.parts:
        pairs.run(study, model, rules, three, **search)
    if "levels" in args.parts:
        pairs.run(study, model, {name: RULES[name] for name in ("own", "gd")}, three, **search)
        pairs.run(study, model, levels(model), three, "levels", **search)
    if "chain" in args.parts:
        chain.run(study, model, rules, texts, "pairs", args.together)
        chain.run(study, model, levels(model), texts, "levels", args.together)
    if "slow" in args.parts:
        long, rate = excerpts(name, data, args.slow_length, args.seed), pairs.factor_at_gain(study.data, "pairs", "gd")
        if rate is None:
            p.error("--parts: slow needs gd's rate of equal gain, which the part pairs finds")
        chain.run(study, model, slow_levels(model), long, "slow", args.together, rate, kind="slow")
    if "bank" in args.parts:
        bank.run(study, model, texts)
    print(table(study.data))


if __name__ == "__main__":
    main()
