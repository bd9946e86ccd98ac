"""Job: one request to read and write, and what comes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..cli.models import unread_ids
from ..model_state import ModelState
from ..text import Tokenizer
from .refused import Refused


class Prompt(NamedTuple):
    """ids to read (may be empty: write on), and what they have to do with the state's unread token
    (``generation.read``)."""

    ids: list[int]
    unread: str


@dataclass(eq=False)
class Job:
    """prompt(state, turns): what is read. session: its name; None: nothing is kept. generation: at which the
    session must be. emit: takes the events, from another thread. progress: whether reading is an event too.
    chat: whether the turn belongs to a conversation. cancelled: set by whoever wants no more of it."""

    prompt: Callable[[ModelState, int], Prompt]
    emit: Callable[[Event], None]
    session: str | None = None
    generation: int | None = None
    max_tokens: int = 16
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: Sequence[str] = ()
    learn: str = "next_token"
    progress: bool = False
    chat: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)


class Progress(NamedTuple):
    """read of ``of`` tokens, foreseen with so many bits per token (None: nothing was to be foreseen yet)."""

    read: int
    of: int
    bits: float | None


class Text(NamedTuple):
    text: str


class Done(NamedTuple):
    """The end of an answer: all its text, why it ended ("stop", "length"), counts, and what ``hope`` in a
    response says. It comes once the session is in its file."""

    text: str
    reason: str
    read: int
    written: int
    hope: dict[str, Any]


class Failed(NamedTuple):
    error: Refused


Event = Progress | Text | Done | Failed


def completion(tokenizer: Tokenizer, text: str) -> Callable[[ModelState, int], Prompt]:
    """The text as it stands, after what the session has read."""
    def prompt(state: ModelState, turns: int) -> Prompt:
        return Prompt(tokenizer.encode(text, start=not state.pos[0]), "before")

    return prompt


def chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> Callable[[ModelState, int], Prompt]:
    """All messages for a session without turns; else the last one, which is the user's, if it is alone or the
    messages are as many turns as the session has had and one more."""
    def prompt(state: ModelState, turns: int) -> Prompt:
        if not turns:
            return Prompt(tokenizer.chat(messages), "before")
        users = sum(m["role"] == "user" for m in messages)
        if messages[-1]["role"] != "user" or len(messages) > 1 and users != turns + 1:
            raise Refused(400, "messages_do_not_follow", f"the session has had {turns} turns, and messages hold "
                          f"{users} of the user: expected the new one alone, or all {turns + 1}, the new one last")
        ids, unread = tokenizer.next_turn(messages[-1]["content"]), unread_ids(state)
        # an answer ends with the token that also begins what follows it, or in the middle
        closing = bool(unread) and unread == ids[:1] and unread[0] in tokenizer.eos_ids
        return Prompt(ids, "included" if closing else "before")

    return prompt
