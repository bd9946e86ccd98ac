"""What a request must pass before anything looks at it: its host, its key, its size."""

from __future__ import annotations

import hmac
import json
from typing import Any

from .refused import Refused
from .settings import Settings

OPEN = {"/", "/health"}  # paths that need no key


class Guards:
    """ASGI middleware. hosts: names under which this server may be asked (None: any); a page of the web whose
    name was made to point here is none of them."""

    def __init__(self, app: Any, settings: Settings, hosts: set[str] | None):
        self.app, self.settings, self.hosts = app, settings, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            body = None if scope["method"] in ("GET", "HEAD") else await self._body(headers, receive)
        except Refused as error:
            return await _answer(error, send)
        if body is None:
            return await self.app(scope, receive, send)
        given = [body]

        async def replayed() -> Any:
            if given:
                return {"type": "http.request", "body": given.pop(), "more_body": False}
            return await receive()

        await self.app(scope, replayed, send)

    def _check(self, scope: Any, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts is not None and name.strip("[]").lower() not in self.hosts:
            raise Refused(403, "bad_host", f"this server is not {name[:80]!r}")
        key = self.settings.api_key
        if key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + key.encode()):
                raise Refused(401, "bad_key", "the request needs the header Authorization: Bearer KEY, with "
                                              "this server's key")
        # what a page of another origin cannot send without being asked about it first
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            raise Refused(415, "not_json", "the request's content-type must be application/json")

    async def _body(self, headers: dict[bytes, bytes], receive: Any) -> bytes:
        most = self.settings.max_body
        too_large = Refused(413, "too_large", f"the request is larger than {most} bytes (--max-body)")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            raise too_large
        found, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            found += message.get("body", b"")
            more = message.get("more_body", False)
            if len(found) > most:
                raise too_large
        return bytes(found)


async def _answer(error: Refused, send: Any) -> None:
    data = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if error.status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
