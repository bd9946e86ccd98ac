"""Four domains: bits per token with learning off and on, with all tokens in sight and with a window and sinks."""

from __future__ import annotations

from benchmarks import studies as s
from benchmarks.real.models import bits, by_segment, nats, variant
from benchmarks.real.texts import excerpt, half
from hope_kernels import HopeForCausalLM
from hope_kernels.text import Tokenizer

MODES = {"full": {"window": None, "sinks": 0}, "window": {"window": 512, "sinks": 4}}
SEGMENT = 256


def run(study: s.Study, model: HopeForCausalLM, tokenizer: Tokenizer, texts: dict[str, str], tokens: int,
        excerpts: int) -> None:
    models = {name: variant(model, **fields) for name, fields in MODES.items()}
    for index in range(excerpts):
        for domain, text in texts.items():
            ids = excerpt(tokenizer, half(text, second=True), tokens, index, excerpts)
            for mode, one in models.items():
                for learn in ("off", "next_token"):
                    name = f"domain {domain} {index} {mode} {learn}"
                    if name in study.cases:
                        continue
                    losses, state, seconds = nats(one, ids, learn)
                    record = {
                        "part": "domains", "domain": domain, "excerpt": index, "mode": mode, "learn": learn,
                        "tokens": ids.shape[1], "bits": round(bits(losses), 5),
                        "segments": by_segment(losses, SEGMENT), "tokens_per_s": round(ids.shape[1] / seconds, 1),
                        "rollbacks": sum(state.rollbacks), "state_bytes": state.nbytes(),
                    }
                    study.put(name, record)
                    print(f"{name}: {record['bits']} bits, {record['tokens_per_s']} tokens/s", flush=True)
