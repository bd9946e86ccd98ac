"""A bank of deltas: what a stream of text teaches, kept apart text by text, so that a later one overlays nothing.

The stream is read in blocks of a few segments. Before a block is learned it is read without learning by every member
(what some text has taught: the learned part of all CMS levels) and by the model's own weights:

    one member reads it best, and not much worse than what it has learned from    that member goes on
    none does                                                                     a new member starts, as a copy of
                                                                                  whoever reads the block best

"Not much worse" than in the member's running means: a loss higher by at most MARGIN, or ERRORS standard errors of the
block's mean; and at least half of what it usually gains on the model's own weights, within ERRORS standard errors of
the difference: another text may well be as easy as the member's own was hard, but the gain is gone.

The present member is left for another only where their difference, token by token, has more than ERRORS standard
errors. A member that is left stays as it was; but where its last block was half as much worse already, as it was
before that block, in which the other text may have begun.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import studies as s
from benchmarks.continual.reading import forgotten
from hope_kernels import HopeForCausalLM
from hope_kernels.model_state import ModelState
from hope_kernels.state import Counters

MARGIN, ERRORS = 0.35, 2.5  # nats per token; standard errors
FALL, RISE = 0.5, 0.2  # of a block that is better, or worse, than the running mean: what is new is learned fast
BLOCK = 8  # segments
OWN = -1  # the model's own weights, among members


@dataclass
class Member:
    """``kept``: a fresh sequence that has learned what this has. mean: of its blocks' losses before each was learned,
    nats per token; gain: of how much lower that is than with the model's own weights; last: the block of the stream
    that it learned last."""

    kept: ModelState
    mean: float = math.inf
    last: int = -1
    gain: float = 0.0

    def excess(self, losses: Tensor, own: Tensor) -> float:
        """How much worse than its own text a block with ``losses`` [n] is, in units of what is much worse. own: the
        losses with the model's own weights."""
        level = (float(losses.mean()) - self.mean) / max(MARGIN, ERRORS * _error(losses))
        missing = self.gain / 2 - float((own - losses).mean())
        return max(level, missing / max(ERRORS * _error(own - losses), 1e-6))

    def count(self, losses: Tensor, own: Tensor, block: int) -> None:
        loss, gain = float(losses.mean()), float((own - losses).mean())
        share = FALL if loss < self.mean else RISE
        self.mean = loss if math.isinf(self.mean) else self.mean + share * (loss - self.mean)
        self.gain += (FALL if gain > self.gain else RISE) * (gain - self.gain)
        self.last = block


class Bank:
    """Learns one stream of text in at most ``limit`` members, of which a new one replaces the one that was used least
    recently; ``block``: segments."""

    def __init__(self, model: HopeForCausalLM, limit: int = 8, block: int = BLOCK):
        assert limit > 1, "one member keeps nothing apart"
        self.model, self.limit, self.block = model, limit, block
        self.members: list[Member] = []
        self.current, self.blocks = OWN, 0
        self.state = model.init_state(1)  # of the stream, with what the current member has learned

    def learn(self, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Reads and learns ids [1, T], whole blocks of it: of each the member that has learned it, and the losses it
        had before that."""
        for part in ids.split(self.block * self.model.segment, 1):
            if part.shape[1] == self.block * self.model.segment:
                losses = self._learn(part)
                yield self.current, losses

    @torch.no_grad()
    def _learn(self, ids: Tensor) -> Tensor:
        states = {OWN: self._with(self.model.init_state(1))}
        states |= {m: self.state if m == self.current else self._with(of.kept) for m, of in enumerate(self.members)}
        losses = {m: self.model(ids, at.clone(), output="losses")[0].nats[0, :-1] for m, at in states.items()}
        origin, chosen = self.chosen(losses)
        state = states[origin].clone()
        before = forgotten(state, self.model)
        self.model(ids, state, learn="next_token", output="losses", guard=False)
        self.model.flush(state)
        if chosen == len(self.members):
            self.members.append(Member(before))
        elif chosen != origin:
            self.members[chosen] = Member(before)
        member = self.members[chosen]
        member.kept = before if member.excess(losses[origin], losses[OWN]) > 0.5 else forgotten(state, self.model)
        member.count(losses[origin], losses[OWN], self.blocks)
        self.state, self.current, self.blocks = state, chosen, self.blocks + 1
        return losses[origin]

    def chosen(self, losses: dict[int, Tensor]) -> tuple[int, int]:
        """Of whom to go on, and as which member: another number than the first one starts a new member there."""
        means = {m: float(of.mean()) for m, of in losses.items()}
        means = {m: mean if math.isfinite(mean) else math.inf for m, mean in means.items()}
        best, now = min(means, key=means.__getitem__), self.current
        if now != OWN and best != now and math.isfinite(means[now]):
            d = losses[now] - losses[best]
            if float(d.mean()) <= ERRORS * _error(d):
                best = now
        if best != OWN and self.members[best].excess(losses[best], losses[OWN]) <= 1:
            return best, best
        if len(self.members) < self.limit:
            return best, len(self.members)
        return best, min((m for m in range(self.limit) if m != now), key=lambda m: self.members[m].last)

    def _with(self, learned: ModelState) -> ModelState:
        """The stream where it stands, with what ``learned`` has learned."""
        pos = list(self.state.pos)
        cms = [None if c is None else replace(c, pos=Counters(pos)) for c in learned.clone().cms]
        return replace(self.state.clone(), cms=cms)


def _error(losses: Tensor) -> float:
    """The standard error of the mean."""
    return float(losses.double().std()) / math.sqrt(len(losses))


def case(model: HopeForCausalLM, texts: dict[str, Tensor], row: int) -> dict:
    """The first halves of all texts in turn, then the second ones: {"members": {text: of its blocks}, "again": the
    same of second halves, "learned", "kept": {text: bits of the last half of what was read, when it had been read and
    when it comes back}, "online": {text: bits of the second halves as they were read}}."""
    bank = Bank(model)
    n = next(iter(texts.values())).shape[1] // 2
    found: dict[str, dict] = {"members": {}, "again": {}, "learned": {}, "kept": {}, "online": {}}
    home: dict[str, int] = {}

    def measured(name: str) -> float | None:
        own = home[name]
        state = bank.members[own].kept if own != bank.current else bank.state
        tested = texts[name][row : row + 1, n // 2 : n]
        return s.finite(s.bits(model, tested, "off", forgotten(state, model))[0])[0]

    for name, ids in texts.items():
        found["members"][name] = [m for m, _ in bank.learn(ids[row : row + 1, :n])]
        home[name] = bank.current
        found["learned"][name] = measured(name)
    for name, ids in texts.items():
        found["kept"][name] = measured(name)
        again = list(bank.learn(ids[row : row + 1, n:]))
        found["again"][name] = [m for m, _ in again]
        found["online"][name] = float(torch.cat([of for _, of in again]).mean()) / math.log(2)
    return found


def run(study: s.Study, model: HopeForCausalLM, texts: dict[str, Tensor]) -> None:
    for row in range(len(next(iter(texts.values())))):
        key = f"bank, excerpt {row + 1}"
        if key not in study.cases:
            study.put(key, {"part": "bank", "row": row} | case(model, texts, row))
            print(key, study.cases[key], flush=True)


def table(data: dict) -> str:
    """Markdown: whether every text is kept, and found again."""
    records = [r for r in data["cases"].values() if r.get("part") == "bank"]
    if not records:
        return "no bank yet"
    lines = ["| text | bits when it was read | when it comes back | forgotten, at most | blocks that found their "
             "member | members |", "|---|---|---|---|---|---|"]
    for name in records[0]["learned"]:
        learned, kept = ([r[of][name] for r in records] for of in ("learned", "kept"))
        lost = [math.inf if None in (a, b) else b - a for a, b in zip(learned, kept)]
        again = [m in set(r["members"][name]) for r in records for m in r["again"][name]]
        used = [len({*r["members"][name], *r["again"][name]}) for r in records]
        lines.append(f"| {name} | {s.mean(learned):.3f} | {s.mean(kept):.3f} | {max(lost):.3f} "
                     f"| {sum(again)} of {len(again)} | {sum(used) / len(used):.1f} |")
    return "\n".join(lines)
