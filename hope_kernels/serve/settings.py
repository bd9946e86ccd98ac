"""What a server is told, and the limits it keeps to."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

KEY = "HOPE_KERNELS_API_KEY"  # the environment's


@dataclass(frozen=True)
class Settings:
    """batch: sequences that are read and written side by side. queue: requests that may wait beside them.
    loaded: sessions that stay in memory when nothing uses them. max_tokens, max_prompt: tokens of one answer
    and of one prompt. max_body: bytes of a request. piece: tokens of a prompt that are read between two
    tokens of the others. grace: seconds that answers may go on for once the server is told to stop. api_key:
    what requests must bring, None: nothing."""

    learn: str = "next_token"
    guard: bool = True
    backend: str | None = None
    batch: int = 16
    queue: int = 64
    loaded: int = 16
    max_tokens: int = 1024
    max_prompt: int = 65536
    max_body: int = 1 << 20
    piece: int = 512
    grace: float = 10.0
    api_key: str | None = None

    def __post_init__(self) -> None:
        zero = {"queue", "loaded"}
        for name in ("batch", "queue", "loaded", "max_tokens", "max_prompt", "max_body", "piece"):
            value, least = getattr(self, name), 0 if name in zero else 1
            if value < least:
                raise ValueError(f"argument --{name.replace('_', '-')} is {value}, expected {least} or more")
        if not self.grace >= 0:
            raise ValueError(f"argument --grace is {self.grace}, expected a number of seconds")


def api_key(file: str | None) -> str | None:
    """From a file, or the environment. Raises ValueError for an empty one."""
    if file is None:
        key = os.environ.get(KEY)
    else:
        with open(file, encoding="utf-8") as f:
            key = f.read()
    if key is not None and not key.strip():
        raise ValueError(f"the API key in {KEY if file is None else file} is empty")
    return key and key.strip()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
