"""The application: paths, and how an answer goes out while it is written."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from ..model import HopeForCausalLM
from ..text import Tokenizer
from ..text.extra import extra
from .bodies import bad, generation, job_of, streams, taken
from .guards import Guards
from .jobs import Done, Event, Failed, Job, Progress, Text
from .refused import Refused
from .responses import Form, event
from .settings import Settings
from .store import Store
from .worker import Worker

PAGE = os.path.join(os.path.dirname(__file__), "page.html")
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
          "frame-ancestors 'none'; base-uri 'none'")  # of the page
LOOK = 0.5  # seconds between two looks at whether the client is still there


class Service:
    """A model, its sessions and the worker: what the application serves. ``start`` before, ``close`` at the
    end."""

    def __init__(
        self, model: HopeForCausalLM, tokenizer: Tokenizer, name: str, folder: str, settings: Settings
    ):
        self.model, self.tokenizer, self.name, self.settings = model, tokenizer, name, settings
        self.store = Store(folder, model, settings.loaded)
        self.worker = Worker(model, tokenizer, self.store, settings)

    def start(self) -> None:
        self.worker.start()

    def close(self, grace: float | None = None) -> None:
        """Ends what is being written, and waits until all sessions are in their files."""
        self.worker.close(grace)
        self.worker.join()

    def card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        s = self.settings
        names = ("max_tokens", "max_prompt", "max_body", "batch", "queue")
        hope = {"chat": self.tokenizer.can_chat, "unit": self.tokenizer.unit, "segment": self.model.segment,
                "learn": s.learn if self.model.learns else "off", "limits": {n: getattr(s, n) for n in names}}
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "hope_kernels", "hope": hope}


def application(service: Service, hosts: set[str] | None = None) -> Any:
    """The ASGI application. hosts: see ``Guards``."""
    fastapi = extra("fastapi", "serve", "serve")
    responses = extra("fastapi.responses", "serve", "serve")
    in_thread = extra("fastapi.concurrency", "serve", "serve").run_in_threadpool
    app = fastapi.FastAPI(title="hope_kernels", docs_url=None, redoc_url=None, openapi_url=None)
    store = service.store

    def refused(request: Any, error: Exception) -> Any:
        path, status = request.url.path, getattr(error, "status_code", 500)
        if not isinstance(error, Refused):
            error = {404: Refused(404, "no_path", f"there is no {path}"),
                     405: Refused(405, "no_method", f"{path} has no {request.method}")}.get(
                         status, Refused(500, "failed", f"{type(error).__name__}: {error}"))
        return responses.JSONResponse(error.body(), error.status)

    for kind in (Refused, 404, 405, Exception):
        app.add_exception_handler(kind, refused)

    async def answer(request: Any, talk: bool) -> Any:
        body = await _json(request)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(found: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, found)

        job = job_of(body, talk, emit, service.tokenizer, service.settings, service.name)
        whole, counts = streams(body)
        form = Form(service.name, talk)
        service.worker.submit(job)
        try:
            first = await _next(events, request, job)
            if whole:
                parts = _stream(form, first, events, job, counts)
                return responses.StreamingResponse(parts, media_type="text/event-stream",
                                                   headers={"cache-control": "no-store"})
            while not isinstance(first, Done):
                first = await _next(events, request, job)
            return responses.JSONResponse(form.whole(first))
        except BaseException:
            job.cancelled.set()
            raise

    async def chat_completions(request: fastapi.Request) -> Any:
        return await answer(request, True)

    async def completions(request: fastapi.Request) -> Any:
        return await answer(request, False)

    async def create(request: fastapi.Request) -> Any:
        return responses.JSONResponse(await in_thread(store.create, _id(await _json(request))), 201)

    async def sessions(request: fastapi.Request) -> Any:
        query = request.query_params
        limit = query.get("limit", "100")
        if not limit.isdigit() or not 1 <= int(limit) <= 1000:
            raise bad("limit", limit, "an integer from 1 to 1000")
        found, more = await in_thread(store.list, int(limit), query.get("after"))
        return {"object": "list", "data": found, "has_more": more}

    async def look(session: str) -> Any:
        return await in_thread(store.describe, session)

    async def delete(session: str, request: fastapi.Request) -> Any:
        await in_thread(store.delete, session, generation(await _json(request)))
        return {"id": session, "object": "session", "deleted": True}

    async def fork(session: str, request: fastapi.Request) -> Any:
        return responses.JSONResponse(await in_thread(store.fork, session, _id(await _json(request))), 201)

    async def reset(session: str, request: fastapi.Request) -> Any:
        return await in_thread(store.reset, session, generation(await _json(request)))

    async def models() -> Any:
        return {"object": "list", "data": [service.card()]}

    async def health() -> Any:
        return {"status": "ok", **service.worker.figures()}

    async def page() -> Any:
        with open(PAGE, encoding="utf-8") as f:
            return responses.HTMLResponse(f.read(), headers={"content-security-policy": POLICY})

    for path, method, act in (
        ("/v1/chat/completions", "POST", chat_completions), ("/v1/completions", "POST", completions),
        ("/v1/models", "GET", models), ("/sessions", "POST", create), ("/sessions", "GET", sessions),
        ("/sessions/{session}", "GET", look), ("/sessions/{session}", "DELETE", delete),
        ("/sessions/{session}/fork", "POST", fork), ("/sessions/{session}/reset", "POST", reset),
        ("/health", "GET", health), ("/", "GET", page),
    ):
        # FastAPI looks types up by name in the module of a function; this one is local
        types = {n: fastapi.Request if n == "request" else str for n in act.__annotations__ if n != "return"}
        act.__annotations__ = types
        app.add_api_route(path, act, methods=[method], response_model=None)
    return Guards(app, service.settings, hosts)


async def _json(request: Any) -> dict[str, Any]:
    data = await request.body()
    try:
        found = json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError) as error:
        raise Refused(400, "bad_json", f"the request is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise Refused(400, "bad_json", "the request is JSON, but no object")
    return found


def _id(body: dict[str, Any]) -> str | None:
    return taken(body, "id", str, "the name of a session", lambda _: True, None)


async def _next(events: asyncio.Queue[Event], request: Any, job: Job) -> Event:
    """The next event of an answer that has not begun to go out. Raises Refused for one that failed."""
    while True:
        try:
            found = await asyncio.wait_for(events.get(), LOOK)
        except TimeoutError:
            if await request.is_disconnected():
                job.cancelled.set()
            continue
        if isinstance(found, Failed):
            raise found.error
        return found


async def _stream(
    form: Form, first: Event, events: asyncio.Queue[Event], job: Job, counts: bool
) -> AsyncIterator[bytes]:
    try:
        if form.talk:
            yield form.part()
        found = first
        while True:
            if isinstance(found, Progress):
                yield form.progress(found)
            elif isinstance(found, Text):
                yield form.part(found.text)
            elif isinstance(found, Failed):
                yield event(found.error.body())
                break
            else:
                yield form.part(None, found.reason, hope=found.hope)
                if counts:
                    yield form.usage(found)
                break
            found = await events.get()
        yield b"data: [DONE]\n\n"
    finally:
        job.cancelled.set()  # whoever has left early wants no more
