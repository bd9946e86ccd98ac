"""Tables in Markdown, and the line under each that says where it comes from."""

from __future__ import annotations

from collections.abc import Iterable


def markdown(head: str, rows: Iterable[Iterable[object]]) -> str:
    """A table; ``head`` is "a | b | c"."""
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def source(command: str, file: str) -> str:
    return f"`python -m benchmarks.{command}`, `benchmarks/results/{file}.json`."


def threads(data: dict) -> str:
    """How many a result was measured with."""
    return {1: "one thread", 2: "two threads"}.get(data["machine"]["threads"], "several threads")
