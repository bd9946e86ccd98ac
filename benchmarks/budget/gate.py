"""Whether kernels have become more expensive than the committed budget says."""

from __future__ import annotations

ALLOWED = 0.02
LIMITS = ("instructions", "wavefronts", "sectors")


def dearer(name: str, budget: dict, now: dict, allowed: float = ALLOWED) -> list[str]:
    """One sentence for every count of a case that has grown by more than ``allowed``, with the stages that did it."""
    found = []
    for what in LIMITS:
        before, after = budget[what], now[what]
        if after <= before * (1 + allowed):
            continue
        grown = {
            stage: of[what] - budget["stages"].get(stage, {}).get(what, 0) for stage, of in now["stages"].items()
        }
        worst = sorted((s for s, d in grown.items() if d > 0), key=lambda s: -grown[s])[:3]
        where = ", ".join(f"{s} +{grown[s]:.0f}" for s in worst)
        rise = f"{after / before - 1:+.1%}" if before else "from none"
        found.append(f"{name}: {what} {before:.0f} -> {after:.0f} ({rise}) a {now['unit']}: {where}")
    return found


def cheaper(name: str, budget: dict, now: dict, allowed: float = ALLOWED) -> list[str]:
    """Counts that have fallen by more than ``allowed``: the budget should be written anew."""
    return [
        f"{name}: {what} {budget[what]:.0f} -> {now[what]:.0f}" for what in LIMITS
        if now[what] < budget[what] * (1 - allowed)
    ]
