"""Continual reading: four documents in turn; the second half of each at every stage, by step rule.

A document's first half is read and learned; its second half is only read, from empty mixers, before anything was
learned and after every document. "gain" of a rule: how much better a document's second half is right after its
first half; "forgotten": how much of that the documents after it take away again (both in bits per token, means
over the documents that others follow).
"""

from __future__ import annotations

from benchmarks import studies as s
from benchmarks.real.models import bits, nats, variant
from benchmarks.real.needles import learned
from benchmarks.real.texts import excerpt, half
from hope_kernels import HopeForCausalLM
from hope_kernels.text import Tokenizer

RULES: dict[str, dict] = {
    "gd": {"optimizer": "gd", "lr": None, "relative": None},
    "adam": {"optimizer": "adam", "lr": None, "relative": None},
    "gd, rho 100": {"optimizer": "gd", "lr": 4e-4, "relative": True, "precondition": 100.0},
    "gd, 4 x the rate": {"optimizer": "gd", "lr": 4e-4, "relative": True},
}


def run(
    study: s.Study, model: HopeForCausalLM, tokenizer: Tokenizer, texts: dict[str, str], tokens: int,
    rules: dict[str, dict], learn_blocks: tuple[int, ...] | None
) -> None:
    halves = {}
    for domain, text in texts.items():
        ids = excerpt(tokenizer, half(text, second=True), 2 * tokens, 0, 1)
        halves[domain] = ids[:, :tokens], ids[:, tokens : tokens + tokens // 2]
    blocks = "all" if learn_blocks is None else f"{len(learn_blocks)} last"
    for rule, cms in rules.items():
        name = f"continual {rule}, {tokens} tokens, {blocks} blocks"
        if name in study.cases:
            continue
        one = variant(model, {"chunks": 256, **cms}, learn_blocks=learn_blocks)
        stages = {"before": {d: round(bits(nats(one, b)[0]), 5) for d, (_, b) in halves.items()}}
        state = None
        for domain, (first, _) in halves.items():
            _, state, _ = nats(one, first, "next_token", state)
            one.flush(state)
            own = learned(one, state)
            stages[domain] = {d: round(bits(nats(own, b)[0]), 5) for d, (_, b) in halves.items()}
            print(f"{name}: after {domain} {stages[domain]}", flush=True)
        order = list(halves)
        gains = [stages["before"][d] - stages[d][d] for d in order]
        lost = [stages[order[-1]][d] - stages[d][d] for d in order[:-1]]
        study.put(name, {
            "part": "continual", "rule": rule, "cms": cms, "blocks": blocks, "tokens": tokens, "stages": stages,
            "gain": round(sum(gains) / len(gains), 5), "forgotten": round(sum(lost) / len(lost), 5),
            "rollbacks": 0 if state is None else sum(state.rollbacks),
        })
