"""One text, then another, by rule and rate: a case is a first text with all the second ones."""

from __future__ import annotations

import math
import time
from functools import partial

from torch import Tensor

from benchmarks import studies as s
from benchmarks.continual.equal_gain import at_gain, bracketed, share
from benchmarks.continual.rules import Rule, under
from benchmarks.continual.sessions import HOW
from hope_kernels import HopeForCausalLM

LOW = 0.75  # of the gain of the model's own rule: the other place where rules are compared


def case(model: HopeForCausalLM, rule: Rule, factor: float, first: str, texts: dict[str, Tensor]) -> dict:
    """Reads texts[first], then each of the others: {"before", "after", "seconds", "then": {second: {"lost", "before",
    "after", "online"}}}: bits per row of the last halves, but online: of all of the second text as it was read."""
    model, began = under(model, rule, factor), time.process_time()
    halves = {name: ids[:, ids.shape[1] // 2 :] for name, ids in texts.items()}
    session = HOW[rule.how](model, len(texts[first]), **rule.options)
    before = session.measured(halves[first])
    session.learn(texts[first])
    found = {"before": before, "after": session.measured(halves[first]), "then": {}}
    for second in texts:
        if second != first:
            other = session.forked()
            start = other.measured(halves[second])
            online = s.finite(other.learn(texts[second]))
            found["then"][second] = {
                "lost": other.measured(halves[first]), "before": start, "after": other.measured(halves[second]),
                "online": online,
            }
    return found | {"seconds": round(time.process_time() - began, 2)}


def run(
    study: s.Study, model: HopeForCausalLM, rules: dict[str, Rule], texts: dict[str, Tensor], part: str = "pairs",
    together: int = s.ROWS, start: float | None = None,
) -> None:
    """Every rule at rates around those that gain as much as the model's own rule, which comes first. together:
    rows of a batch. start: where the search begins, in place of the rules' own (but for the
    model's)."""
    for name, rule in rules.items():
        def gain(factor: float, name: str = name, rule: Rule = rule) -> float:
            for first in texts:
                key = f"{part} {name} x{factor:g}: {first}"
                if key not in study.cases:
                    record = {"part": part, "rule": name, "factor": factor, "first": first}
                    study.put(key, record | s.by_rows(partial(case, model, rule, factor, first), texts, together))
            found = mean_gain(study.data, part, name, factor)
            print(f"{part}, {name} x{factor:g}: gain {found:.3f}", flush=True)
            return found if math.isfinite(found) else -math.inf

        if rule.own:
            gain(1.0)
        bracketed(gain, rule.start if rule.own else start or rule.start, mean_gain(study.data, "pairs", "own", 1.0))


def points(data: dict, part: str, rule: str) -> dict[str, list[dict[str, float]]]:
    """{pair: what each rate did, as means over the rows}: factor, gain, forgotten (of the first text, since it was
    read), learned (of it, by then) and online. Infinite where a row diverged."""
    found: dict[str, list[dict[str, float]]] = {}
    for record in data["cases"].values():
        if record.get("part") != part or record["rule"] != rule:
            continue
        before, after = s.mean(record["before"]), s.mean(record["after"])
        for second, then in record["then"].items():
            found.setdefault(f"{record['first']}, then {second}", []).append({
                "factor": record["factor"], "gain": s.mean(then["before"]) - s.mean(then["after"]),
                "forgotten": s.mean(then["lost"]) - after, "learned": before - after, "online": s.mean(then["online"]),
            })
    return found


def mean_gain(data: dict, part: str, rule: str, factor: float) -> float:
    """Over the pairs; NaN where any diverged."""
    gains = [p["gain"] for of in points(data, part, rule).values() for p in of if p["factor"] == factor]
    return sum(gains) / len(gains) if gains else math.nan


def compared(data: dict, part: str, rule: str, of: str = "forgotten", of_gain: float = 1.0) -> dict[str, float | None]:
    """{pair: ``of`` where the rule gains ``of_gain`` of what the model's own rule gains at its own rates}."""
    found: dict[str, float | None] = {}
    for pair, own in points(data, "pairs", "own").items():
        target = of_gain * next(p["gain"] for p in own if p["factor"] == 1.0)
        curve = points(data, part, rule).get(pair, [])
        found[pair] = at_gain([(p["factor"], p["gain"], p[of]) for p in curve], target)
    return found


def factor_at_gain(data: dict, part: str, rule: str) -> float | None:
    """The factor at which the mean gain over the pairs is that of the model's own rule; where none reaches it, the one
    that gains most. None: the rule was not measured at all pairs."""
    of_pair, wanted = points(data, part, rule), len(points(data, "pairs", "own"))
    factors = sorted({p["factor"] for of in of_pair.values() for p in of})
    whole = [f for f in factors if sum(p["factor"] == f for of in of_pair.values() for p in of) == wanted]
    gains = {f: g for f in whole if math.isfinite(g := mean_gain(data, part, rule, f))}
    if not gains:
        return None
    found = at_gain([(f, g, f) for f, g in gains.items()], mean_gain(data, "pairs", "own", 1.0))
    return max(gains, key=gains.__getitem__) if found is None else found


def table(data: dict, part: str = "pairs") -> str:
    """Markdown: what every rule forgets at the gain of the model's own, of what gd forgets there; mean and range over
    the pairs."""
    rules = dict.fromkeys(r["rule"] for r in data["cases"].values() if r.get("part") == part)
    lines = ["| rule | forgets, of gd's | at 75% of the gain | pairs | bits forgotten | first text learned, bits "
             "| rates, times the first |", "|---|---|---|---|---|---|---|"]
    for rule in rules:
        cells = []
        for of in (1.0, LOW):
            found = share(compared(data, part, rule, of_gain=of), compared(data, "pairs", "gd", of_gain=of))
            cells.append("-" if found is None else "{:.2f} ({:.2f} to {:.2f})".format(*found))
        lost, learned = (
            [v for v in compared(data, part, rule, of).values() if v is not None] for of in ("forgotten", "learned")
        )
        factors = sorted({p["factor"] for of in points(data, part, rule).values() for p in of})
        mean = lambda values: f"{sum(values) / len(values):.3f}" if values else "-"
        pairs = f"{len(lost)} of {len(compared(data, part, rule))}"
        rates = f"{factors[0]:g} to {factors[-1]:g}"
        lines.append(f"| {rule} | {cells[0]} | {cells[1]} | {pairs} | {mean(lost)} | {mean(learned)} | {rates} |")
    return "\n".join(lines) if rules else "no pairs yet"
