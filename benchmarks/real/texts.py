"""The texts of four domains, and excerpts of them in tokens of a model.

What is judged here is not what the default rates were searched on (``benchmarks.bench_rates``): of the texts
that both use, that search takes the first half and this one the second.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import studies
from hope_kernels.text import Tokenizer

KJV, WIKI, PYTHON, PLAYS = "KJV", "WikiText-2", "Python", "Shakespeare"
CHARACTERS = 6  # of text made ready for each token that is wanted
# large modules of the standard library, which every machine has
MODULES = ("argparse", "tarfile", "ast", "doctest", "pickle", "zipfile/__init__", "subprocess", "typing", "inspect",
           "mailbox", "turtle", "statistics", "datetime", "decimal", "threading", "logging/__init__", "tempfile")


def python_sources() -> str:
    folder, found = Path(sysconfig.get_paths()["stdlib"]), []
    for name in MODULES:
        path = folder / f"{name}.py"
        if path.exists():
            found.append(path.read_text(encoding="utf-8"))
    return "\n".join(found)


def texts(wiki: str | None, plays: str | None) -> dict[str, str]:
    """Domain -> text; wiki, plays: files of WikiText-2 and of Shakespeare's plays, None: without them."""
    found = {KJV: studies.text(studies.KJV).decode(), PYTHON: python_sources()}
    for name, path in ((WIKI, wiki), (PLAYS, plays)):
        if path is not None:
            found[name] = Path(path).read_text(encoding="utf-8")
    return found


def half(text: str, second: bool) -> str:
    """The half of a text that is searched on, or the one that is judged on."""
    middle = len(text) // 2
    return text[middle:] if second else text[:middle]


def excerpt(tokenizer: Tokenizer, text: str, tokens: int, index: int, count: int) -> Tensor:
    """[1, tokens] int64: the beginning of part ``index`` of ``count`` equal parts of the text. Raises
    ValueError where the part is too short."""
    part = len(text) // count
    ids = tokenizer.encode(text[index * part : min((index + 1) * part, index * part + CHARACTERS * tokens)])
    if len(ids) < tokens:
        raise ValueError(f"part {index} of {count} of a text of {len(text)} characters has {len(ids)} tokens, "
                         f"expected at least {tokens}")
    return torch.tensor([ids[:tokens]])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
