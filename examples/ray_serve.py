r"""Sessions over HTTP with several replicas of a model, scheduled by Ray Serve: what ``python -m
hope_kernels serve`` does in one process.

    pip install 'hope_kernels[ray]'
    python examples/ray_serve.py --sessions DIR --replicas 2
    curl -s localhost:8000/v1/completions -H 'content-type: application/json' \
        -H 'serve_multiplexed_model_id: john' \
        -d '{"session": "john", "prompt": "And he said unto them, ", "max_tokens": 40}'

DIR is a folder that all replicas see. The header names the session again: Ray sends the request to a
replica that has it in memory, if it can. Where it cannot, or where there is no header, any replica reads
the session's file, which is the truth about it. A session that another replica has in hand is refused with
409, as by any second server. HOPE_KERNELS_API_KEY holds the key that requests must bring; without one, only
this machine may ask.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from typing import Any

from hope_kernels.cli.models import load_model, usable_device
from hope_kernels.cli.parser import DTYPES
from hope_kernels.serve.api import Service, application
from hope_kernels.serve.settings import KEY, Settings, api_key, is_loopback


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--sessions", required=True, help="folder of the sessions")
    p.add_argument("--model", help="folder of the model (default: the bundled one)")
    p.add_argument("--replicas", type=int, default=2)
    p.add_argument("--cpus", type=float, default=1.0, help="that Ray sets aside for a replica")
    p.add_argument("--gpus", type=float, default=0.0, help="the same")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=DTYPES)
    p.add_argument("--loaded", type=int, default=16, help="idle sessions in the memory of a replica")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8000)
    return p.parse_args()


class Kept:
    """A session in the memory of a replica, as Ray sees it: it lets go of the one that it has not used
    longest."""

    def __init__(self, service: Service, name: str):
        self.service, self.name = service, name

    def __del__(self) -> None:
        self.service.store.forget(self.name)


def deployment(args: argparse.Namespace, settings: Settings) -> Any:
    """The application for ``serve.run``."""
    from ray import serve

    local = is_loopback(args.host)
    hosts = {"localhost", "127.0.0.1", "::1", args.host} if local else None

    @serve.deployment(
        num_replicas=args.replicas, max_ongoing_requests=settings.batch + settings.queue,
        graceful_shutdown_timeout_s=settings.grace + 30,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
    )
    @serve.ingress()
    class Sessions:
        def __init__(self) -> None:
            model, tokenizer = load_model(args.model, usable_device(args.device), DTYPES.get(args.dtype))
            name = os.path.basename(os.path.realpath(args.model)) if args.model else "bundled"
            self.service = Service(model, tokenizer, name, args.sessions, settings)
            self.service.start()
            self.served = application(self.service, hosts)

        def __serve_build_asgi_app__(self) -> Any:
            async def route(scope: dict, receive: Any, send: Any) -> None:
                if scope["type"] == "lifespan":
                    await self.lifespan(receive, send)
                else:
                    await self.answer(scope, receive, send)

            return route

        @serve.multiplexed(max_num_models_per_replica=max(settings.loaded, 1))
        async def session(self, name: str) -> Kept:
            """Ray counts the session as one of this replica's from here on; its file is read when it is
            needed."""
            return Kept(self.service, name)

        async def answer(self, scope: dict, receive: Any, send: Any) -> None:
            name, replica = serve.get_multiplexed_model_id(), serve.get_replica_context().replica_tag
            if name:
                await self.session(name)

            async def marked(message: dict) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), (b"hope-replica", replica.encode())]
                await send(message)

            await self.served(scope, receive, marked)

        async def lifespan(self, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            self.service.close()
            await send({"type": "lifespan.shutdown.complete"})

    return Sessions.bind()


def main() -> None:
    args = arguments()
    settings = Settings(loaded=args.loaded, api_key=api_key(None))
    if settings.api_key is None and not is_loopback(args.host):
        raise SystemExit(f"--host is {args.host}, which others can reach, and there is no API key: set {KEY}")
    args.sessions = os.path.realpath(args.sessions)
    args.model = args.model and os.path.realpath(args.model)
    import ray
    from ray import serve

    ray.init(include_dashboard=False, ignore_reinit_error=True)
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(deployment(args, settings), name="hope_kernels", route_prefix="/")
    stop = threading.Event()
    # Ray has put handlers of its own in place, which end the process at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print(f"hope_kernels: {args.replicas} replicas with the sessions of {args.sessions} at "
          f"http://{args.host}:{args.port}/", flush=True)
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
