"""The Continuum Memory System, one row and one token at a time, in fp64 NumPy: the definition every backend
is tested against.

    branch_l(x) = w_down sigma(w_up norm(x))  or  w_down (silu(w_gate norm(x)) * (w_up norm(x)))
                  (geglu: gelu for silu; with post_norm: post_gain * that / its RMS)
    MLP_l(x) = x + branch_l(x)
    sequential, nested: y = MLP_K(... MLP_1(x));   independent: y = sum_l softmax(mix)_l MLP_l(x)
    refresh of level l at counts i = 0 mod C^(l):  theta <- theta - lr_l f(sum of dL_t/dtheta [P])

(Nested Learning eq 70-74.) Gradients are written out by hand; nothing here imports torch. Shapes: x, y [d];
up, gate [N, d]; down [d, N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from ...config import CMSConfig

NORM_EPS = 1e-6


def gelu(z):
    """The tanh form, and its derivative."""
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * c * (1 + 3 * 0.044715 * z**2)


def gelu_erf(z):
    """The exact form, z Phi(z), and its derivative."""
    cdf = 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(z / np.sqrt(2)))
    return z * cdf, cdf + z * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)


def silu(z):
    """z sigmoid(z), and its derivative."""
    s = 0.5 * (1 + np.tanh(0.5 * z))
    return z * s, s * (1 + z * (1 - s))


def rms_norm(x, gain, eps):
    """Returns (n, pullback), as ``norm``."""
    r = 1 / np.sqrt(np.mean(x**2) + eps)
    return gain * x * r, lambda dn: r * gain * dn - x * r**3 * np.mean(x * gain * dn)


def norm(x, level, config, eps):
    """Returns (n, pullback): the normalised x, and the map from dL/dn to dL/dx."""
    gain = level["norm_gain"]
    if config.norm == "rmsnorm":
        return rms_norm(x, gain, eps)
    centred = x - np.mean(x)
    r = 1 / np.sqrt(np.mean(centred**2) + eps)
    h = centred * r

    def pullback(dn):
        dh = gain * dn
        return r * (dh - np.mean(dh) - h * np.mean(dh * h))

    return gain * h + level.get("norm_bias", 0.0), pullback


def branch(x, level, config, eps=NORM_EPS):
    """Returns (branch(x), pullback); pullback(dL/dbranch) = (dL/dx, {matrix name: dL/dmatrix})."""
    n, norm_pullback = norm(x, level, config, eps)
    z = level["up"] @ n + level.get("up_bias", 0.0)
    if not config.gated:
        a, slope = (gelu_erf if config.mlp == "gelu_erf" else gelu)(z)
    else:
        sigma = silu if config.mlp == "swiglu" else gelu
        gated, slope = sigma(level["gate"] @ n + level.get("gate_bias", 0.0))
        a = gated * z
    out = level["down"] @ a + level.get("down_bias", 0.0)
    y, post_pullback = rms_norm(out, level["post_gain"], eps) if config.post_norm else (out, lambda error: error)

    def pullback(error):
        error = post_pullback(error)
        h = level["down"].T @ error
        grads = {"down": np.outer(error, a)}
        if not config.gated:
            d_up = slope * h
            dn = level["up"].T @ d_up
        else:
            d_up, d_gate = gated * h, slope * z * h
            grads["gate"] = np.outer(d_gate, n)
            dn = level["up"].T @ d_up + level["gate"].T @ d_gate
        grads["up"] = np.outer(d_up, n)
        return norm_pullback(dn), grads

    return y, pullback


def inputs(x, levels, config: CMSConfig, eps=NORM_EPS):
    """The inputs of every level's matrices for one token: per level {matrix name: [c]}."""
    found = []
    for level in levels:
        n, _ = norm(x, level, config, eps)
        z = level["up"] @ n + level.get("up_bias", 0.0)
        if not config.gated:
            a = (gelu_erf if config.mlp == "gelu_erf" else gelu)(z)[0]
        else:
            sigma = silu if config.mlp == "swiglu" else gelu
            a = sigma(level["gate"] @ n + level.get("gate_bias", 0.0))[0] * z
        found.append({"up": n, "gate": n, "down": a})
        if config.variant != "independent":
            x = x + branch(x, level, config, eps)[0]
    return found


def forward(x, levels, config: CMSConfig, mix=None, eps=NORM_EPS):
    """One token through all levels. Returns (y, pullback); pullback(dL/dy) = (dL/dx, [per level {name:
    dL/dmatrix}])."""
    if config.variant == "independent":
        assert mix is not None
        p = np.exp(mix - np.max(mix))
        p = p / p.sum()
        pairs = [branch(x, level, config, eps) for level in levels]
        y = sum(p_l * (x + out) for p_l, (out, _) in zip(p, pairs))

        def mixed_pullback(error):
            back = [pull(p_l * error) for p_l, (_, pull) in zip(p, pairs)]
            return error + sum(dx for dx, _ in back), [grads for _, grads in back]

        return y, mixed_pullback

    pulls = []
    for level in levels:
        out, pull = branch(x, level, config, eps)
        x = x + out
        pulls.append(pull)

    def pullback(error):
        grads = []
        for pull in reversed(pulls):
            dx, g = pull(error)
            error = error + dx
            grads.insert(0, g)
        return error, grads

    return x, pullback


def newton_schulz(g):
    """Five steps of torch.optim.Muon's quintic, in fp64."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / max(np.sqrt(np.sum(x**2)), 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def signs(rank, width, seed):
    """[rank, width] of +-1 / sqrt(rank): the lowest bit of the hash lowbias32 of row and column."""
    def mix(x):
        x = np.asarray(x, dtype=np.uint32)
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
        return x ^ x >> np.uint32(16)

    row = mix(np.arange(rank, dtype=np.uint32) ^ mix(np.array([0x484F5045 + seed])))
    odd = mix(np.arange(width, dtype=np.uint32) ^ row[:, None]) & 1
    return (1 - 2 * odd.astype(np.float64)) / np.sqrt(rank)


@dataclass
class Row:
    """What one sequence has learned. ``levels`` are its weights now, ``initial`` the shared ones it started
    from."""

    initial: list[dict]
    config: CMSConfig
    mix: np.ndarray | None = None
    eps: float = NORM_EPS
    count: int = 0
    off: bool = False  # the open segment contains a token that was read with learn=False
    refreshed: set = field(default_factory=set)

    def __post_init__(self):
        self.names = ("up", "gate", "down") if self.config.gated else ("up", "down")
        self.levels = [{n: np.array(v, dtype=np.float64) for n, v in level.items()} for level in self.initial]
        # with config.rank: S, and L as it is now; levels = initial + L S
        self.across = [self._directions(l) for l in range(len(self.levels))]
        self.learned = self._zeros()
        self.segment = self._zeros()  # gradients of the open segment
        self.total = self._zeros()  # gradients of finished segments, until their level commits
        self.moment, self.square = self._zeros(), self._zeros()
        # sums of x x^T over the inputs of a matrix: of the open segment, of finished ones, of past steps
        self.segment_gram, self.gram, self.past = self._grams(), self._grams(), self._grams()
        self.tokens = [0] * len(self.levels)  # whose gradients ``total`` sums up
        self.steps = [0] * len(self.levels)  # that ``moment`` and ``square`` are averages over

    def _zeros(self) -> list[dict[str, np.ndarray]]:
        """Of what is learned: every matrix, or its L."""
        rank = self.config.rank
        return [
            {n: np.zeros(level[n].shape if rank is None else (level[n].shape[0], rank)) for n in self.names}
            for level in self.levels
        ]

    def _directions(self, l):
        rank, level = self.config.rank, self.levels[l]
        return {n: signs(rank, level[n].shape[1], 2 * l + (n == "down")) for n in self.names if rank is not None}

    def _thin(self, l, n, g):
        """dL/dW as the gradient of what is learned."""
        return g if self.config.rank is None else g @ self.across[l][n].T

    def _grams(self):
        rank = self.config.rank
        return [
            {n: np.zeros((level[n].shape[1] if rank is None else rank,) * 2) for n in self.names}
            for level in self.levels
        ]

    def read(self, x, error=None, learn=True):
        """One token: x [d] -> y [d], learning from its error dL/dy [d] if ``learn``."""
        y, pullback = forward(x, self.levels, self.config, self.mix, self.eps)
        if learn:
            _, grads = pullback(error)
            given = inputs(x, self.levels, self.config, self.eps)
            for l, g in enumerate(grads):
                for n in self.names:
                    self.segment[l][n] += self._thin(l, n, g[n])
                    x_n = given[l][n] if self.config.rank is None else self.across[l][n] @ given[l][n]
                    self.segment_gram[l][n] += np.outer(x_n, x_n)
        else:
            self.off = True
        self.count += 1
        if self.count % self.config.chunks[0] == 0:
            self._finish_segment()
        return y

    def _finish_segment(self):
        if not self.off:
            for l in range(len(self.levels)):
                self.tokens[l] += self.config.chunks[0]
                for n in self.names:
                    self.total[l][n] += self.segment[l][n]
                    self.gram[l][n] += self.segment_gram[l][n]
            self._commit()
        self.segment, self.segment_gram, self.off = self._zeros(), self._grams(), False

    def _commit(self):
        due = [self.count % c == 0 for c in self.config.chunks]
        for l, rate in enumerate(self.config.learning_rates):
            if due[l] and rate > 0:
                self.steps[l] += 1
                for n in self.names:
                    self._step(l, n, self.config.matrix_rates(l)[n])
                self.tokens[l] = 0
                self.refreshed.add(l)
        if self.config.variant == "nested":
            for l in range(len(due) - 1):
                if due[l + 1] and self.config.learning_rates[l] > 0:
                    for n in self.names:
                        self.levels[l][n] = np.array(self.initial[l][n], dtype=np.float64)
                        for part in (self.learned, self.moment, self.square, self.past):
                            part[l][n] = np.zeros_like(part[l][n])
                    self.steps[l] = 0
                    self.refreshed.discard(l)

    def inverse(self, l, n, past=None):
        """P of matrix n of level l: (I + sum x x^T / (rho C))^-1 over the inputs of its past steps."""
        past = self.past[l][n] if past is None else past
        return np.linalg.inv(np.eye(len(past)) + past / (self.config.precondition * self.config.chunks[l]))

    def _step(self, l, n, rate):
        g, size = self.total[l][n], 1.0
        if self.config.relative:
            size = np.sqrt(np.mean(np.asarray(self.initial[l][n], dtype=np.float64) ** 2))
            if self.config.optimizer in ("gd", "momentum"):
                g = g / max(np.sqrt(np.mean(g**2)), 1e-30)
            elif self.config.optimizer == "muon":
                size = size / 0.2  # of a step's RMS
        rate = rate * size
        if self.config.precondition is not None:
            g = g @ self.inverse(l, n)
            self.past[l][n] = self.past[l][n] + self.gram[l][n]
            self.gram[l][n] = np.zeros_like(self.gram[l][n])
        if self.config.optimizer == "momentum":
            self.moment[l][n] = f = self.config.momentum * self.moment[l][n] + g
        elif self.config.optimizer == "muon":
            f = 0.2 * np.sqrt(max(g.shape)) * newton_schulz(g)
        elif self.config.optimizer == "adam":
            (b1, b2), t, mean = self.config.betas, self.steps[l], g / self.tokens[l]
            self.moment[l][n] = b1 * self.moment[l][n] + (1 - b1) * mean
            self.square[l][n] = b2 * self.square[l][n] + (1 - b2) * mean**2
            f = self.moment[l][n] / (1 - b1**t) / (np.sqrt(self.square[l][n] / (1 - b2**t)) + 1e-8)
        else:
            f = g
        if self.config.rank is None:
            self.levels[l][n] = self.levels[l][n] - rate * f
        else:
            self.learned[l][n] = self.learned[l][n] - rate * f
            self.levels[l][n] = self.initial[l][n] + self.learned[l][n] @ self.across[l][n]
        self.total[l][n] = np.zeros_like(g)


def read(row: Row, x, error, learn):
    """Several tokens: x, error [T, d], learn [T] bool -> y [T, d]; ``row`` advances."""
    outputs = [row.read(x[t], error[t], bool(learn[t])) for t in range(len(x))]
    return np.stack(outputs) if outputs else np.zeros_like(x)
