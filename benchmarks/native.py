"""The C++ and CUDA files that an entry file includes, and hashes of their tokens that know no file names.

Comments, white space and ``#include "..."`` lines do not count. With a header counts the source file of the same
name beside it, which holds what the header declares.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

COMMENT = re.compile(r"""//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')""", re.S)
TOKEN = re.compile(
    r"""\n|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'|[A-Za-z_]\w*|\.?\d(?:[\w.]|'\w|(?<=[eEpP])[+-])*"""
    r"""|<<<|>>>|<<=|>>=|->\*|\.\.\.|::|->|\+\+|--|<<|>>|&&|\|\||##|[-+*/%&|^=!<>]=|\S"""
)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]*)"[^\n]*$', re.M)
SOURCES = (".cpp", ".cu")


def plain(path: Path) -> str:
    """A file without comments, its continued lines joined."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return COMMENT.sub(lambda m: m.group(1) or " ", text)


def tokens(path: Path) -> Iterator[str]:
    """The tokens of a file; a directive also ends in a newline."""
    directive = False
    for token in TOKEN.findall(INCLUDE.sub("", plain(path)).replace("#pragma once", "")):
        if token == "\n":
            if directive:
                yield token
            directive = False
        else:
            directive = directive or token == "#"
            yield token


def reached(patterns: Iterable[str], root: Path, skip: str = "emulator") -> set[Path]:
    """Files that match, what they include, and the sources of the headers among them; nothing in a folder called
    ``skip``. Raises LookupError for a pattern that matches nothing."""
    root, left, seen = root.resolve(), [], set()
    for pattern in patterns:
        if not (found := [p for p in root.glob(pattern) if p.is_file()]):
            raise LookupError(f"{pattern} is an entry file of a measured case (benchmarks/sources.py) and matches nothing")
        left += found
    while left:
        path = left.pop().resolve()
        if path in seen or skip in path.relative_to(root).parts:
            continue
        seen.add(path)
        left += [p for name in INCLUDE.findall(plain(path)) if (p := path.parent / name).is_file()]
        if path.suffix not in SOURCES:
            left += [p for end in SOURCES if (p := path.with_suffix(end)).is_file()]
    return seen


def hashes(patterns: Iterable[str], root: Path) -> set[str]:
    """One hash for every file reached."""
    return {hashlib.sha256("\0".join(tokens(p)).encode()).hexdigest() for p in reached(patterns, root)}
