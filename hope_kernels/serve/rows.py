"""Rows: requests that are being served, alone while their prompt is read, then side by side in a batch."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..engine import native
from ..engine.decoder import Decoder
from ..engine.generation import read
from ..engine.sampling import draw
from ..model import HopeForCausalLM
from ..model_state import ModelState
from ..state import State
from ..text import Tokenizer
from .answer import Answer
from .jobs import Done, Job, Progress, Prompt, Text
from .refused import Refused
from .settings import Settings
from .store import Session


@dataclass(eq=False)
class Row:
    """A job and its sequence. locks: held until it is over. state: its own, while it is in no batch. token:
    drawn last, and not read yet. at: tokens of the prompt that have been read."""

    job: Job
    session: Session
    locks: contextlib.ExitStack
    prompt: Prompt
    answer: Answer
    state: ModelState
    logits: torch.Tensor | None = None
    token: int | None = None
    at: int = 0
    written: int = 0
    nats: float = 0.0
    predicted: int = 0
    interrupted: bool = False
    reason: str | None = None

    @property
    def bits(self) -> float | None:
        """Per token of the prompt, as it was foreseen."""
        return self.nats / math.log(2) / self.predicted if self.predicted else None

    def draw(self, logits: torch.Tensor, pos: int) -> None:
        """The next token from logits [1, vocab], which stand at ``pos``; its text goes out."""
        job = self.job
        (self.token,) = draw(logits, job.temperature, job.top_k, job.top_p, job.seed, [pos])
        self.written += 1
        text = self.answer.push(self.token)
        if text:
            job.emit(Text(text))
        if self.answer.ended:
            self.reason = "stop"
        elif self.written >= job.max_tokens:
            self.reason = "length"

    def finish(self) -> None:
        """The text that was waiting for more goes out."""
        self.reason = self.reason or "length"
        rest = self.answer.close()
        if rest:
            self.job.emit(Text(rest))

    def done(self) -> Done:
        """The last event."""
        kept, session = self.job.session is not None, self.session
        hope: dict[str, Any] = {
            "session": self.job.session, "generation": session.generation if kept else None,
            "tokens": self.state.pos[0], "bits_per_token": self.bits, "state_bytes": self.state.nbytes(),
            "rollbacks": sum(self.state.rollbacks), "interrupted": self.interrupted,
        }
        assert self.reason is not None
        return Done(self.answer.text, self.reason, len(self.prompt.ids), self.written, hope)


def opened(
    job: Job, session: Session, locks: contextlib.ExitStack, tokenizer: Tokenizer, settings: Settings
) -> Row:
    """Raises Refused for a prompt that cannot be read."""
    state = session.state
    try:
        prompt = job.prompt(state, session.turns)
    except ValueError as error:
        raise Refused(400, "bad_prompt", str(error)) from None
    if not prompt.ids and (state.unread is None or not job.max_tokens):
        raise Refused(400, "empty_prompt", "the prompt is empty, and the session has nothing to go on from")
    if len(prompt.ids) > settings.max_prompt:
        raise Refused(400, "prompt_too_long", f"the prompt has {len(prompt.ids)} {tokenizer.unit}, expected at "
                                              f"most {settings.max_prompt} (--max-prompt)")
    if not prompt.ids:
        assert state.unread is not None
        prompt = Prompt(state.unread[0].tolist(), "included")
    answer = Answer(tokenizer, [*job.stop, *tokenizer.stop], tokenizer.eos_ids, prompt.ids[-8:])
    return Row(job, session, locks, prompt, answer, state)


def read_piece(model: HopeForCausalLM, row: Row, settings: Settings) -> bool:
    """Reads the next piece of a prompt; whether that was the last one. ValueError as the model raises it."""
    turn = iter((False,))
    ids = torch.tensor([row.prompt.ids[row.at :]], device=row.state.ids.device)
    found = read(
        model, ids, row.state, learn=row.job.learn, backend=settings.backend, piece=settings.piece,
        last=row.logits, should_stop=lambda: next(turn, True), guard=settings.guard,
        unread=None if row.at else row.prompt.unread,
    )
    row.at, row.logits, row.state = row.at + found.tokens, found.logits, found.state
    row.nats, row.predicted = row.nats + float(found.nats[0]), row.predicted + found.predicted[0]
    if row.job.progress:
        row.job.emit(Progress(row.at, len(row.prompt.ids), row.bits))
    return found.finished


def kind(row: Row) -> tuple:
    """Rows of one kind can be read in one call."""
    kept = row.state.kept
    return row.job.learn, row.state.guard is None, None if kept is None else (kept.slots, kept.seed)


class Batch:
    """Rows that write side by side, and the state of all of them."""

    def __init__(self, model: HopeForCausalLM, settings: Settings):
        self.model, self.settings = model, settings
        self.rows: list[Row] = []
        self.state: ModelState | None = None
        self._decoded: ModelState | None = None
        self._decoder: Decoder | None = None  # of ``_decoded``, where a step is one call of C++

    def add(self, rows: list[Row]) -> None:
        """Rows that have drawn their first token."""
        states = [] if self.state is None else [self.state]
        for row in rows:
            assert row.token is not None
            row.state.unread = row.state.ids.new_full((1, 1), row.token)
            states.append(row.state)
        self.state = State.join(states) if len(states) > 1 else states[0]
        self.rows += rows

    def step(self) -> list[tuple[Row, Exception | None]]:
        """Every row reads its token and draws the next one. Returns the rows that have come to their end,
        with states of their own, and those that failed with their error; all of these leave the batch."""
        assert self.state is not None
        try:
            logits = self._read(self.state, len(self.rows))
        except (ValueError, RuntimeError) as error:
            if len(self.rows) == 1:
                failed, self.rows, self.state = self.rows[0], [], None
                return [(failed, error)]
            return self._one_by_one()
        for b, row in enumerate(self.rows):
            row.draw(logits[b : b + 1], self.state.pos[b])
        self.state.unread = self.state.ids.new_tensor([[row.token] for row in self.rows])
        return [(row, None) for row in self.take([row for row in self.rows if row.reason])]

    def _read(self, state: ModelState, rows: int) -> torch.Tensor:
        learn, unread = self.rows[0].job.learn, state.unread
        assert unread is not None and unread.shape[0] == rows
        if state is not self._decoded:  # the company has changed
            learning = learn == "next_token" and self.model.learns
            served = native.unserved(self.model, self.settings.backend, learning) is None
            self._decoder = Decoder(self.model, state, learn, self.settings.backend) if served else None
            self._decoded = state
        if self._decoder is not None:
            return self._decoder.step(unread, check_finite=True)[:, -1]
        with torch.no_grad():
            logits, _ = self.model(
                unread, state, learn=learn, backend=self.settings.backend, check_finite=True,
                guard=self.settings.guard if learn == "next_token" else None,
            )
        return logits[:, -1]

    def _one_by_one(self) -> list[tuple[Row, Exception | None]]:
        """``step`` where the call for all has failed: the others go on without the one that is to blame."""
        assert self.state is not None
        parts, found, rest = self.state.split(), [], []
        for row, state in zip(self.rows, parts):
            single = Batch(self.model, self.settings)
            single.rows, single.state = [row], state
            found += single.step()
            if single.state is not None:
                row.state = single.state
                rest.append(row)
        self.rows, self.state = [], None
        if rest:
            self.add(rest)
        return found

    def take(self, rows: list[Row]) -> list[Row]:
        """``rows`` leave the batch, with states of their own."""
        if not rows:
            return rows
        assert self.state is not None
        at = [b for b, row in enumerate(self.rows) if any(row is other for other in rows)]
        stay = [b for b in range(len(self.rows)) if b not in at]
        taken = [self.rows[b] for b in at]
        for row, b in zip(taken, at):
            row.state = self.state.select([b]) if len(self.rows) > 1 else self.state
        self.rows = [self.rows[b] for b in stay]
        self.state = self.state.select(stay) if stay else None
        return taken
