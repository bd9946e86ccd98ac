"""Needles: made-up facts planted in a text, asked when they have long left the window.

    The code of the <colour> <animal> is <five digits>.

A fact is answered when every digit is the likeliest token after the ones before it. It is asked of the session as
the reading left it (its window holds other text by then), and of the learned weights alone, from empty mixers.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import studies as s
from benchmarks.real.models import bits, nats, variant
from benchmarks.real.texts import PLAYS, WIKI, excerpt, half
from hope_kernels import HopeForCausalLM, load_state
from hope_kernels.model_state import ModelState
from hope_kernels.state import Counters
from hope_kernels.text import Tokenizer

COLOURS = ("red", "blue", "green", "black", "white", "golden", "silver", "purple", "orange", "brown", "grey", "pink")
ANIMALS = ("fox", "owl", "bear", "wolf", "hare", "deer", "crow", "swan", "goat", "otter", "raven", "badger", "tiger")
DIGITS = 5
WHERE = (WIKI, PLAYS, 0)
OTHER = 1024  # tokens of another domain, whose bits must not change much

Fact = tuple[str, str]


def facts(count: int, seed: int = 0) -> list[Fact]:
    draw = random.Random(seed)
    pairs = draw.sample([(c, a) for c in COLOURS for a in ANIMALS], count)
    return [(f"The code of the {c} {a} is", f" {draw.randrange(10 ** (DIGITS - 1), 10**DIGITS)}") for c, a in pairs]


def planted(tokenizer: Tokenizer, text: Tensor, known: list[Fact]) -> Tensor:
    """``text`` [1, T] with every fact in the middle of a part of its own; T tokens."""
    found: list[int] = []
    ids, part = text[0].tolist(), text.shape[1] // len(known)
    for i, (question, answer) in enumerate(known):
        fact = tokenizer.encode(f"\n{question}{answer}.\n")
        own = ids[i * part : (i + 1) * part - len(fact)]
        found += own[: len(own) // 2] + fact + own[len(own) // 2 :]
    return torch.tensor([found])


def learned(model: HopeForCausalLM, state: ModelState) -> HopeForCausalLM:
    """A model whose own weights are what ``state`` has learned."""
    own = variant(model)
    own.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    copy = state.clone()
    copy.adopt(own)
    own.consolidate(copy)
    return own


@torch.no_grad()
def asked(model: HopeForCausalLM, tokenizer: Tokenizer, known: list[Fact], state: ModelState | None) -> dict:
    """Facts and digits that ``model`` knows; state: of the mixers that the questions follow, None: empty."""
    rows = [tokenizer.encode(f"\n{q}{a}") for q, a in known]
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    fresh = model.init_state(len(rows))
    if state is not None:
        mixers = [m.select([0] * len(rows)) for m in state.mixers]
        at = Counters([state.pos[0]] * len(rows))
        cms = [c and replace(c, pos=Counters(at)) for c in fresh.cms]
        C = model.segment
        seen = Counters([-1 if p % C else 0 for p in at])
        fresh = replace(
            fresh, mixers=mixers, pos=Counters(at), cms=cms, seen=seen, snapshot=[m.snapshot() for m in mixers]
        )
    logits, _ = model(ids, fresh, [len(r) for r in rows])
    hits = []
    for row, r in zip(logits, rows):
        n = len(r)
        guess = row[n - 1 - DIGITS : n - 1].argmax(-1)
        hits.append((guess == torch.tensor(r[n - DIGITS :])).tolist())
    return {"exact": sum(map(all, hits)), "digits": round(sum(map(sum, hits)) / (DIGITS * len(hits)), 4)}


def report(
    model: HopeForCausalLM, tokenizer: Tokenizer, known: list[Fact], state: ModelState, other: Tensor
) -> dict:
    own = learned(model, state)
    return {
        "session": asked(own, tokenizer, known, state), "weights": asked(own, tokenizer, known, None),
        "other_bits": round(bits(nats(own, other)[0]), 5),
    }


def elsewhere(folder: str, cms: dict, path: str, known: list[Fact]) -> dict:
    """The same questions, asked of a saved session in a new process."""
    given = json.dumps({"model": folder, "cms": cms, "session": path, "facts": known})
    command = [sys.executable, "-m", "benchmarks.real.needles"]
    return json.loads(subprocess.run(command, input=given, text=True, capture_output=True, check=True).stdout)


class Pace:
    """Stops a sleep of ``passes`` after ``every`` of them."""

    def __init__(self, passes: int, every: int):
        self.passes, self.every, self.done, self.left = passes, every, 0, None

    def on_segment(self, done: int, total: int) -> None:
        self.done = done * self.passes // total
        a_pass = total // self.passes
        self.left = (a_pass * self.every if self.left is None else self.left) - 1
        if done == total:
            self.left = 0

    def should_stop(self) -> bool:
        stop = self.left == 0
        self.left = None if stop else self.left
        return stop


def run(
    study: s.Study, folder: str, model: HopeForCausalLM, tokenizer: Tokenizer, texts: dict[str, str], count: int,
    tokens: int, passes: int, every: int, cms: dict, learn_blocks: tuple[int, ...] | None = None,
    where: tuple[str, str, int] = WHERE, **how: Any
) -> None:
    """Reads once and replays ``passes`` - 1 times, one sleep, asking after every ``every`` passes. where: the text
    that the facts are planted in, the other text, the seed of the facts. how: arguments of ``replay``."""
    options = " ".join(f"{k}={v}" for k, v in {**cms, **how}.items())
    blocks = "all" if learn_blocks is None else f"{learn_blocks[0]}-{learn_blocks[-1]}"
    name = f"needles {count} in {tokens}, {blocks} blocks, {passes} passes, {options}"
    name += "" if where == WHERE else f", {where[0]}, then {where[1]}, seed {where[2]}"
    if name in study.cases:
        return
    one, known = variant(model, cms, learn_blocks=learn_blocks), facts(count, where[2])
    text, other = (
        excerpt(tokenizer, half(texts[domain], second=True), n, 0, 1) for domain, n in zip(where, (tokens, OTHER))
    )
    ids = planted(tokenizer, text, known)
    before = {"session": None, "weights": asked(one, tokenizer, known, None),
              "other_bits": round(bits(nats(one, other)[0]), 5)}
    found = {"part": "needles", "facts": count, "tokens": ids.shape[1], "passes": passes, "cms": cms, "how": how,
             "blocks": blocks, "where": where, "before": before, "after": {}}
    slots = ids.shape[1] // one.segment + 1
    began = time.process_time()
    reading = one.read(ids, replay=slots, flush=True)
    state, spent = reading.state, time.process_time() - began
    found["bits_read"] = round(float(reading.nats[0]) / math.log(2) / reading.predicted[0], 5)
    pace = Pace(passes - 1, every)
    while True:
        at = pace.done + 1
        found["after"][at] = report(one, tokenizer, known, state, other)
        found["rollbacks"], found["state_bytes"] = sum(state.rollbacks), state.nbytes()
        print(f"{name}: after {at}: {found['after'][at]}, {spent:.0f} CPU-s", flush=True)
        if at == passes:
            break
        began = time.process_time()
        one.replay(state, passes - 1, on_segment=pace.on_segment, should_stop=pace.should_stop, **how)
        spent += time.process_time() - began
    found["cpu_seconds"] = round(spent, 1)
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "session.safetensors")
        state.save(path)
        found["session_file_bytes"] = os.path.getsize(path)
        found["elsewhere"] = elsewhere(folder, {"cms": cms, "learn_blocks": learn_blocks}, path, known)
    study.put(name, found)


def main() -> None:
    given = json.load(sys.stdin)
    model = variant(HopeForCausalLM.from_pretrained(given["model"]), given["cms"]["cms"],
                    learn_blocks=given["cms"]["learn_blocks"])
    tokenizer = Tokenizer.from_pretrained(given["model"])
    state = load_state(given["session"])
    assert isinstance(state, ModelState)
    own, known = learned(model, state), [tuple(f) for f in given["facts"]]
    print(json.dumps({"session": asked(own, tokenizer, known, state), "weights": asked(own, tokenizer, known, None)}))


if __name__ == "__main__":
    main()
