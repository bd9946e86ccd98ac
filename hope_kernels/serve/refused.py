"""Refused: what a request is answered with where it cannot be served."""

from __future__ import annotations

from typing import Any

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
         409: "conflict_error", 413: "invalid_request_error", 429: "rate_limit_error"}


class Refused(Exception):
    """status: of HTTP. code: one word for programs. details: more of the JSON error."""

    def __init__(self, status: int, code: str, message: str, **details: Any):
        super().__init__(message)
        self.status, self.code, self.details = status, code, details

    def body(self) -> dict[str, Any]:
        """In the form of OpenAI's API."""
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "code": self.code, **self.details}}
