"""The steps of a run on a card: their order, how long each is expected to take, and when it has to be over.

Estimates come from counted work and from compile times on a CPU; no GPU has confirmed them. Ends are those of
a run of nine minutes and scale with --minutes. A step begins as soon as the one before it is over, so what a
step does not need is there for the later ones; "sweeps" takes what is left.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

MINUTES = 9


class Step(NamedTuple):
    name: str
    what: str
    seconds: int  # expected
    end: int      # in seconds from the start of a run of MINUTES


STEPS = (
    Step("environment", "card, versions, ceilings; the CUDA library loads, or is built; Triton kernels begin "
         "to compile beside it", 28, 40),
    Step("CUDA tests", "chosen tests of the CUDA C++ kernels, 8 processes", 40, 110),
    Step("Triton tests", "chosen tests of the Triton kernels, 6 processes; memcheck, racecheck beside them",
         60, 190),
    Step("worth", "timed cases in the order of their worth, one at a time; nothing else runs", 190, 405),
    Step("counters", "ncu on the prefill kernels: issue slots, stall reasons", 22, 435),
    Step("sweeps", "the other timed cases, as far as the time goes", 100, 480),
    Step("peers", "other implementations: what is installed, then what has to be compiled", 50, 525),
    Step("summary", "what failed, what was measured", 3, 540),
)
NAMES = tuple(step.name for step in STEPS)
TIMED = ("worth", "counters", "sweeps", "peers")  # nothing may run beside these


class Clock:
    """The steps of one run: when they began and ended, and when they have to be over."""

    def __init__(self, minutes: float, say: Callable[[str], None] = print):
        self.began, self.minutes, self.say = time.time(), minutes, say
        self.taken: dict[str, tuple[float, float]] = {}
        self.errors: dict[str, str] = {}
        self.late = 0.0

    def end(self, name: str) -> float:
        """Steps up to "worth" are put off by what the first one took too long, at the expense of the
        sweeps."""
        end, last = (self.minutes / MINUTES * STEPS[NAMES.index(n)].end for n in (name, "counters"))
        return self.began + end + min(self.late, max(0.0, last - end))

    def shift(self) -> None:
        """The first step is over, maybe late: a library that had to be built."""
        self.late = max(0.0, time.time() - self.end("environment"))

    @contextmanager
    def step(self, name: str) -> Iterator[float]:
        """Yields when the step has to be over. An error of this program in it is kept; the next step goes
        on."""
        first = time.time()
        self.say(f"-- {name}: {STEPS[NAMES.index(name)].what} ({first - self.began:.0f} s)")
        try:
            yield self.end(name)
        except Exception:
            self.errors[name] = traceback.format_exc()
            self.say(self.errors[name])
        finally:
            self.taken[name] = first - self.began, time.time() - self.began

    def record(self) -> dict:
        """What a result file keeps of it: seconds from the start."""
        steps = {name: [round(t, 1) for t in span] for name, span in self.taken.items()}
        return {"status": "ok", "minutes": self.minutes, "steps": steps,
                "seconds": round(time.time() - self.began, 1)}


def lines(minutes: float, cases: dict[str, list[tuple[str, float]]]) -> Iterator[str]:
    """The timeline before a run. cases: {step: [(name, estimated seconds)]}, in the order of the run."""
    yield f"A run of {minutes:g} minutes. Seconds are estimates; no GPU has confirmed them."
    yield f"{'from':>5} {'takes':>6} {'ends by':>8}  step"
    at, scale = 0.0, minutes / MINUTES
    for step in STEPS:
        takes = min(step.seconds, scale * step.end - at)
        if step.name == "sweeps":  # as long as it may
            takes = max(0.0, scale * step.end - at)
        yield f"{at:5.0f} {takes:6.0f} {scale * step.end:8.0f}  {step.name}: {step.what}"
        inside = 0.0
        for name, seconds in cases.get(step.name, ()):
            inside += seconds
            if inside > takes:
                yield f"{'':22}  .. and what else there is time for"
                break
            yield f"{'':5} {seconds:6.0f} {'':8}    {name}"
        at += takes
    yield f"{at:5.0f} seconds of {60 * minutes:.0f}"
