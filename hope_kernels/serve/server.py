"""``serve``: the application behind uvicorn, and signals that lose nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

from ..cli.models import load_model, usable_device
from ..cli.parser import DTYPES
from ..cli.terminal import notice
from ..folders import bundled_models
from ..text.extra import extra
from .api import Service, application
from .settings import KEY, Settings, api_key, is_loopback

CLOSING = 30  # seconds after the grace in which open connections may end


def serve_command(args: Any) -> int:
    uvicorn = extra("uvicorn", "serve", "serve")
    extra("fastapi", "serve", "serve")
    settings = Settings(
        args.learn, not args.no_guard, args.backend, args.batch, args.queue, args.loaded, args.max_tokens,
        args.max_prompt, args.max_body, grace=args.grace, api_key=api_key(args.api_key_file),
    )
    local = is_loopback(args.host)
    if not local and settings.api_key is None:
        raise ValueError(f"argument --host is {args.host}, which others can reach, and there is no API key; set "
                         f"{KEY} or pass --api-key-file FILE")
    model, tokenizer = load_model(args.model, usable_device(args.device), DTYPES.get(args.dtype))
    name = os.path.basename(os.path.realpath(args.model)) if args.model is not None else bundled_models()[0]
    service = Service(model, tokenizer, name, args.sessions, settings)
    hosts = {"localhost", "127.0.0.1", "::1", args.host} if local else None
    listener = listening(args.host, args.port)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        application(service, hosts), log_level="warning", access_log=False, lifespan="off",
        timeout_graceful_shutdown=int(settings.grace) + CLOSING, timeout_keep_alive=30,
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            service.worker.close()
            super().handle_exit(sig, frame)

    service.start()
    with noted() as signals:
        try:
            if not args.quiet:
                shown = f"[{host}]" if ":" in host else host
                notice(f"hope_kernels: {name} with the sessions of {args.sessions} at http://{shown}:{port}/")
            Server(config).run(sockets=[listener])
        finally:
            service.close(0 if len(signals) > 1 else None)
            listener.close()
    return 0


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """The signals that came. uvicorn ends with them raised anew, which would end the process before the last
    sessions are in their files."""
    found: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {n: signal.signal(n, lambda number, _: found.append(number)) for n in numbers}
    try:
        yield found
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def listening(host: str, port: int) -> socket.socket:
    """Raises OSError, which names the place."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {host}:{port}: {error.strerror or error}") from None


