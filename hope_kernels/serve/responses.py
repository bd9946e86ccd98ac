"""Answers in the form of OpenAI's API, in one piece or as server-sent events; ``hope`` holds what is ours."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from .jobs import Done, Progress


class Form:
    """Of the answers to one request. talk: of chat completions."""

    def __init__(self, model: str, talk: bool):
        self.talk = talk
        self.base = {"id": f"{'chatcmpl' if talk else 'cmpl'}-{secrets.token_hex(12)}", "object": "",
                     "created": int(time.time()), "model": model}

    def whole(self, done: Done) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": done.text}} if self.talk else {"text": done.text}
        kind = "chat.completion" if self.talk else "text_completion"
        choices = [self._choice(said, done.reason)]
        return {**self.base, "object": kind, "choices": choices, "usage": usage(done), "hope": done.hope}

    def part(self, text: str | None = None, reason: str | None = None, **more: Any) -> bytes:
        """text None: the beginning of a message, or with a reason its end."""
        said: dict[str, Any] = {"text": text or ""}
        if self.talk:
            begun = {} if reason else {"role": "assistant", "content": ""}
            said = {"delta": begun if text is None else {"content": text}}
        return self._event([self._choice(said, reason)], **more)

    def progress(self, at: Progress) -> bytes:
        return self._event([], hope={"read": at.read, "of": at.of, "bits_per_token": at.bits})

    def usage(self, done: Done) -> bytes:
        return self._event([], usage=usage(done))

    def _choice(self, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def _event(self, choices: list, **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self.talk else "text_completion"
        return event({**self.base, "object": kind, "choices": choices, **more})


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def usage(done: Done) -> dict[str, int]:
    total = done.read + done.written
    return {"prompt_tokens": done.read, "completion_tokens": done.written, "total_tokens": total}
