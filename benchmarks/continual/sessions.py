"""Sessions that read one text after another, by a rule: plainly, with a replay after each text, pulled back to what
they were (EWC), or learning only what surprises."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from benchmarks import studies as s
from benchmarks.continual import ewc
from benchmarks.continual.reading import forgotten, segments
from hope_kernels import HopeForCausalLM


class Session:
    """Learns texts, [rows, T] each, in turn. ``forked`` goes on apart from it."""

    def __init__(self, model: HopeForCausalLM, rows: int):
        self.model, self.state = model, model.init_state(rows)

    def forked(self):
        other = copy.copy(self)
        other.state = self.state.clone()
        return other

    @torch.no_grad()
    def learn(self, ids: Tensor) -> list[float]:
        """Reads and learns a text to its end: bits per token of each row, as it was read."""
        found, reading = s.bits(self.model, ids, "next_token", self.state, guard=False)  # no rule has it
        self.state = reading.state
        self.model.flush(self.state)
        return found

    def measured(self, ids: Tensor) -> list[float | None]:
        """Bits per token of a pure read with the learned CMS alone, from empty memories."""
        return s.finite(s.bits(self.model, ids, "off", forgotten(self.state, self.model))[0])


class Replaying(Session):
    """Keeps ``kept`` segments of all it has learned, and learns them again, whole, after every text."""

    def __init__(self, model: HopeForCausalLM, rows: int, kept: int = 64):
        super().__init__(model, rows)
        self.kept = kept

    @torch.no_grad()
    def learn(self, ids: Tensor) -> list[float]:
        found, reading = s.bits(self.model, ids, "next_token", self.state, guard=False, replay=self.kept)
        self.state = reading.state
        self.model.flush(self.state)
        self.model.replay(self.state, part=0, dreams=0, known=1.0, fade=False)
        return found


class Pulled(Session):
    """EWC: from the second text on, every segment ends with a pull to the weights before this text."""

    def __init__(self, model: HopeForCausalLM, rows: int, strength: float = 0.01):
        super().__init__(model, rows)
        self.strength, self.anchor, self.fisher = strength, None, None

    @torch.no_grad()
    def learn(self, ids: Tensor) -> list[float]:
        nats = torch.zeros(len(ids), dtype=torch.float64)
        for losses in segments(self.model, self.state, ids):
            nats += losses.double().sum(1)
            if self.anchor is not None:
                ewc.pull_(self.state, self.anchor, self.fisher, self.strength)
        new = ewc.fisher(self.model, self.state, ids)
        self.fisher = new if self.fisher is None else ewc.added(self.fisher, new)
        self.anchor = ewc.weights(self.state, copied=True)
        return (nats / math.log(2) / (ids.shape[1] - 1)).tolist()


class Gated(Session):
    """Learns a segment only where its loss is above the running ``quantile`` of the ``window`` segments before it."""

    def __init__(self, model: HopeForCausalLM, rows: int, quantile: float = 0.5, window: int = 64):
        super().__init__(model, rows)
        self.quantile, self.window = quantile, window
        self.seen: list[list[float]] = [[] for _ in range(rows)]

    def forked(self):
        other = super().forked()
        other.seen = [list(row) for row in self.seen]
        return other

    @torch.no_grad()
    def learn(self, ids: Tensor) -> list[float]:
        C, nats, last = self.model.segment, torch.zeros(len(ids), dtype=torch.float64), None
        for part in ids.split(C, 1):
            found, self.state = self.model(
                part, self.state, learn="next_token", output="losses", check_finite=False
            )
            if last is not None:
                nats += torch.nn.functional.cross_entropy(last, part[:, 0], reduction="none").double()
            nats, last = nats + found.nats[:, :-1].double().sum(1), found.last
            for b, mean in enumerate(found.nats[:, :-1].mean(1).tolist()):
                if not self.surprises(b, mean):
                    self.state.seen[b] = 0  # the open segment is dropped before it is learned
        self.model.flush(self.state)
        return (nats / math.log(2) / (ids.shape[1] - 1)).tolist()

    def surprises(self, row: int, loss: float) -> bool:
        """Whether ``loss`` is above the quantile of those before it, which it joins."""
        before = self.seen[row][-self.window :]
        self.seen[row] = [*before, loss]
        return not before or loss > float(torch.tensor(before).quantile(self.quantile))


HOW = {"plain": Session, "replay": Replaying, "ewc": Pulled, "gated": Gated}
