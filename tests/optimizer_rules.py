"""The optimizers' rules as the paper has them: NumPy, fp64, one matrix and one gradient after another."""

import numpy as np

NS = (3.4445, -4.7750, 2.0315)


def newton_schulz(g):
    x = g / max(np.linalg.norm(g), 1e-7)
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(5):
        s = x @ x.T
        x = NS[0] * x + (NS[1] * s + NS[2] * s @ s) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def m3_paper(w, gradient, steps, lr, betas, alpha, f, eps):
    """Algorithm 1: a round k opens with the sum of the f gradients of the round before."""
    b1, b2, b3 = betas
    m1, m2, v, old = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w), []
    for t in range(steps):
        if t % f == 0:
            m2 = m2 + b3 * sum(old[-f:], np.zeros_like(w))
            o2 = newton_schulz(m2)
        g = gradient(w, t)
        old.append(g)
        m1, v = m1 + b1 * g, v + b2 * g**2
        w = w - lr * (newton_schulz(m1) + alpha * o2) / np.sqrt(v + eps)
    return w


def m3_ema(w, gradient, steps, lr, betas, alpha, f, nesterov=True, weight_decay=0.0):
    b1, _, b3 = betas
    m1, m2, old = np.zeros_like(w), np.zeros_like(w), []
    rate = lr * np.sqrt(max(1, w.shape[0] / w.shape[1]))
    for t in range(steps):
        if t % f == 0:
            m2 = m2 if t == 0 else b3 * m2 + (1 - b3) * sum(old[-f:]) / f
            o2 = newton_schulz(m2)
        g = gradient(w, t)
        old.append(g)
        m1 = b1 * m1 + (1 - b1) * g
        o1 = newton_schulz((1 - b1) * g + b1 * m1 if nesterov else m1)
        w = (1 - lr * weight_decay) * w - rate * (o1 + alpha * o2)
    return w


def delta_momentum(w, gradient, steps, lr, a, b):
    """Eq 48 and 49: every element of the erased part as the sum it is."""
    m = np.zeros_like(w)
    r, c = w.shape
    for t in range(steps):
        g = gradient(w, t)
        u = g / np.sqrt((g**2).sum())
        erased = np.zeros_like(m)
        for i in range(r):
            for k in range(r):
                along = sum(m[i, j] * u[k, j] for j in range(c))  # (m uᵀ)[i, k], over the inputs
                erased[i] += along * u[k]
        m = a * m - b * erased + (1 - a) * g
        w = w - lr * m
    return w


def dgd(w, gradient, inputs, lr, erase, mean):
    """Eq 57 for n inputs: one decay after another, then the gradient. inputs[t]: [n, c]."""
    for t, xs in enumerate(inputs):
        g, n = gradient(w, t), len(xs) if mean else 1
        rates = []
        for x in xs:
            eta = lr / n
            rates.append(eta / (1 + eta * x @ x))
            w = w @ (np.eye(len(x)) - erase * rates[-1] * np.outer(x, x))
        w = w - n * np.mean(rates) * g
    return w
