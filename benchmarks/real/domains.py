"""Four domains: bits per token with learning off and on, with all tokens in sight and with a window and sinks."""

from __future__ import annotations

from itertools import product

from benchmarks import studies as s
from benchmarks.real.models import bits, by_segment, nats, variant
from benchmarks.real.texts import excerpt, half
from hope_kernels import HopeForCausalLM
from hope_kernels.text import Tokenizer

MODES = {"full": {"window": None, "sinks": 0}, "window": {"window": 512, "sinks": 4}}
SEGMENT = 256
# what costs most last: attention's backward over all tokens in sight
READINGS = (("window", "off"), ("window", "next_token"), ("full", "off"), ("full", "next_token"))


def run(study: s.Study, model: HopeForCausalLM, tokenizer: Tokenizer, texts: dict[str, str], tokens: int,
        excerpts: int) -> None:
    models = {name: variant(model, **fields) for name, fields in MODES.items()}
    for index, (mode, learn), domain in product(range(excerpts), READINGS, texts):
        name = f"domain {domain} {index} {mode} {learn}"
        if name in study.cases:
            continue
        ids = excerpt(tokenizer, half(texts[domain], second=True), tokens, index, excerpts)
        losses, state, seconds = nats(models[mode], ids, learn)
        record = {
            "part": "domains", "domain": domain, "excerpt": index, "mode": mode, "learn": learn,
            "tokens": ids.shape[1], "bits": round(bits(losses), 5), "segments": by_segment(losses, SEGMENT),
            "tokens_per_s": round(ids.shape[1] / seconds, 1), "rollbacks": sum(state.rollbacks),
            "state_bytes": state.nbytes(),
        }
        study.put(name, record)
        print(f"{name}: {record['bits']} bits, {record['tokens_per_s']} tokens/s", flush=True)
