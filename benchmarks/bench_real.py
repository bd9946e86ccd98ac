"""A real language model that learns while it reads: SmolLM2-135M-Instruct (a Llama), converted by ``make real``.

    python -m benchmarks.bench_real [--model FOLDER] [--wiki FILE] [--plays FILE] [--parts domains ...]
        [--tokens 8192] [--excerpts 3] [--out benchmarks/results/real.json] [--table]

Everything is measured on text that nothing was tuned on. Parts:

    domains    bits per token of KJV, WikiText-2, Python sources and Shakespeare, learning off and on, with all
               tokens in sight and with a window of 512 and 4 sinks
    needles    facts planted in a text, asked once it has left the window, and from the saved session in a new
               process
    continual  four documents in turn; each one's held-out half at every stage, by step rule
    control    how much of a gain is calibration: learned on shuffled text, or on another document of the domain
    speed      tokens per second and memory, beside transformers and llama.cpp

A case that the file has is not run again: a killed run goes on by the same command.
"""

from __future__ import annotations

import argparse
import os

import torch

from benchmarks import studies as s
from benchmarks.real import continual, control, domains, needles, speed
from benchmarks.real.texts import digest, texts
from hope_kernels import HopeForCausalLM
from hope_kernels.identity import fingerprint
from hope_kernels.text import Tokenizer

RESULT = os.path.join(os.path.dirname(__file__), "results", "real.json")
# facts, tokens, passes, asked after every so many, what differs from the default step rule, and where they stand if
# not in WikiText; how they are replayed
NEEDLES = (
    (32, 20_480, 37, 12, {}),
    (32, 20_480, 61, 12, {}, ("KJV", "Python", 1)),  # what nothing was tried on before
    (16, 10_240, 25, 24, {}),
    (16, 10_240, 25, 24, {}, ("KJV", "Python", 1)),
    (16, 10_240, 37, 36, {}, ("KJV", "Python", 1)),
    (16, 10_240, 25, 24, {"rank": 16}),
    (16, 10_240, 25, 24, {"optimizer": "gd", "lr": None, "relative": None}),
    (16, 10_240, 25, 24, {"optimizer": "gd", "lr": 4e-4, "precondition": 100.0}),
)
SLEEP = {"share": 0.125, "rate": 2.0, "shuffle": True}
PARTS = ("domains", "needles", "continual", "control", "speed")


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", help="a converted model (default: that of make real)")
    p.add_argument("--wiki", help="a file of WikiText-2")
    p.add_argument("--plays", help="a file of Shakespeare's plays")
    p.add_argument("--transformers", help="a transformers folder of the same model, to be timed beside it")
    p.add_argument("--gguf", help="its GGUF file, for llama.cpp (the wheel xllamacpp)")
    p.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--excerpts", type=int, default=3, help="of each text, in as many parts of its own")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--out", default=RESULT)
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.model is None:
        from tools.real_model import converted

        args.model = converted()
    model, tokenizer = HopeForCausalLM.from_pretrained(args.model), Tokenizer.from_pretrained(args.model)
    found = texts(args.wiki, args.plays)
    setting = {
        "model": "SmolLM2-135M-Instruct", "weights": fingerprint(model), "dtype": str(model.embed.weight.dtype),
        "texts": {name: digest(text) for name, text in found.items()}, "excerpts": args.excerpts,
    }
    study = s.Study(args.out, __doc__.split("\n")[0], setting)
    if "domains" in args.parts:
        domains.run(study, model, tokenizer, found, args.tokens, args.excerpts)
    if "needles" in args.parts:
        for count, tokens, passes, every, cms, *where in NEEDLES:
            given = {"chunks": 256, "optimizer": "adam", "lr": 5e-4, "relative": True, **cms}
            needles.run(study, args.model, model, tokenizer, found, count, tokens, passes, every, given,
                        where=where[0] if where else needles.WHERE, **SLEEP)
    if "continual" in args.parts:
        continual.run(study, model, tokenizer, found, args.tokens // 4, continual.RULES, None)
    if "control" in args.parts:
        control.run(study, model, tokenizer, found, args.tokens // 4)
    if "speed" in args.parts:
        speed.run(study, args.model, args.transformers, args.gguf, 3, args.threads or torch.get_num_threads())


if __name__ == "__main__":
    main()
