"""Formal languages: at every place of a word, which symbols may follow, and may the word end here?

Answering that at every place is recognising the language (Bhattamishra et al. 2020, "On the Ability and
Limitations of Transformers to Recognize Formal Languages", whose choice of languages this is). Regular:
parity, (aa)* and (abab)*; counters: a^n b^n, a^n b^n c^n, and Shuffle-2, two kinds of brackets that are
balanced each for itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

BEGIN, END, FIRST = 0, 1, 2  # token ids: before a word; never read, only legal or not; the first symbol


class Words(NamedTuple):
    ids: Tensor  # [B, T + 1] int64: BEGIN and a word's symbols
    legal: Tensor  # [B, T + 1, vocabulary] 0 or 1: what may follow
    counted: Tensor  # [B, T + 1] bool: False beyond a word's end


class Language(ABC):
    """``words`` draws words, or prefixes of them, of ``shortest`` to ``longest`` symbols, T = longest."""

    def __init__(self, name: str, symbols: int):
        self.name, self.vocabulary = name, FIRST + symbols

    def words(self, rows: int, shortest: int, longest: int, g: torch.Generator) -> Words:
        symbols, lengths = self.draw(rows, shortest, longest, g)
        ids = torch.cat([torch.full((rows, 1), BEGIN), FIRST + symbols], 1)
        legal = torch.zeros(rows, longest + 1, self.vocabulary)
        may, end = self.follow(symbols)
        legal[..., FIRST:], legal[..., END] = may, end
        return Words(ids, legal, torch.arange(longest + 1) <= lengths[:, None])

    @abstractmethod
    def draw(self, rows: int, shortest: int, longest: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Symbols [rows, longest], lengths [rows]."""

    @abstractmethod
    def follow(self, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """After none, one, ... all of the symbols: who may follow [rows, T + 1, symbols], may it end [rows, T + 1]."""


def lengths(rows: int, shortest: int, longest: int, g: torch.Generator) -> Tensor:
    return torch.randint(shortest, longest + 1, (rows,), generator=g)


def counts(symbols: Tensor, kind: int) -> Tensor:
    """[rows, T + 1]: how many of a kind stand before each place."""
    return torch.nn.functional.pad((symbols == kind).cumsum(1), (1, 0))


class Parity(Language):
    """Bits with an even number of ones."""

    def draw(self, rows, shortest, longest, g):
        return torch.randint(0, 2, (rows, longest), generator=g), lengths(rows, shortest, longest, g)

    def follow(self, symbols):
        even = counts(symbols, 1) % 2 == 0
        return torch.ones(*even.shape, 2), even


class Cycle(Language):
    """(w)*: one word, again and again."""

    def __init__(self, name: str, word: tuple[int, ...]):
        super().__init__(name, max(word) + 1)
        self.word = torch.tensor(word)

    def draw(self, rows, shortest, longest, g):
        symbols = self.word[torch.arange(longest) % len(self.word)].expand(rows, -1)
        return symbols, lengths(rows, shortest, longest, g)

    def follow(self, symbols):
        place = torch.arange(symbols.shape[1] + 1) % len(self.word)
        may = torch.nn.functional.one_hot(self.word[place], self.vocabulary - FIRST)
        return may.expand(len(symbols), -1, -1), (place == 0).expand(len(symbols), -1)


class Runs(Language):
    """a^n b^n, a^n b^n c^n, ...: ``kinds`` runs of equal length n >= 1."""

    def __init__(self, name: str, kinds: int):
        super().__init__(name, kinds)
        self.kinds = kinds

    def draw(self, rows, shortest, longest, g):
        n = torch.randint(max(1, -(-shortest // self.kinds)), longest // self.kinds + 1, (rows,), generator=g)
        symbols = (torch.arange(longest) // n[:, None]).clamp_(max=self.kinds - 1)
        return symbols, self.kinds * n

    def follow(self, symbols):
        seen = torch.stack([counts(symbols, kind) for kind in range(self.kinds)], -1)
        n, last = seen[..., 0], seen[..., 1] > 0
        may = torch.zeros(*n.shape, self.kinds)
        may[..., 0] = ~last
        may[..., 1] = ((n > 0) & (seen[..., 1] < n))
        for kind in range(2, self.kinds):
            may[..., kind] = (n > 0) & (seen[..., kind - 1] == n) & (seen[..., kind] < n)
        return may, (n > 0) & (seen[..., -1] == n)


class Shuffle(Language):
    """Two kinds of brackets: symbols 0 and 1 open, 2 and 3 close. A walk that closes what is open half of the time."""

    def draw(self, rows, shortest, longest, g):
        depth, symbols = torch.zeros(rows, 2, dtype=torch.long), []
        row = torch.arange(rows)
        for coin in torch.rand(longest, 2, rows, generator=g):
            kind = (coin[0] < 0.5).long()
            close = (coin[1] < 0.5) & (depth[row, kind] > 0)
            depth[row, kind] += 1 - 2 * close.long()
            symbols.append(kind + 2 * close.long())
        return torch.stack(symbols, 1), lengths(rows, shortest, longest, g)

    def follow(self, symbols):
        depth = torch.stack([counts(symbols, kind) - counts(symbols, kind + 2) for kind in (0, 1)], -1)
        return torch.cat([torch.ones(depth.shape), depth > 0], -1), (depth == 0).all(-1)


LANGUAGES = {language.name: language for language in (
    Parity("parity", 2), Cycle("(aa)*", (0, 0)), Cycle("(abab)*", (0, 1, 0, 1)), Runs("a^n b^n", 2),
    Runs("a^n b^n c^n", 3), Shuffle("shuffle-2", 4),
)}
