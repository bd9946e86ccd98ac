"""What a window costs a real model, and what sinks give back: bits per token by position.

    python -m benchmarks.bench_sinks MODEL [--texts NAME=FILE ...] [--tokens 12288] [--window 512] [--sinks 4]
        [--out benchmarks/results/sinks.json]

MODEL: a folder of transformers with a tokenizer, of a kind that ``convert.llama`` takes. Texts: the bundled
one (John and Acts), the sources of three modules of Python's standard library, and one per --texts; of each
the first tokens, read in fp32 without learning, each predicted from what its cell lets the model see:

    full          everything, up to the context the model was trained on
    window        the last tokens
    kept          those and the sinks, each sink at its own distance, which grows without end
    re-rotated    those and the sinks, no sink farther than if what has left the window had never been
                  (``sinks=`` of HopeConfig; Xiao et al. 2024, StreamingLLM)

Bits are means over ranges of positions; the last ranges lie past the context the model was trained on. A run
that was stopped goes on where it was: cells of the same code and arguments in the file are kept.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import tarfile
import time
import typing
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import machine, write_json
from benchmarks.measure import ROOT
from benchmarks.sources import mark
from hope_kernels import HopeForCausalLM, convert
from hope_kernels.layers.attention import CausalAttention

RESULT = ROOT / "benchmarks" / "results" / "sinks.json"
BUNDLED = ROOT / "hope_kernels" / "assets" / "kjv-john-acts.txt.gz"
PIECE = 512  # tokens of a call


class Kept(CausalAttention):
    """Sinks at their own distance, however far."""

    def rotation(self, pos: list[int], T: int, x: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
        return super().rotation(pos, T, x)


def texts(given: list[str]) -> dict[str, str]:
    python = "".join(Path(str(module.__file__)).read_text() for module in (tarfile, argparse, typing))
    found = {"john-acts": gzip.decompress(BUNDLED.read_bytes()).decode(), "python": python}
    for entry in given:
        name, _, file = entry.partition("=")
        found[name] = Path(file).read_text()
    return found


@torch.no_grad()
def bits(model: HopeForCausalLM, ids: Tensor) -> Tensor:
    """Bits of ids [1, N + 1] from the second token on, [N]."""
    state, found = None, []
    for a in range(0, ids.shape[1] - 1, PIECE):
        b = min(a + PIECE, ids.shape[1] - 1)
        logits, state = model(ids[:, a:b], state)
        found.append(F.cross_entropy(logits[0], ids[0, a + 1 : b + 1], reduction="none") / math.log(2))
    return torch.cat(found)


def ranges(window: int, trained: int, tokens: int) -> list[tuple[int, int]]:
    edges = sorted({0, *(e for e in (window, 4 * window, trained, trained * 5 // 4) if e < tokens), tokens})
    return list(zip(edges, edges[1:]))


def main(argv: list[str] | None = None) -> None:
    import transformers

    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model", help="a folder of transformers")
    p.add_argument("--texts", nargs="*", default=[], metavar="NAME=FILE")
    p.add_argument("--tokens", type=int, default=12288)
    p.add_argument("--window", type=int, default=512)
    p.add_argument("--sinks", type=int, default=4)
    p.add_argument("--out", default=str(RESULT))
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    trained = theirs.config.max_position_embeddings
    result: dict = {
        "what": __doc__.split("\n")[0], "machine": machine(), "model": Path(args.model).name, "trained": trained,
        "window": args.window, "sinks": args.sinks, "tokens": args.tokens, "python": sys.version.split()[0],
        "cells": [], **mark("attention", device="cpu"),
    }
    out = Path(args.out)
    if out.exists():
        found = json.loads(out.read_text())
        same = ("model", "trained", "window", "sinks", "tokens", "python", "kernel")
        if all(found.get(name) == result[name] for name in same):
            result = found
    result["parameters"] = sum(p.numel() for p in theirs.parameters())
    done = {(cell["text"], cell["mode"]) for cell in result["cells"]}
    of_text = {
        name: torch.tensor([tokenizer(text[: 20 * args.tokens]).input_ids[: args.tokens + 1]])
        for name, text in texts(args.texts).items()
    }
    for name, mode in product(of_text, ("re-rotated", "kept", "window", "full")):
        if (name, mode) in done:
            continue
        sinks = args.sinks if mode in ("kept", "re-rotated") else 0
        model = convert.llama(theirs, 256, lr=0.0, window=None if mode == "full" else args.window, sinks=sinks)
        for block in model.blocks if mode == "kept" else ():
            block.mixer.__class__ = Kept
        ids = of_text[name][:, : trained + 1] if mode == "full" else of_text[name]
        began = time.process_time()
        found, N = bits(model, ids), ids.shape[1] - 1
        by_range = {f"{a}-{b}": float(found[a:b].mean()) for a, b in ranges(args.window, trained, N)}
        cell = {"text": name, "mode": mode, "bits": by_range, "tokens/s": N / (time.process_time() - began)}
        result["cells"].append(cell)
        write_json(args.out, result)
        print(f"{name:12} {mode:11} " + "  ".join(f"{r} {x:.3f}" for r, x in by_range.items()), flush=True)


if __name__ == "__main__":
    main()
