"""Control: how much of what learning gains is content, and how much calibration to the kind of text.

The second half of a document is read without learning, from empty mixers, by weights that have learned

    own       its first half
    shuffled  the same tokens, in random order
    other     another document of the domain, of equal length
    none      nothing
"""

from __future__ import annotations

import torch

from benchmarks import studies as s
from benchmarks.real.models import bits, nats, variant
from benchmarks.real.needles import learned
from benchmarks.real.texts import excerpt, half
from hope_kernels import HopeForCausalLM
from hope_kernels.text import Tokenizer


def run(
    study: s.Study, model: HopeForCausalLM, tokenizer: Tokenizer, texts: dict[str, str], tokens: int
) -> None:
    one = variant(model, {"chunks": 256})
    for domain, text in texts.items():
        name = f"control {domain}, {tokens} tokens"
        if name in study.cases:
            continue
        ids = excerpt(tokenizer, half(text, second=True), tokens + tokens // 2, 0, 2)
        first, second = ids[:, :tokens], ids[:, tokens:]
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
        sources = {"own": first, "shuffled": first[:, order],
                   "other": excerpt(tokenizer, half(text, second=True), tokens, 1, 2)}
        found = {"none": round(bits(nats(one, second)[0]), 5)}
        for source, given in sources.items():
            _, state, _ = nats(one, given, "next_token")
            one.flush(state)
            found[source] = round(bits(nats(learned(one, state), second)[0]), 5)
        study.put(name, {"part": "control", "domain": domain, "tokens": tokens, "bits": found})
        print(f"{name}: {found}", flush=True)
