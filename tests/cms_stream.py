"""A CMS layer fed in pieces, and what the NumPy token loop makes of the same tokens."""

import itertools
import math

import numpy as np
import torch

from hope_kernels.config import CMSConfig
from hope_kernels.layers.cms import ContinuumMemory
from hope_kernels.ops.cms import reference
from hope_kernels.ops.cms.matrix import Matrix

D = 5


def make(seed=0, dtype=torch.float64, **fields):
    """A layer with every parameter random, so that no gain, bias or mix is at its special initial value."""
    torch.manual_seed(seed)
    layer = ContinuumMemory(CMSConfig(**{"d_model": D, "chunks": (2, 4), "expansion": 1.7, **fields}), dtype=dtype)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.rsplit(".", 1)[-1] not in ("up", "gate", "down"):
                p.add_(0.3 * torch.randn_like(p))
    return layer


def reference_row(layer):
    levels = [{n: p.detach().double().numpy() for n, p in level.items()} for level in layer.levels]
    mix = None if layer.mix is None else layer.mix.detach().double().numpy()
    return reference.Row(levels, layer.config, mix)


class Stream:
    """Feeds rows of x and errors e [B, T, d] to a layer in pieces, and records outputs and which tokens were
    learned."""

    def __init__(self, layer, batch, tokens, seed=0):
        g = torch.Generator().manual_seed(seed)
        dtype = layer.levels[0]["up"].dtype
        self.layer, self.tokens = layer, tokens
        self.x = torch.randn(batch, tokens, D, generator=g, dtype=torch.float64).to(dtype)
        self.e = 0.3 * torch.randn(batch, tokens, D, generator=g, dtype=torch.float64).to(dtype)
        self.y, self.learned = torch.full_like(self.x, math.nan), np.ones((batch, tokens), dtype=bool)
        self.state = layer.init_state(batch)

    def read(self, lengths, learn=True):
        width = max(lengths)
        part = torch.full((len(lengths), width, D), math.nan, dtype=self.x.dtype)
        for b, n in enumerate(lengths):
            part[b, :n] = self.x[b, self.state.pos[b] : self.state.pos[b] + n]
        before = list(self.state.pos)
        y, self.state = self.layer(part, self.state, lengths=lengths, learn=learn)
        for b, n in enumerate(lengths):
            self.y[b, before[b] : before[b] + n] = y[b, :n]
            self.learned[b, before[b] : before[b] + n] = learn
            assert (y[b, n:] == 0).all()

    def deliver(self, lengths):
        s, C1 = self.state, self.layer.config.chunks[0]
        part = torch.full((len(lengths), max(lengths), D), math.nan, dtype=self.x.dtype)
        for b, n in enumerate(lengths):
            if not s.tainted[b] and n:
                start = (s.pos[b] - 1) // C1 * C1 + s.delivered[b]
                part[b, :n] = self.e[b, start : start + n]
        self.state = self.layer.refresh(s, part, lengths=lengths)

    def owed(self):
        return [s - d for s, d in zip(self.state.seen, self.state.delivered)]

    def finish(self, pick):
        """Reads all rows to the end with pick(low, high) choosing lengths, splits and learn flags."""
        while any(p < self.tokens for p in self.state.pos):
            s, C1 = self.state, self.layer.config.chunks[0]
            learn = pick(0, 3) > 0
            lengths = []
            for p, seen, off in zip(s.pos, s.seen, s.tainted):
                room = C1 - p % C1 if learn else self.tokens
                lengths.append(0 if seen == C1 and not off else pick(0, min(room, self.tokens - p)))
            self.read(lengths, learn)
            self.deliver([pick(0, n) for n in self.owed()])
        self.deliver(self.owed())

    def check(self, tol=1e-10):
        for b in range(self.x.shape[0]):
            row = reference_row(self.layer)
            y = reference.read(row, self.x[b].double().numpy(), self.e[b].double().numpy(), self.learned[b])
            np.testing.assert_allclose(self.y[b].double().numpy(), y, rtol=tol, atol=tol)
            levels = self.layer.effective_levels(self.state)
            self.check_preconditioners(b, row, tol)
            for l, name in itertools.product(range(len(levels)), row.names):
                w = Matrix.of(levels[l][name]).detach().dense(self.x.shape[0])
                close = dict(rtol=tol, atol=tol)
                np.testing.assert_allclose(w[b].double().numpy(), row.levels[l][name], **close)
                assert bool(self.state.own[l][b] or self.state.rank[l][b]) == (l in row.refreshed)
                if self.layer.config.learning_rates[l] > 0:
                    s = self.state
                    adam = self.layer.config.optimizer == "adam"
                    assert s.tokens[l][b] == row.tokens[l] and s.steps[l][b] == (row.steps[l] if adam else 0)
                    for held, want in (
                        (s.grads[l], row.total[l]), (s.moments[l], row.moment[l]), (s.squares[l], row.square[l])
                    ):
                        np.testing.assert_allclose(
                            0 * want[name] if held is None else held[name][b].numpy(), want[name], **close
                        )

    def check_preconditioners(self, b, row, tol):
        for l, name in itertools.product(range(len(row.levels)), ("up", "down")):
            for held, past in ((self.state.inverses[l], row.past[l][name]),
                               (self.state.following[l], row.past[l][name] + row.gram[l][name])):
                if held is not None:
                    want = row.inverse(l, name, past)
                    np.testing.assert_allclose(held[name][b].numpy(), want, rtol=tol, atol=tol)
                elif self.layer.config.precondition is not None and self.layer.config.learning_rates[l] > 0:
                    assert not past.any() or self.state.inverses[l] is not None
