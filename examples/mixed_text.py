"""Text to train on, from several sources that are drawn from by weight: files, or folders of them.

A source is ``PATH`` or ``PATH=WEIGHT``: a file, of which .gz is unpacked, or a folder, of which every file that is
UTF-8 text is taken, in the order of the names (and of those alone that end in one of ``suffixes``, where these are
given). The last ``share`` of the bytes of each is held out.
"""

from __future__ import annotations

import gzip
import os
from typing import NamedTuple

import torch

LEAST = 4096  # bytes that a source must have


class Source(NamedTuple):
    """data, heldout: bytes as int64. weight: how often it is drawn, relative to the others."""

    name: str
    weight: float
    data: torch.Tensor
    heldout: torch.Tensor


def sources(specs: list[str], share: float, suffixes: tuple[str, ...] = ()) -> list[Source]:
    """Raises SystemExit for a weight that is no positive number, and for a source without text."""
    found = []
    for spec in specs:
        path, _, weight = spec.rpartition("=") if "=" in spec else (spec, "", "1")
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise SystemExit(f"{spec}: the weight is {weight!r}, expected a positive number")
        text = b"".join(_text(p) for p in _files(path, suffixes))
        if len(text) < LEAST:
            raise SystemExit(f"{path}: holds {len(text)} bytes of text, expected at least {LEAST}")
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        kept = len(data) - int(len(data) * share)
        found.append(Source(os.path.basename(os.path.normpath(path)), number, data[:kept], data[kept:]))
    return found


def _files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    found = []
    for folder, inside, names in os.walk(path):
        inside.sort()
        paths = (os.path.join(folder, n) for n in sorted(names) if n.endswith(suffixes or ("",)))
        found += [p for p in paths if os.path.isfile(p) and not os.path.islink(p)]
    return found


def _text(path: str) -> bytes:
    """Nothing where it is no UTF-8."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
        try:
            data = f.read()
            data.decode()
        except (OSError, EOFError, UnicodeDecodeError):
            return b""
    return b"" if b"\0" in data else data


class Streams:
    """Where each batch row stands in which source; a pure function of (seed, steps taken)."""

    def __init__(self, found: list[Source], batch: int, tokens: int, restart: float, seed: int):
        self.data, self.tokens, self.restart, self.seed = [s.data for s in found], tokens, restart, seed
        self.weights = torch.tensor([s.weight for s in found], dtype=torch.float64)
        if min(map(len, self.data)) <= tokens + 1:
            raise SystemExit(f"a source has no more than the {tokens + 1} bytes that a row reads in a step")
        self.at = self._draw(batch, -1)

    def _draw(self, n: int, step: int) -> list[tuple[int, int]]:
        """n places: (source, first byte)."""
        g = torch.Generator().manual_seed(hash((self.seed, step)) & (2**63 - 1))
        which = torch.multinomial(self.weights, n, replacement=True, generator=g).tolist()
        where = torch.rand(n, generator=g, dtype=torch.float64).tolist()
        return [(s, int(u * (len(self.data[s]) - self.tokens - 1))) for s, u in zip(which, where)]

    def next(self, step: int) -> tuple[torch.Tensor, list[bool]]:
        """ids [B, tokens + 1], and which rows start afresh."""
        fresh = self.skip(step)
        ids = [self.data[s][a - self.tokens : a + 1] for s, a in self.at]
        return torch.stack(ids), fresh

    def skip(self, step: int) -> list[bool]:
        """``next`` without its ids."""
        g = torch.Generator().manual_seed(hash((self.seed, step, 1)) & (2**63 - 1))
        coin = torch.rand(len(self.at), generator=g).tolist()
        places, ends = self._draw(len(self.at), step), [len(self.data[s]) for s, _ in self.at]
        fresh = [c < self.restart or a + self.tokens + 1 >= e for c, (_, a), e in zip(coin, self.at, ends)]
        self.at = [p if f else a for p, f, a in zip(places, fresh, self.at)]
        self.at = [(s, a + self.tokens) for s, a in self.at]
        return fresh
