"""The C++ and CUDA files that an entry file includes, and hashes of their tokens that know no file names.

Comments, white space and ``#include "..."`` lines do not count. With a header counts the source file of the
same name beside it, which holds what the header declares.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

COMMENT = re.compile(r"""//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')""", re.S)
TOKEN = re.compile(
    r"""\n|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'|[A-Za-z_]\w*|\.?\d(?:[\w.]|'\w|(?<=[eEpP])[+-])*"""
    r"""|<<<|>>>|<<=|>>=|->\*|\.\.\.|::|->|\+\+|--|<<|>>|&&|\|\||##|[-+*/%&|^=!<>]=|\S"""
)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]*)"[^\n]*$', re.M)
SOURCES = (".cpp", ".cu")


class File(NamedTuple):
    includes: list[str]  # the names in its #include "..."
    hash: str


@lru_cache(maxsize=512)
def scanned(path: Path, changed: int) -> File:
    """``changed``: the file's mtime, so that a long process sees an edit."""
    text = COMMENT.sub(lambda m: m[1] or " ", path.read_text(encoding="utf-8").replace("\\\n", " "))
    found = tokens(INCLUDE.sub("", text).replace("#pragma once", ""))
    return File(INCLUDE.findall(text), hashlib.sha256("\0".join(found).encode()).hexdigest())


def tokens(text: str) -> Iterator[str]:
    """The tokens of a text without comments; a directive also ends in a newline."""
    directive = False
    for token in TOKEN.findall(text):
        if token == "\n":
            if directive:
                yield token
            directive = False
        else:
            directive = directive or token == "#"
            yield token


def scan(path: Path) -> File:
    return scanned(path, path.stat().st_mtime_ns)


def reached(patterns: Iterable[str], root: Path, skip: str = "emulator") -> set[Path]:
    """Files that match, what they include, and the sources of the headers among them; nothing in a folder
    called ``skip``. Raises LookupError for a pattern that matches nothing."""
    root, left, seen = root.resolve(), [], set()
    for pattern in patterns:
        if not (found := [p for p in root.glob(pattern) if p.is_file()]):
            raise LookupError(f"{pattern} matches no file, an entry point of a case in benchmarks/sources.py")
        left += found
    while left:
        path = left.pop().resolve()
        if path in seen or skip in path.relative_to(root).parts:
            continue
        seen.add(path)
        left += [p for name in scan(path).includes if (p := path.parent / name).is_file()]
        if path.suffix not in SOURCES:
            left += [p for end in SOURCES if (p := path.with_suffix(end)).is_file()]
    return seen


def hashes(patterns: Iterable[str], root: Path) -> set[str]:
    """One hash for every file reached."""
    return {scan(path).hash for path in reached(patterns, root)}
