"""The tables of real.json, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean

SHARE = 4  # of a document, at its end, that "last quarter" means


def _table(head: str, rows: Iterable[Iterable[object]]) -> str:
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def cases(data: dict, part: str) -> list[dict]:
    return [c for c in data["cases"].values() if c["part"] == part]


def domains(data: dict) -> str:
    """Bits per token by domain: means over the excerpts that all four readings have."""
    found: dict[tuple[str, int], dict[tuple[str, str], dict]] = {}
    for c in cases(data, "domains"):
        found.setdefault((c["domain"], c["excerpt"]), {})[c["mode"], c["learn"]] = c
    whole = {k: v for k, v in found.items() if len(v) == 4}
    order = [("full", "off"), ("full", "next_token"), ("window", "off"), ("window", "next_token")]
    rows = []
    for domain in dict.fromkeys(d for d, _ in whole):
        mine = [v for (d, _), v in whole.items() if d == domain]
        last = {o: mean(mean(v[o]["segments"][-len(v[o]["segments"]) // SHARE :]) for v in mine) for o in order}
        rows.append((domain, len(mine), *(f"{mean(v[o]['bits'] for v in mine):.3f}" for o in order),
                     *(f"{last[o]:.3f}" for o in (order[0], order[3]))))
    head = ("domain | excerpts | all in sight, off | learning | window and sinks, off | learning "
            "| last quarter: all in sight, off | window, sinks, learning")
    return _table(head, rows)


def worst(data: dict) -> float:
    """The most bits per token by which a segment became worse than with learning off."""
    found = {(c["domain"], c["excerpt"], c["mode"], c["learn"]): c["segments"] for c in cases(data, "domains")}
    return max(
        (a - b for key, on in found.items() if key[3] == "next_token" and (*key[:3], "off") in found
         for a, b in zip(on, found[*key[:3], "off"])), default=0.0
    )


def needles(data: dict) -> str:
    rows = []
    for c in cases(data, "needles"):
        given = {**c["cms"], **c.get("how", {})}
        rule = ", ".join(f"{k} {v}" for k, v in given.items() if k not in ("chunks", "relative") and v is not None)
        for passes, a in c["after"].items():
            elsewhere = c["elsewhere"]["session"]["exact"] if int(passes) == c["passes"] else ""
            text = c.get("where", ["WikiText-2"])[0]
            rows.append((f"{c['facts']} in {c['tokens']} of {text}", f"{rule}; blocks: {c['blocks']}",
                         f"{passes} of {c['passes']}",
                         a["session"]["exact"], f"{a['session']['digits']:.0%}", elsewhere, a["weights"]["exact"],
                         f"{a['weights']['digits']:.0%}", f"{a['other_bits'] / c['before']['other_bits'] - 1:+.1%}"))
    head = ("facts in tokens | rule | passes | session: exact | digits | in a new process | weights alone: exact "
            "| digits | bits of another text")
    return _table(head, rows)


def continual(data: dict) -> str:
    rows = [(c["rule"], f"{c['gain']:.3f}", f"{c['forgotten']:.3f}", f"{c['forgotten'] / c['gain']:.0%}")
            for c in cases(data, "continual")]
    return _table("rule | gain, bits per token | forgotten | of the gain", rows)


def control(data: dict) -> str:
    names = ("none", "own", "shuffled", "other")
    rows = [(c["domain"], *(f"{c['bits'][n]:.3f}" for n in names)) for c in cases(data, "control")]
    return _table("domain | nothing learned | its own first half | that, shuffled | another document", rows)


def speed(data: dict) -> str:
    rows = [(c["case"], f"{c['tokens_per_s']:.0f} ({c['spread'][0]:.0f} to {c['spread'][-1]:.0f})", c["peak_mb"],
             c["state_mb"] or "") for c in cases(data, "speed")]
    return _table("reading | tokens/s | peak memory, MB | state, MB", rows)
