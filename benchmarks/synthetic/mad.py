"""Six small tasks for what a sequence model is made of: compression, recall (plain, among noise, of keys and values
of several tokens), selective copying, memorisation.

After the suite of "Mechanistic design and scaling of hybrid architectures" (Poli et al. 2024, section 3), at a size
that one core trains in half a minute. Every answer follows from the sequence, but in memorisation, whose facts are
the same in all sequences and have to go into the weights. An answer is one of CHOICES tokens, drawn evenly, so that
chance is 1 / CHOICES everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHOICES = 16
SYMBOLS = 8  # of a sequence to compress or to copy
KEY, NOISE, BLANK, MARK = 16, 32, 48, 49  # ids: values are 0 to 15, keys from KEY, noise from NOISE
VOCABULARY = SYMBOLS * CHOICES
KEYS, PAIRS, NOISY = 8, 24, 0.4  # keys and pairs of a sequence; share of pairs that are noise
MOTIFS, LONGEST = 5, 3  # fuzzy pairs of a sequence; tokens of a key, and of a value, at most
HAY = 40  # tokens that the symbols to copy stand among
FACTS = torch.randint(0, CHOICES, (CHOICES, CHOICES), generator=torch.Generator().manual_seed(20240326))
NONE = -100  # no answer


class Sample(NamedTuple):
    ids: Tensor  # [B, T] int64
    at: Tensor  # [B, A] int64: the place whose logits answer
    answers: Tensor  # [B, A] int64: among the ids from CHOICES * (answer // CHOICES); NONE where nothing is asked


def score(logits: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """(mean loss of the answers in nats, share of them that are right) for logits [B, T, VOCABULARY]."""
    said = logits.gather(1, sample.at[..., None].expand(-1, -1, VOCABULARY)).unflatten(-1, (SYMBOLS, CHOICES))
    asked = sample.answers != NONE
    group = sample.answers.clamp(min=0) // CHOICES
    said = said.gather(2, group[..., None, None].expand(-1, -1, 1, CHOICES))[:, :, 0][asked]
    right = sample.answers[asked] % CHOICES
    return F.cross_entropy(said, right), (said.argmax(-1) == right).float().mean()


def draw(high: int, *shape: int, g: torch.Generator) -> Tensor:
    return torch.randint(0, high, shape, generator=g)


def compression(rows: int, g: torch.Generator) -> Sample:
    """SYMBOLS values and a mark, whose logits have to say all of them: those of symbol i are group i."""
    values = draw(CHOICES, rows, SYMBOLS, g=g)
    ids = torch.cat([values, torch.full((rows, 1), MARK)], 1)
    return Sample(ids, torch.full((rows, SYMBOLS), SYMBOLS), CHOICES * torch.arange(SYMBOLS) + values)


def recall(rows: int, g: torch.Generator, noisy: float = 0.0) -> Sample:
    """Pairs (key, value); a key has one value in a sequence, and is asked for it wherever it was told before."""
    pairs = torch.arange(PAIRS)
    keys = draw(KEYS, rows, PAIRS, g=g)
    values = draw(CHOICES, rows, KEYS, g=g).gather(1, keys)
    told = torch.rand(rows, PAIRS, generator=g) >= noisy
    earlier = (keys[:, :, None] == keys[:, None]) & told[:, None] & (pairs < pairs[:, None])
    ids = torch.stack([KEY + keys, values], -1)
    ids = torch.where(told[..., None], ids, NOISE + draw(CHOICES, rows, PAIRS, 2, g=g)).flatten(1)
    answers = torch.where(told & earlier.any(-1), values, NONE)
    return Sample(ids, (2 * pairs).expand(rows, -1), answers)


def noisy_recall(rows: int, g: torch.Generator) -> Sample:
    """The same, with NOISY of the pairs replaced by two tokens that mean nothing."""
    return recall(rows, g, NOISY)


def motifs(first: int, g: torch.Generator) -> list[list[int]]:
    """MOTIFS different runs of 1 to LONGEST tokens from ``first`` on."""
    found: list[list[int]] = []
    while len(found) < MOTIFS:
        run = [first + token for token in draw(CHOICES, 1 + int(draw(LONGEST, 1, g=g)), g=g).tolist()]
        found += [run] if run not in found else []
    return found


def fuzzy_recall(rows: int, g: torch.Generator) -> Sample:
    """Keys and values of 1 to LONGEST tokens, each pair told once, and all asked for in another order; a key ends
    where its value begins. Every token of a value is asked for."""
    T = 2 * MOTIFS * 2 * LONGEST
    ids, answers = torch.full((rows, T), BLANK), torch.full((rows, T), NONE)
    for row in range(rows):
        pairs = list(zip(motifs(KEY, g), motifs(0, g)))
        asked = [pairs[i] for i in torch.randperm(MOTIFS, generator=g).tolist()]
        line, said = [], []
        for key, value in pairs + asked:
            line += key + value
            said += [NONE] * (len(key) - 1) + value + [NONE]
        told = sum(len(key) + len(value) for key, value in pairs)
        said[:told] = [NONE] * told
        ids[row, T - len(line) :], answers[row, T - len(line) :] = torch.tensor(line), torch.tensor(said)
    return Sample(ids, torch.arange(T).expand(rows, -1), answers)


def selective_copying(rows: int, g: torch.Generator) -> Sample:
    """SYMBOLS values somewhere among blanks, then as many marks: the i-th mark asks for the i-th value."""
    values = draw(CHOICES, rows, SYMBOLS, g=g)
    places = torch.rand(rows, HAY, generator=g).argsort(1)[:, :SYMBOLS].sort(1).values
    hay = torch.full((rows, HAY), BLANK).scatter_(1, places, values)
    ids = torch.cat([hay, torch.full((rows, SYMBOLS), MARK)], 1)
    return Sample(ids, HAY + torch.arange(SYMBOLS).expand(rows, -1), values)


def memorisation(rows: int, g: torch.Generator) -> Sample:
    """Two tokens of a key and a mark, which asks for the value that FACTS gives them, in this and every sequence."""
    keys = draw(CHOICES, rows, SYMBOLS, 2, g=g)
    ids = torch.cat([KEY + keys, torch.full((rows, SYMBOLS, 1), MARK)], -1).flatten(1)
    return Sample(ids, (3 * torch.arange(SYMBOLS) + 2).expand(rows, -1), FACTS[keys[..., 0], keys[..., 1]])


TASKS: dict[str, Callable[[int, torch.Generator], Sample]] = {
    "compression": compression, "in-context recall": recall, "noisy recall": noisy_recall,
    "fuzzy recall": fuzzy_recall, "selective copying": selective_copying, "memorisation": memorisation,
}
