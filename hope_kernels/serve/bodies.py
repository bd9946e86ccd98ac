"""The bodies of requests: what of OpenAI's API is served, and errors that name the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..text import Tokenizer
from .jobs import Event, Job, chat, completion
from .refused import Refused
from .settings import Settings
from .store import FORM, NAME

# fields of OpenAI's that ask for what is not served, with the values that ask for nothing
NOTHING = {
    "n": (1,), "best_of": (1,), "logprobs": (0, False), "top_logprobs": (0,), "echo": (False,),
    "suffix": ("",), "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "tools": ([],),
    "functions": ([],), "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},),
}
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"}
OURS = {"model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop",
        "stream", "stream_options", "session", "generation", "learn", "progress"}


def bad(name: str, value: Any, expected: str) -> Refused:
    shown = repr(value)
    shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
    return Refused(400, "bad_argument", f"argument {name} is {shown}, expected {expected}", param=name)


def taken(
    body: dict, name: str, kind: type | tuple, expected: str, fits: Callable[[Any], bool], default: Any
) -> Any:
    """``body[name]``; null and nothing are ``default``. Raises Refused."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) and kind is not bool or not isinstance(value, kind) or not fits(value):
        raise bad(name, value, expected)
    return value


def job_of(
    body: dict[str, Any], talk: bool, emit: Callable[[Event], None], tokenizer: Tokenizer, settings: Settings,
    model: str,
) -> Job:
    """Of a body of /v1/chat/completions (talk) or /v1/completions. Raises Refused."""
    _check_fields(body, talk)
    if body.get("model") not in (None, model):
        raise Refused(404, "no_model", f"argument model is {body['model']!r}, and this server has {model!r}")
    if talk:
        if not tokenizer.can_chat:
            raise Refused(400, "no_chat_template", "this model has no chat template; it can read and write on, "
                                                   "at /v1/completions")
        prompt = chat(tokenizer, _messages(body.get("messages")))
    else:
        text = body.get("prompt")
        if not isinstance(text, str):
            raise bad("prompt", text, "one text")
        prompt = completion(tokenizer, text)
    most, least = settings.max_tokens, 1 if talk else 0
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    expected = f"an integer from {least} to {most} (--max-tokens)"
    tokens = taken(body, name, int, expected, lambda n: least <= n <= most, min(512 if talk else 16, most))
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    texts = isinstance(stop, list) and all(isinstance(s, str) and 0 < len(s) < 256 for s in stop)
    if not texts or len(stop) > 16:
        raise bad("stop", body["stop"], "a text, or at most 16 of them, of 1 to 255 characters each")
    session = body.get("session")
    if session is not None and not (isinstance(session, str) and NAME.fullmatch(session)):
        raise Refused(400, "bad_session_id", f"argument session is {session!r:.80}, expected {FORM}",
                      param="session")
    number, learn = (int, float), ("next_token", "off")
    return Job(
        prompt, emit, session, generation(body), tokens,
        taken(body, "temperature", number, "a number from 0 to 100", lambda t: 0 <= t <= 100, 0.7),
        taken(body, "top_k", int, "a positive integer", lambda k: k >= 1, None),
        taken(body, "top_p", number, "a number in (0, 1]", lambda p: 0 < p <= 1, None),
        taken(body, "seed", int, "an integer", lambda s: abs(s) < 2**63, 0), stop,
        taken(body, "learn", str, "'next_token' or 'off'", lambda s: s in learn, settings.learn),
        taken(body, "progress", bool, "true or false", lambda _: True, False), talk,
    )


def generation(body: dict[str, Any]) -> int | None:
    """At which a session must be."""
    return taken(body, "generation", int, "an integer >= 0", lambda n: n >= 0, None)


def streams(body: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the answer is to come in parts, and the usage at their end."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise bad("stream_options", options, "an object")
    wanted = taken(body, "stream", bool, "true or false", lambda _: True, False)
    return wanted, options.get("include_usage") is True


def _check_fields(body: dict[str, Any], talk: bool) -> None:
    known = OURS | IGNORED | {"messages" if talk else "prompt"}
    for name, value in body.items():
        if name in NOTHING:
            if value is not None and value not in NOTHING[name]:
                raise bad(name, value, f"{NOTHING[name][0]!r}, as nothing else is served")
        elif name not in known:
            raise Refused(400, "unknown_argument", f"argument {name!r:.80} is unknown", param=name)


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise bad("messages", messages, "a list of messages")
    found = []
    for i, m in enumerate(messages):
        role, content = (m.get("role"), m.get("content")) if isinstance(m, dict) else (None, None)
        if isinstance(content, list):
            parts = [p.get("text") if isinstance(p, dict) else None for p in content]
            content = "".join(parts) if all(isinstance(p, str) for p in parts) else None
        if role not in ("system", "developer", "user", "assistant") or not isinstance(content, str):
            raise bad(f"messages[{i}]", m, "a role (system, user or assistant), and a text as content")
        found.append({"role": "system" if role == "developer" else role, "content": content})
    return found
