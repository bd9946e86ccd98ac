"""Needles in real text at lengths never trained: HOPE with the preset "recall", Titans and attention of one size.

    python -m benchmarks.bench_text_needles [--text FILE] [--arms recall ...] [--steps 1000] [--seeds 0 1 2]
        [--lengths 256 1024 ...] [--threads 1] [--out benchmarks/results/text_needles.json] [--table]

As benchmarks/bench_needles.py, whose arms, curriculum and tests these are, with bytes of a text for noise: four strings
"@" key value, a key of two letters and a value of one (benchmarks/synthetic/text_needles.py). Convolutions see four
tokens at a time in place of two, a whole needle. The first 80% of the text trains, the rest tests.
"""

from __future__ import annotations

import argparse
import os
from functools import partial

from benchmarks import bench_needles as n
from benchmarks import studies as s
from benchmarks.synthetic.text_needles import TOLD, WIDTH, hay, text_needles
from hope_kernels import HopeConfig

RESULT = os.path.join(os.path.dirname(__file__), "results", "text_needles.json")
LENGTHS = (256, 1024, 4096, 16384)
TRAINS = 0.8  # of the text, its beginning
TIMES = {"recall": (1, 3), "titans": (1, 3), "attention_conv": (1, 6)}  # as in bench_needles.py
BYTES = 256


def configuration(arm: str, d: int, chunk: int, hidden: int) -> HopeConfig:
    noise = n.configuration(arm, d, chunk, hidden)
    titans = None if noise.titans is None else noise.titans.replace(conv_window=WIDTH)
    return noise.replace(vocab_size=BYTES, titans=titans)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--text", default=s.KJV, help="a text file, or .gz")
    p.add_argument("--arms", nargs="+", choices=n.ARMS, default=("recall", "titans", "attention_conv"))
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    p.add_argument("--d-model", type=int, default=64)
    p.add_argument("--chunk", type=int, default=16)
    p.add_argument("--tokens", type=int, default=2048, help="of a step")
    p.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    p.add_argument("--sequences", type=int, default=100, help="that each length is tested on")
    args = s.arguments(p, argv, RESULT, n.table)
    if args is None:
        return
    sizes = ("steps", "d_model", "chunk", "tokens", "lengths", "sequences")
    data = s.text(args.text)
    text = hay(data)
    cut = int(TRAINS * len(text))
    for part, needed in ((text[:cut], n.LAST), (text[cut:], max(args.lengths))):
        if len(part) < needed + args.chunk:
            p.error(f"--text has {len(text)} bytes, of which {len(part)} for lengths of up to {needed}: expected at "
                    f"least {needed + args.chunk}")
    setting = {name: getattr(args, name) for name in sizes} | {"text": s.digest(data)}
    study = s.Study(args.out, __doc__.split("\n")[0], setting)
    n.compare(study, args, partial(n.build, configuration=configuration), partial(text_needles, text[:cut]),
              partial(text_needles, text[cut:]), TOLD, TIMES)
    print(n.table(study.data))


if __name__ == "__main__":
    main()
