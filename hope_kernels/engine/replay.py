"""Replay ("sleep"): kept segments of a text are learned again, in another order, while nothing is read.

A reading goes through a text once, and what it learns last weighs most. A state that keeps segments
(``kept.py``) can learn from them again afterwards. A pass takes every kept segment of a row once: in the order
they were read in, or shuffled by a hash of the seed and the number of the pass. Each is cut into parts that are
read apart (``apart.py``), from empty mixers, as at position 0, with the weights the row has by then, and learned
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..check import check_integer
from ..continued import continued
from ..kept import KeptSegments, hashed
from ..model_state import ModelState
from ..state import Counters
from . import generation, segments
from .apart import cut, learn_apart
from .dreams import SHARE, Dreams, dream
from .generation import Reading
from .options import check_callbacks
from .protocol import Model
from .source import Source

OnSegment = Callable[[int, int], None]  # (replays of row 0 that are done, of how many)
OP = "HopeForCausalLM.replay"
PART, PART_OF_BYTES, BYTES = 24, 96, 1024  # tokens of a part; with a vocabulary of up to BYTES
DREAMS = 64  # of as many tokens
KNOWN = 0.5


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

    def __post_init__(self) -> None:
        check_callbacks(OP, should_stop=self.should_stop, on_segment=self.on_segment)
        for name, least, expected in (
            ("passes", 0, "an integer >= 0"), ("seed", None, "an integer"), ("dreams", 0, "an integer >= 0")
        ):
            object.__setattr__(self, name, check_integer(OP, name, getattr(self, name), least, expected))
        if self.part is not None:
            object.__setattr__(self, "part", check_integer(OP, "part", self.part, 0, "an integer >= 0 or None"))
        if isinstance(self.known, bool) or not isinstance(self.known, (int, float)) or not 0 < self.known <= 1:
            raise ValueError(f"{OP}: argument known is {self.known!r}, expected a probability, above 0")
        if isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)) or not 0 <= self.rate < math.inf:
            raise ValueError(f"{OP}: argument rate is {self.rate!r}, expected a number >= 0")
        if self.fade not in (True, False):
            raise ValueError(f"{OP}: argument fade is {self.fade!r}, expected True or False")


@torch.no_grad()
def read(
    model: Model, ids: Tensor | Source, state: ModelState | None = None, *, learn: str = "next_token",
    passes: int = 1, shuffle: bool = False, replay: int = 0, seed: int = 0, flush: bool | None = None,
    on_segment: OnSegment | None = None, should_stop: Callable[[], bool] | None = None,
    backend: str | None = None, part: int | None = None, dreams: int = DREAMS,
    known: float = KNOWN, fade: bool = True, rate: float = 1.0, **options: Any
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
    found = Sleep(torch.zeros(passes, B, dtype=torch.float64, device="cpu"), [[0] * B for _ in range(passes)], True)
    if state.kept is None or not model.learns:
        return found
    held = state.kept.held()
    total, counts = [passes * n for n in held], _tokens(state.kept)
    if any(d > t for d, t in zip(state.kept.done, total)):
        raise ValueError(f"{OP}: argument passes is {passes}, and the unfinished sleep of argument state has done "
                         f"{list(state.kept.done)} replays of {held} segments")
    orders: list[dict[int, list[int]]] = [{} for _ in range(B)]
    own: dict[int, Dreams | None] = {}
    while any(d < t for d, t in zip(state.kept.done, total)):
        if how.should_stop is not None and how.should_stop():
            found.finished = False
            return found
        rows = [b for b in range(B) if state.kept.done[b] < total[b]]
        at = [divmod(state.kept.done[b], held[b]) for b in rows]
        for b, (p, _) in zip(rows, at):
            if p not in orders[b]:
                orders[b] = {p: _order(state.kept, b, p, how.shuffle, how.seed)}
                if p not in own:
                    own = {q: d for q, d in own.items() if any(q in o for o in orders)}
                    own[p] = dream(model, how.dreams, min(_part(model, how), model.segment), (how.seed, p), how.backend)
        turns = [Turn(b, p, orders[b][p][j]) for b, (p, j) in zip(rows, at)]
        for turn, nats in zip(turns, _again(model, state, turns, how, own)):
            found.nats[turn.number, turn.row] += nats
            found.predicted[turn.number][turn.row] += counts[turn.row][turn.slot]
        if how.on_segment is not None and B:
            how.on_segment(state.kept.done[0], total[0])
    state.kept.done[:] = [0] * B
    return found


class Turn(NamedTuple):
    """A replay: of which row, in which pass, of what slot."""

    row: int
    number: int
    slot: int


def _again(
    model: Model, state: ModelState, turns: list[Turn], how: Replays, own: dict[int, Dreams | None]
) -> list[float]:
    """Learns one kept segment in the row of each of ``turns``, in place: their losses in nats."""
    C, kept, found, seed, part = model.segment, state.kept, [], how.seed, _part(model, how)
    assert kept is not None
    rows, texts, numbers = [t.row for t in turns], kept.ids, kept.numbers.tolist()
    with model.reading(OP, state):
        state.drop_held()
        draft = segments.draft(continued(model, state))
        assert draft.kept is not None
        done = Counters([d + (b in rows) for b, d in enumerate(kept.done)])
        for b, p, slot in turns:
            text, number = texts[b, slot], numbers[b][slot]
            at = C if how.part == 0 else 1 + hashed(seed, p, number, 1) % part
            night = own[p]
            some = None if night is None else night.some(_which(night, C, seed, p, number))
            parts = cut(text[text >= 0], at, part)
            rate = how.rate * (1 - kept.done[b] / (how.passes * kept.held()[b]) if how.fade else 1)
            nats = learn_apart(
                model, draft, b, parts, [d * C for d in done], how.backend, some, least=-math.log(how.known), rate=rate
            )
            found.append(float(nats.double().sum()))
        state.assign(segments.finished(replace(draft, kept=replace(draft.kept, done=done))))
    return found


def _part(model: Model, how: Replays) -> int:
    """Tokens of a part."""
    if how.part is None:
        return PART_OF_BYTES if model.config.vocab_size <= BYTES else PART
    return how.part or model.segment


def _which(own: Dreams, segment: int, *turn: int) -> list[int]:
    """The dreams beside a turn: the ones after that which its numbers draw."""
    D, tokens = own.ids.shape
    first = hashed(*turn, 2) % D
    return [(first + i) % D for i in range(min(max(1, round(SHARE * segment / tokens)), D))]


def _tokens(kept: KeptSegments) -> list[list[int]]:
    """Tokens of each slot that have one after them."""
    return ((kept.ids >= 0).sum(-1) - 1).clamp(min=0).tolist()


def _order(kept: KeptSegments, row: int, p: int, shuffle: bool, seed: int) -> list[int]:
    """The row's slots as pass ``p`` of a sleep takes them."""
    numbers: Sequence[int] = kept.numbers[row].tolist()
    slots = [s for s, n in enumerate(numbers) if n >= 0]
    return sorted(slots, key=lambda s: (hashed(seed, p, numbers[s]), s) if shuffle else (numbers[s], s))
