"""KeptSegments: segments of its text that a sequence keeps, to learn from them again (``engine/replay.py``).

Of all segments that a sequence has learned it keeps at most k, each with the same probability (Vitter's
algorithm R). Segment number i takes a slot while some are free; then it takes slot j = hash(seed, i) mod (i + 1)
if that is below k. So what is kept depends on the text and the seed, and not on calls or on other rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .check import check_counters, check_part
from .config import HopeConfig
from .state import Counters, State


@dataclass(eq=False)
class KeptSegments(State):
    """The segments that B sequences keep, at most k each. ``pos[b]`` counts those that row b has learned.

    ids      [B, k, C + 1] int64: a segment's n tokens, n <= C, and the token after them; -1 behind that
    numbers  [B, k] int64: which of the row's segments a slot holds, counted from 0; -1: none
    nats     [B, k, C] fp32 (fp64 beside fp64): what the token after each one costs the model's own weights; -1
             where nobody has asked yet (``engine/surprise.py``)
    done     per row: replays of a sleep that has not come to its end
    seed     of what is kept
    """

    ids: Tensor
    numbers: Tensor
    done: Counters
    seed: int = 0
    nats: Tensor = None  # type: ignore[assignment]  # from a file written before they were kept: unknown

    _checked = None  # tensors whose values have been looked at, and their versions

    def __post_init__(self) -> None:
        if self.nats is None and isinstance(self.ids, Tensor):
            self.nats = torch.full_like(self.ids[..., 1:], -1, dtype=torch.float32)

    @property
    def slots(self) -> int:
        return self.ids.shape[1]

    def text(self, row: int, slot: int) -> Tensor:
        """The tokens of a slot and the one after them, [n + 1]; of a free one, none."""
        ids = self.ids[row, slot]
        return ids[ids >= 0]

    def held(self) -> list[int]:
        """Segments that each row keeps."""
        return [min(n, self.slots) for n in self.pos]

    def input_dtype(self) -> torch.dtype | None:
        return None

    def _check(self, where: str, dtype: torch.dtype | None, device: torch.device, values: bool) -> None:
        c, k = self.config, self.numbers.shape[-1] if isinstance(self.numbers, Tensor) and self.numbers.dim() else 0
        if not isinstance(c, HopeConfig) or not c.segment or not k:
            raise ValueError(f"{where}: state.numbers has no slots, or its model no segments")
        check_part(where, "ids", self.ids, (self.batch, k, c.segment + 1), torch.int64, device)
        check_part(where, "numbers", self.numbers, (self.batch, k), torch.int64, device)
        check_part(where, "nats", self.nats, (self.batch, k, c.segment), None, device)
        if type(self.seed) is not int:
            raise ValueError(f"{where}: state.seed is {self.seed!r}, expected an integer")
        if torch.compiler.is_compiling():
            return
        check_counters(where, "pos", self.pos, self.batch, 0)
        check_counters(where, "done", self.done, self.batch, 0)
        frozen = self.ids.is_inference() or self.numbers.is_inference()
        held = () if frozen else ((id(t), t._version) for t in (self.ids, self.numbers))
        mark = None if frozen else (*held, *self.pos)
        if values and (mark is None or mark != self._checked):
            self._check_values(where)
            self._checked = mark

    def _check_values(self, where: str) -> None:
        there, numbers = self.ids >= 0, self.numbers
        tokens = there.sum(-1)
        count = torch.tensor(self.pos, dtype=torch.long, device=numbers.device).unsqueeze(1)
        fits = (self.ids >= -1).all(-1) & (self.ids < self.config.vocab_size).all(-1)
        fits &= (there[..., :-1] | ~there[..., 1:]).all(-1)
        fits &= torch.where(numbers >= 0, (tokens > 1) & (numbers < count), (tokens == 0) & (numbers == -1))
        filled = (numbers >= 0).sum(1).tolist()
        if not bool(fits.all()) or filled != self.held():
            raise ValueError(f"{where}: state.ids and state.numbers do not hold segments that were read")


def nothing_kept(config: HopeConfig, batch: int, slots: int, seed: int, device: torch.device) -> KeptSegments:
    """Of sequences that have learned nothing yet."""
    ids = torch.full((batch, slots, config.segment + 1), -1, dtype=torch.long, device=device)
    return KeptSegments(Counters([0] * batch), config, ids, ids[:, :, 0].clone(), Counters([0] * batch), seed)


def offer(kept: KeptSegments, rows: list[int], ids: Tensor, targets: Tensor, lengths: list[int]) -> KeptSegments:
    """``kept`` after ``rows`` of the batch have learned a segment of ``lengths`` tokens each: ids, targets
    [len(rows), n], the tokens and those that follow them. A sleep that has not ended is over. ``kept`` stays as
    it is."""
    pos, done, taken = Counters(kept.pos), Counters(kept.done), []
    for i, b in enumerate(rows):
        slot = pos[b] if pos[b] < kept.slots else hashed(kept.seed, pos[b]) % (pos[b] + 1)
        if slot < kept.slots:
            taken.append((i, b, slot, pos[b]))
        pos[b], done[b] = pos[b] + 1, 0
    if not taken:
        return replace(kept, pos=pos, done=done)
    n, width = ids.shape[1], kept.ids.shape[2]
    which, row, slot, number = torch.tensor(taken, dtype=torch.long, device=ids.device).unbind(1)
    last = torch.tensor([lengths[i] for i, *_ in taken], dtype=torch.long, device=ids.device).unsqueeze(1)
    text = ids.new_full((len(taken), width), -1)
    text[:, :n] = ids[which]
    text.scatter_(1, last, targets[which].gather(1, last - 1))
    text[torch.arange(width, device=ids.device) > last] = -1
    return replace(
        kept, pos=pos, done=done, ids=kept.ids.index_put((row, slot), text),
        numbers=kept.numbers.index_put((row, slot), number),
        nats=kept.nats.index_put((row, slot), kept.nats.new_full((), -1.0)),
    )


def hashed(*numbers: int) -> int:
    """64 bits that depend on nothing but these integers, of any size and sign."""
    text = " ".join(f"{n:x}" for n in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
