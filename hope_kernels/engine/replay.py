"""Replay ("sleep"): kept segments of a text are learned again, in another order, while nothing is read.

A reading goes through a text once, and what it learns last weighs most. A state that keeps segments
(``kept.py``) can learn from them again afterwards. A pass takes every kept segment of a row once: in the order
they were read in, or shuffled by a hash of the seed and the number of the pass. Each is read from empty mixers,
as at position 0, with the weights the row has by then, and learned from as ``segments.learn_segment`` does.

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..check import check_integer
from ..continued import continued
from ..kept import KeptSegments, hashed
from ..model_state import ModelState
from ..state import Counters
from . import generation, segments
from .generation import Reading
from .head import Targets
from .options import check_callbacks
from .protocol import Model
from .source import Source

OnSegment = Callable[[int, int], None]  # (replays of row 0 that are done, of how many)


@torch.no_grad()
def read(
    model: Model, ids: Tensor | Source, state: ModelState | None = None, *, learn: str = "next_token",
    passes: int = 1, shuffle: bool = False, replay: int = 0, seed: int = 0, flush: bool | None = None,
    on_segment: OnSegment | None = None, should_stop: Callable[[], bool] | None = None,
    backend: str | None = None, **options: Any
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
        found.sleep = sleep(model, state, passes - 1, shuffle, seed, should_stop, on_segment, backend)
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
def sleep(
    model: Model, state: ModelState, passes: int = 1, shuffle: bool = True, seed: int = 0,
    should_stop: Callable[[], bool] | None = None, on_segment: OnSegment | None = None,
    backend: str | None = None,
) -> Sleep:
    """Learns the segments that ``state`` keeps again, ``passes`` times, in place: a model's ``replay``, where
    the arguments are explained."""
    op = "HopeForCausalLM.replay"
    check_callbacks(op, should_stop=should_stop, on_segment=on_segment)
    passes = check_integer(op, "passes", passes, 0, "an integer >= 0")
    seed = check_integer(op, "seed", seed, None, "an integer")
    B = state.batch
    found = Sleep(torch.zeros(passes, B, dtype=torch.float64, device="cpu"), [[0] * B for _ in range(passes)], True)
    if state.kept is None or not model.learns:
        return found
    held = state.kept.held()
    total, counts = [passes * n for n in held], _tokens(state.kept)
    if any(d > t for d, t in zip(state.kept.done, total)):
        raise ValueError(f"{op}: argument passes is {passes}, and the unfinished sleep of argument state has done "
                         f"{list(state.kept.done)} replays of {held} segments")
    orders: list[dict[int, list[int]]] = [{} for _ in range(B)]
    while any(d < t for d, t in zip(state.kept.done, total)):
        if should_stop is not None and should_stop():
            found.finished = False
            return found
        rows = [b for b in range(B) if state.kept.done[b] < total[b]]
        at = [divmod(state.kept.done[b], held[b]) for b in rows]
        for b, (p, _) in zip(rows, at):
            if p not in orders[b]:
                orders[b] = {p: _order(state.kept, b, p, shuffle, seed)}
        slots = [orders[b][p][j] for b, (p, j) in zip(rows, at)]
        nats = _again(model, state, rows, slots, [counts[b][s] for b, s in zip(rows, slots)], backend)
        for b, (p, _), slot, value in zip(rows, at, slots, nats.tolist()):
            found.nats[p, b] += value
            found.predicted[p][b] += counts[b][slot]
        if on_segment is not None and B:
            on_segment(state.kept.done[0], total[0])
    state.kept.done[:] = [0] * B
    return found


def _again(
    model: Model, state: ModelState, rows: list[int], slots: list[int], lengths: list[int], backend: str | None
) -> Tensor:
    """Learns one kept segment in each of ``rows``, in place: their losses [len(rows)] in nats."""
    op, C, kept = "HopeForCausalLM.replay", model.segment, state.kept
    assert kept is not None
    with model.reading(op, state):
        state.drop_held()
        draft = segments.draft(continued(model, state))
        text, n = kept.ids[rows, slots].clamp(min=0), max(lengths)
        empty = [b.mixer.init_state(len(rows), text.device) for b in model.blocks]
        done = Counters([d + (b in rows) for b, d in enumerate(kept.done)])
        heads, _ = segments.learn_segment(
            model, draft, empty, text[:, :n], Targets(text[:, 1 : n + 1], lengths), [True] * len(rows), lengths,
            [d * C for d in done], backend, rows if len(rows) < state.batch else None, logits=False,
        )
        assert heads.nats is not None and draft.kept is not None
        state.assign(segments.finished(replace(draft, kept=replace(draft.kept, done=done))))
    return heads.nats.double().sum(1)


def _tokens(kept: KeptSegments) -> list[list[int]]:
    """Tokens of each slot that have one after them."""
    return ((kept.ids >= 0).sum(-1) - 1).clamp(min=0).tolist()


def _order(kept: KeptSegments, row: int, p: int, shuffle: bool, seed: int) -> list[int]:
    """The row's slots as pass ``p`` of a sleep takes them."""
    numbers: Sequence[int] = kept.numbers[row].tolist()
    slots = [s for s, n in enumerate(numbers) if n >= 0]
    return sorted(slots, key=lambda s: (hashed(seed, p, numbers[s]), s) if shuffle else (numbers[s], s))
