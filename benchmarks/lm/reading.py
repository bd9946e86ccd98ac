"""What the models of a comparison read: contexts of several lengths to train on, and the same bytes judged after
each of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import studies as s
from benchmarks.sources import ROOT
from hope_kernels import HopeForCausalLM

JUDGED = 4  # the last so many-th part of a context is judged


def _mixed_text() -> ModuleType:
    """examples/mixed_text.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("mixed_text", ROOT / "examples" / "mixed_text.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sources = _mixed_text().sources


def contexts(
    texts: list[Tensor], weights: list[float], batch: int, tokens: int, lengths: tuple[int, ...], seed: int
) -> Iterator[tuple[Tensor, bool]]:
    """Without end: ids [batch, tokens + 1], and whether a new context begins with them.

    A context is a stretch of one of ``texts`` for every row, read ``tokens`` bytes a step. Its length is one of
    ``lengths``, multiples of ``tokens`` that divide the longest; as many bytes are read in contexts of each length.
    Depends on nothing but the arguments. Raises ValueError for a text that is too short.
    """
    longest = max(lengths)
    short = [len(t) for t in texts if len(t) <= longest]
    if short:
        raise ValueError(f"contexts: argument texts has one of {short[0]} bytes, expected more than {longest}")
    g = torch.Generator().manual_seed(seed)
    chances = torch.tensor(weights, dtype=torch.float64)
    turns = [length for length in lengths for _ in range(longest // length)]
    while True:
        for turn in torch.randperm(len(turns), generator=g).tolist():
            length = turns[turn]
            which = torch.multinomial(chances, batch, replacement=True, generator=g).tolist()
            places = torch.rand(batch, dtype=torch.float64, generator=g).tolist()
            starts = [int(u * (len(texts[w]) - length)) for w, u in zip(which, places)]
            for at in range(0, length, tokens):
                rows = [texts[w][i + at : i + at + tokens + 1] for w, i in zip(which, starts)]
                yield torch.stack(rows).long(), at == 0


def cut(rows: Tensor, length: int) -> Tensor:
    """Contexts [n, length] of ``rows`` [R, longest], whose last parts are together the last part of the rows: what
    is judged is the same for every length."""
    longest = rows.shape[1]
    first = longest - longest // JUDGED
    ends = range(first + length // JUDGED, longest + 1, length // JUDGED)
    return torch.cat([rows[:, end - length : end] for end in ends])


def judged(model: HopeForCausalLM, rows: Tensor, length: int, learn: str) -> float | None:
    """Bits per byte of the last part of ``rows``, each byte read in a context of ``length`` without a past; None
    where one diverged."""
    ids = cut(rows, length)
    before = length - length // JUDGED
    values = s.finite(s.from_place(model, ids, before, learn)[0])
    return None if None in values else s.mean(values)
