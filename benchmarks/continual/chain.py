"""Several texts one after another: what is left of each at the end."""

from __future__ import annotations

import math
import time
from functools import partial

from torch import Tensor

from benchmarks import studies as s
from benchmarks.continual.pairs import factor_at_gain
from benchmarks.continual.rules import Rule, under
from benchmarks.continual.sessions import HOW
from hope_kernels import HopeForCausalLM


def case(model: HopeForCausalLM, rule: Rule, factor: float, texts: dict[str, Tensor]) -> dict:
    """{"before", "learned", "end"}: {text: bits per row of its last half}, before and after it was read and when all
    were."""
    model, began = under(model, rule, factor), time.process_time()
    halves = {name: ids[:, ids.shape[1] // 2 :] for name, ids in texts.items()}
    session = HOW[rule.how](model, len(next(iter(texts.values()))), **rule.options)
    found: dict[str, dict] = {"before": {}, "learned": {}}
    for name, ids in texts.items():
        found["before"][name] = session.measured(halves[name])
        session.learn(ids)
        found["learned"][name] = session.measured(halves[name])
    found["end"] = {name: session.measured(half) for name, half in halves.items()}
    return found | {"seconds": round(time.process_time() - began, 2)}


def run(
    study: s.Study, model: HopeForCausalLM, rules: dict[str, Rule], texts: dict[str, Tensor], part: str,
    together: int = s.ROWS, factor: float | None = None, kind: str = "chain",
) -> None:
    """Every rule of ``part`` at ``factor``, or at the rate that gains what the model's own rule gains on pairs.
    together: rows of a batch. kind: the "part" of the records."""
    for name, rule in rules.items():
        rate = 1.0 if rule.own else factor or factor_at_gain(study.data, part, name)
        if rate is None:
            continue
        rate = round(rate, 4)
        key = f"{kind} {part} {name} x{rate:g}"
        if key in study.cases:
            continue
        record = {"part": kind, "of": part, "rule": name, "factor": rate}
        study.put(key, record | s.by_rows(partial(case, model, rule, rate), texts, together))
        print(f"{key}: {summary(study.cases[key])}", flush=True)


def summary(record: dict) -> dict:
    """{"gain": mean over all texts, "lost": {text: bits forgotten at the end, of all but the last}}."""
    gains = [s.mean(record["before"][t]) - s.mean(record["learned"][t]) for t in record["learned"]]
    lost = {t: s.mean(record["end"][t]) - s.mean(record["learned"][t]) for t in list(record["learned"])[:-1]}
    return {"gain": sum(gains) / len(gains), "lost": lost}


def of_excerpts(record: dict) -> list[float]:
    """What each excerpt has forgotten at the end, of all texts but the last; infinite where it diverged."""
    pairs = [zip(record["end"][t], record["learned"][t]) for t in list(record["learned"])[:-1]]
    lost = [[math.inf if None in (a, b) else a - b for a, b in of] for of in pairs]
    return [sum(of) / len(of) for of in zip(*lost)]


def table(data: dict, kind: str = "chain", plain_rule: str = "gd") -> str:
    """Markdown: what every rule has forgotten of each text at the end of the chain, and over the excerpts."""
    records = [r for r in data["cases"].values() if r.get("part") == kind]
    if not records:
        return "no chain yet"
    texts = list(summary(records[0])["lost"])
    lines = [f"| rule | rate | gain | {' | '.join(texts)} | mean | of {plain_rule}'s |",
             "|" + "---|" * (len(texts) + 5)]
    mean = lambda lost: sum(lost.values()) / len(lost)
    plain = next((mean(summary(r)["lost"]) for r in records if r["rule"] == plain_rule), None)
    for r in records:
        found = summary(r)
        lost, cells = mean(found["lost"]), " | ".join(f"{found['lost'][t]:.3f}" for t in texts)
        share = "-" if plain is None or plain <= 0 else f"{lost / plain:.2f}"
        each = of_excerpts(r)
        spread = f"{lost:.3f} ({min(each):.3f} to {max(each):.3f})"
        lines.append(f"| {r['rule']} | {r['factor']:g} | {found['gain']:.3f} | {cells} | {spread} | {share} |")
    return "\n".join(lines)
