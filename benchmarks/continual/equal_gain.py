"""Rules compared where they have learned equally much: what they forget, interpolated over their rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

LEAST, DOUBLINGS, ENOUGH = 0.05, 8, 0.7  # bits; of the first rate at most; of the gain that is aimed at


def at_gain(points: Iterable[tuple[float, float, float]], gain: float) -> float | None:
    """The value of a curve where its gain is ``gain``: linear between the two neighbouring rates that are the first to
    have it between them. points: (rate, gain, value) in any order; (0, 0, 0) is on every curve, unless it is among
    them with other values. None: no rate reaches it."""
    found = {0.0: (0.0, 0.0)} | {rate: (g, v) for rate, g, v in points}
    ordered = [found[rate] for rate in sorted(found)]
    for (g0, v0), (g1, v1) in zip(ordered, ordered[1:]):
        if all(map(math.isfinite, (g0, v0, g1, v1))) and g0 <= gain <= g1 and g0 < g1:
            return v0 + (v1 - v0) * (gain - g0) / (g1 - g0)
    return None


def bracketed(measure: Callable[[float], float], start: float, target: float) -> dict[float, float]:
    """{rate: gain} around ``target``: from ``start`` in factors of 2, up until the target is reached or more no longer
    gains more, down until a gain below ENOUGH of it, or, where it is not reached, until less gains less. measure: the
    gain at a rate, -inf where it diverged."""
    found, rate = {start: measure(start)}, start
    while math.isfinite(found[rate]) and max(found.values()) < target and rate < start * 2**DOUBLINGS:
        best, rate = max(found.values()), 2 * rate
        found[rate] = measure(rate)
        if not found[rate] > best:
            break
    rate = start
    while rate > start / 2**DOUBLINGS:
        best = max(found.values())
        if math.isfinite(found[rate]) and found[rate] <= ENOUGH * target and (best >= target or found[rate] < best):
            break
        rate /= 2
        found[rate] = measure(rate)
    return found


def share(rule: Mapping[str, float | None], plain: Mapping[str, float | None]) -> tuple[float, float, float] | None:
    """What a rule forgets, of what plain steps forget: over all pairs together where both are known, and the least and
    the most of a pair. Pairs where plain steps forget less than LEAST bits have no share of their own. None: no pair
    is known."""
    both = [(lost, own) for pair, lost in rule.items() if lost is not None and (own := plain.get(pair)) is not None]
    shares = [lost / own for lost, own in both if own >= LEAST]
    if not shares:
        return None
    return sum(lost for lost, _ in both) / sum(own for _, own in both), min(shares), max(shares)
