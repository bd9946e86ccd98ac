"""Replay ("sleep"): kept segments of a text are learned again, in another order, while nothing is read.

A reading goes through a text once, and what it learns last weighs most. A state that keeps segments
(``kept.py``) can learn from them again afterwards. A pass takes every kept segment of a row once: in the order
they were read in, or shuffled by a hash of the seed and the number of the pass. Each is cut into parts
(``apart.py``) that are read from empty mixers, as at position 0, with the weights the row has by then, and learned
from; dreams of the model's own weights (``dreams.py``) hold on to what it knew. A token that is likelier than
``known`` is not learned, and the rates fall evenly to 0 over a sleep.

The levels have a clock of their own meanwhile, which is 0 when a sleep begins and C (the shortest period) more
after every replay: level l commits where its period divides that, and accumulates otherwise. What it had
accumulated while reading is in its first commit; what it has accumulated since its last one when the sleep ends
is in its next commit while reading. A nested level is reset by the same clock.

The row's reading goes on as if there had been no sleep, but for its weights: position, mixers and the open
segment stay as they are. Rows sleep for themselves, each through its own segments.

``state.kept.done`` counts the replays of a sleep until it has come to its end. So one that was stopped goes on
where it was when it is asked for again, also from a file, and a segment that is learned by reading meanwhile
ends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..check import check_integer, check_number
from ..continued import continued
from ..model_state import ModelState
from ..state import Counters
from . import generation, segments
from .apart import learn_apart
from .dreams import Dreams, beside_a_replay, dream
from .generation import Reading
from .night import Night, Turn
from .options import check_callbacks
from .protocol import Model
from .source import Source
from .surprise import measured

OnSegment = Callable[[int, int], None]  # (replays of row 0 that are done, of how many)
OP = "HopeForCausalLM.replay"
DREAMS, KNOWN, JOINED = 64, 0.5, 0.75


@dataclass(frozen=True, kw_only=True)
class Replays:
    """Arguments of a model's ``replay``, where they are explained. Raises ValueError for a value out of range."""

    passes: int
    shuffle: bool
    seed: int
    should_stop: Callable[[], bool] | None
    on_segment: OnSegment | None
    backend: str | None
    part: int | None
    dreams: int
    known: float
    fade: bool
    rate: float
    share: float
    joined: float

    def __post_init__(self) -> None:
        check_callbacks(OP, should_stop=self.should_stop, on_segment=self.on_segment)
        for name, least, expected in (
            ("passes", 0, "an integer >= 0"), ("seed", None, "an integer"), ("dreams", 0, "an integer >= 0")
        ):
            object.__setattr__(self, name, check_integer(OP, name, getattr(self, name), least, expected))
        if self.part is not None:
            object.__setattr__(self, "part", check_integer(OP, "part", self.part, 0, "an integer >= 0 or None"))
        for name, fits, expected in (
            ("known", lambda n: 0 < n <= 1, "a probability, above 0"),
            ("share", lambda n: 0 < n <= 1, "a number above 0, at most 1"),
            ("joined", lambda n: 0 <= n <= 1, "a probability"),
            ("rate", lambda n: 0 <= n < math.inf, "a number >= 0"),
        ):
            object.__setattr__(self, name, check_number(OP, name, getattr(self, name), fits, expected))
        if self.fade not in (True, False):
            raise ValueError(f"{OP}: argument fade is {self.fade!r}, expected True or False")


@torch.no_grad()
def read(
    model: Model, ids: Tensor | Source, state: ModelState | None = None, *, learn: str = "next_token",
    passes: int = 1, shuffle: bool = False, replay: int = 0, seed: int = 0, flush: bool | None = None,
    on_segment: OnSegment | None = None, should_stop: Callable[[], bool] | None = None,
    backend: str | None = None, part: int | None = None, dreams: int = DREAMS,
    known: float = KNOWN, fade: bool = True, rate: float = 1.0,
    share: float = 1.0, joined: float = JOINED, **options: Any
) -> ReadAndSlept:
    """A model's ``read``, where the arguments are explained. options: those of ``generation.read`` that nothing
    but the reading asks for."""
    op = "HopeForCausalLM.read"
    passes = check_integer(op, "passes", passes, 1, "a positive integer")
    if passes > 1 and not replay and (state is None or state.kept is None):
        raise ValueError(f"{op}: argument passes is {passes}, which needs segments to replay: pass replay=k, at most "
                         "how many are kept")
    reading = generation.read(
        model, ids, state, learn=learn, backend=backend, should_stop=should_stop, replay=replay, seed=seed,
        **options
    )
    found, state = ReadAndSlept(**vars(reading)), reading.state
    if not reading.finished:
        return found
    if learn == "next_token" and (passes > 1 if flush is None else flush):
        model.flush(state, backend)
    if passes > 1:
        how = Replays(
            passes=passes - 1, shuffle=shuffle, seed=seed, should_stop=should_stop, on_segment=on_segment,
            backend=backend, part=part, dreams=dreams, known=known, fade=fade, rate=rate,
            share=share, joined=joined,
        )
        found.sleep = sleep(model, state, how)
        found.finished = found.sleep.finished
    return found


@dataclass
class Sleep:
    """What a model's ``replay`` returns. nats [passes, B] fp64: the summed loss of what was replayed, before it was
    learned; predicted: its tokens, per pass and row. finished: False where ``should_stop`` ended it; a pass that
    an earlier call had begun counts what this one did of it."""

    nats: Tensor
    predicted: list[list[int]]
    finished: bool


@dataclass
class ReadAndSlept(Reading):
    """A ``Reading``; and of the passes after it, the first of which is ``sleep.nats[0]``. finished: False where
    ``should_stop`` ended either."""

    sleep: Sleep | None = None


@torch.no_grad()
def sleep(model: Model, state: ModelState, how: Replays) -> Sleep:
    """Learns the segments that ``state`` keeps again, in place: a model's ``replay``."""
    passes, B = how.passes, state.batch
    if model.parallel is not None:
        model.parallel.check_replay(OP, model, state, _asked(how, state, False))
    found = Sleep(torch.zeros(passes, B, dtype=torch.float64, device="cpu"), [[0] * B for _ in range(passes)], True)
    if state.kept is None or not model.learns:
        return found
    if how.share < 1:
        with model.reading(OP, state):
            state.kept = measured(model, state.kept, how.backend)
    nights = [Night(model, state.kept, b, how) for b in range(B)]
    total = [passes * len(n) for n in nights]
    if any(d > t for d, t in zip(state.kept.done, total)):
        raise ValueError(f"{OP}: argument passes is {passes}, and the unfinished sleep of argument state has done "
                         f"{list(state.kept.done)} of {total} replays")
    sets: dict[int, Dreams] = {}
    while any(d < t for d, t in zip(state.kept.done, total)):
        stops = how.should_stop is not None and bool(how.should_stop())
        if model.parallel is not None:
            model.parallel.check_replay(OP, model, state, _asked(how, state, stops))
        if stops:
            found.finished = False
            return found
        turns = [
            Turn(b, *divmod(state.kept.done[b], len(nights[b]))) for b in range(B) if state.kept.done[b] < total[b]
        ]
        dreams = _dreamt(model, [nights[t.row].dreams(t) for t in turns], sets, max(total), how)
        for turn, losses in zip(turns, _again(model, state, turns, how, nights, dreams)):
            found.nats[turn.number, turn.row] += float(losses.double().sum())
            found.predicted[turn.number][turn.row] += losses.numel()
        if how.on_segment is not None and B:
            how.on_segment(state.kept.done[0], total[0])
    state.kept.done[:] = [0] * B
    return found


def _asked(how: Replays, state: ModelState, stops: bool) -> object:
    """All that decides what the next replay is: the same in all processes that share a model."""
    kept = state.kept
    held = kept and (kept.seed, kept.numbers.tolist(), list(kept.done))
    return replace(how, should_stop=None, on_segment=None), held, stops


def _dreamt(
    model: Model, which: list[tuple[int, list[int]] | None], sets: dict[int, Dreams], replays: int, how: Replays
) -> list[Dreams | None]:
    """The dreams that each turn has. sets: those at hand, by number; the ones that nobody reads leave it. replays: of
    the sleep."""
    each, tokens = beside_a_replay(model.segment)
    count = min(how.dreams, replays * each)
    numbers = {w[0] for w in which if w is not None}
    for number in sets.keys() - numbers:
        del sets[number]
    for number in numbers - sets.keys():
        sets[number] = dream(model, count, tokens, (how.seed, number), how.backend)
    return [None if w is None else sets[w[0]].some(w[1]) for w in which]


def _again(
    model: Model, state: ModelState, turns: list[Turn], how: Replays, nights: list[Night],
    dreams: list[Dreams | None]
) -> list[Tensor]:
    """One replay in the row of each of ``turns``, in place: its losses in nats."""
    C, kept, found = model.segment, state.kept, []
    assert kept is not None
    rows = [t.row for t in turns]
    with model.reading(OP, state):
        state.drop_held()
        draft = segments.draft(continued(model, state))
        assert draft.kept is not None
        done = Counters([d + (b in rows) for b, d in enumerate(kept.done)])
        for turn, dreamt in zip(turns, dreams):
            b, night = turn.row, nights[turn.row]
            parts = night.parts(kept, turn)
            rate = how.rate * (1 - kept.done[b] / (how.passes * len(night)) if how.fade else 1)
            nats = learn_apart(
                model, draft, b, parts, [d * C for d in done], how.backend, dreamt, least=-math.log(how.known),
                rate=rate
            )
            found.append(torch.cat([row[:n] for row, n in zip(nats, parts.lengths)]))
        state.assign(segments.finished(replace(draft, kept=replace(draft.kept, done=done))))
    return found
