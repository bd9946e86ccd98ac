"""The rules that are compared: what differs in the CMS, how a session reads under it, and its rates.

A rate is a factor on what the rule begins with: for plain and momentum steps the model's own absolute rates, where it
has such (momentum: times 1 - mu), for all others the package's default, relative to the matrices' sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks import studies as s
from hope_kernels import CMSConfig, HopeForCausalLM
from hope_kernels.config.rates import default_rate


@dataclass(frozen=True)
class Rule:
    """cms: fields of CMSConfig that differ. start: the factor that a search of the rate begins with. how: the session
    of sessions.py, with its options. periods: of the levels, in units of the model's shortest; None: its own.
    learns: which of the levels learn; None: all. own: the model's own CMS, as it is but for ``factor`` in its rates."""

    cms: dict[str, Any] = field(default_factory=dict)
    start: float = 1.0
    how: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)
    periods: tuple[float, ...] | None = None
    learns: tuple[bool, ...] | None = None
    own: bool = False


RULES: dict[str, Rule] = {
    "own": Rule(own=True),
    "gd": Rule(start=4.0),
    "momentum": Rule({"optimizer": "momentum"}, start=4.0),
    "muon": Rule({"optimizer": "muon", "relative": True}, start=64.0),
    "adam": Rule({"optimizer": "adam", "relative": True}, start=4.0),
    "precondition 10": Rule({"precondition": 10.0}, start=4.0),
    "precondition 100": Rule({"precondition": 100.0}, start=2.0),
    "gd, replay": Rule(how="replay"),
    "precondition 100, replay": Rule({"precondition": 100.0}, start=2.0, how="replay"),
    "gd, EWC 0.01": Rule(how="ewc", options={"strength": 0.01}),
    "gd, EWC 0.1": Rule(how="ewc", options={"strength": 0.1}, start=2.0),
    "gd, surprising half": Rule(how="gated", options={"quantile": 0.5}, start=4.0),
}


def levels(model: HopeForCausalLM) -> dict[str, Rule]:
    """Gradient descent with other levels. Three ways to count state: the trained levels alone; with a third one, the
    identity at first, of the same size; and 1, 2, 3 levels of equal state, in which what is learned of a matrix is a
    product of rank R, R / 2, R / 3."""
    cms = s.cms_of(model)
    own = tuple(c / cms.chunks[0] for c in cms.chunks)
    third = (*own, 4 * own[-1]) if len(own) > 1 else (1.0, 4.0, 16.0)
    R = min(cms.d_model, cms.hidden) * 3 // 4
    fast, K = third[0], len(own)
    found = {"1 level": Rule(learns=(True, *(False,) * (K - 1)))}
    if K > 1:
        found["1 level, the slow one"] = Rule(learns=(*(False,) * (K - 1), True))
    found |= {
        "2 levels": Rule(periods=third[:2]), "3 levels": Rule(periods=third),
        **{f"{k} level{'s' * (k > 1)}, rank R / {k}": Rule(
            {"rank": R // k}, periods=third, learns=tuple(l < k for l in range(3))
        ) for k in (1, 2, 3)},
        "2 levels, both faster": Rule(periods=(fast / 4, fast)),
        "2 levels, faster and slower": Rule(periods=(fast / 4, 16 * fast)),
        "2 levels, the second at 16": Rule(periods=(fast, 16 * fast)),
        "2 levels, the second at 64": Rule(periods=(fast, 64 * fast)),
        "2 levels, nested": Rule({"variant": "nested"}, periods=third[:2]),
    }
    return found


def slow_levels(model: HopeForCausalLM) -> dict[str, Rule]:
    """Gradient descent with the trained levels, and with one more, the identity at first, of a period up to 1,024
    times the fastest one's."""
    own = s.cms_of(model).chunks
    trained = tuple(c / own[0] for c in own)
    more = {f"and one at {own[0] * k:,}": Rule(periods=(*trained, float(k))) for k in (16, 64, 256, 1024)}
    return {f"levels at {', '.join(map(str, own))}": Rule(periods=trained), **more}


def under(model: HopeForCausalLM, rule: Rule, factor: float) -> HopeForCausalLM:
    """``model`` with the CMS of ``rule`` at ``factor`` times its first rates."""
    own = s.cms_of(model)
    if rule.own:
        return scaled(model, factor)
    periods = rule.periods or tuple(c / own.chunks[0] for c in own.chunks)
    chunks = tuple(max(1, round(p * own.chunks[0])) for p in periods)
    chunks += tuple(chunks[-1] * 4**i for i in range(1, own.num_levels - len(chunks) + 1))  # frozen: they are read
    learns = rule.learns or (True,) * len(periods)
    optimizer = rule.cms.get("optimizer", "gd")
    absolute = not own.relative and own.optimizer == "gd" and not rule.cms.get("relative")
    rates = [
        tuple(
            factor * r if l < len(learns) and learns[l] else 0.0 for r in _rates(own, optimizer, C, l, absolute)
        )
        for l, C in enumerate(chunks)
    ]
    changes = {"optimizer": optimizer, "relative": not absolute, **rule.cms}
    return s.with_cms(model, own.replace(chunks=chunks, lr=tuple(rates), **changes))


def scaled(model: HopeForCausalLM, factor: float) -> HopeForCausalLM:
    """The model with ``factor`` times the rates of each of its blocks."""
    changed = [
        None if c is None else c.replace(lr=tuple(
            tuple(factor * r for r in c.matrix_rates(l).values()) for l in range(c.num_levels)
        )) for c in model.config.block_cms
    ]
    return s.with_cms(model, changed)


def _rates(own: CMSConfig, optimizer: str, C: int, l: int, absolute: bool) -> tuple[float, ...]:
    """Of the matrices of level ``l`` at period C."""
    if not absolute:
        return (default_rate(optimizer, C),) * len(own.matrices)
    l = min(l, own.num_levels - 1)
    scale = own.chunks[l] / C * (1 - own.momentum if optimizer == "momentum" else 1.0)
    return tuple(scale * r for r in own.matrix_rates(l).values())
