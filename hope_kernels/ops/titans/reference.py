"""The self-modifying memory as the paper writes it: NumPy, fp64, one token after another. The oracle of every
other backend.

Per row and head, with everything marked 0 taken at the start of the current chunk (Nested Learning eq 86-93):

    k_t = norm(M_k(x_t)),  v_t = M_v(x_t),  o_t = M_memory(q_t)
    eta_t = eta_scale act(M_eta(x_t) + b),  alpha_t = sigmoid(M_alpha(x_t) + b)
    M(z) = z + w1 sigma(w2 z)        (eta, alpha: w_skip z + w1 sigma(w2 z), or no skip)

and when the chunk's last token has been read, for every memory and every token of the chunk in order:

    e_t  = c (M_0(k_t) - target(M_0(v_t)))              objective "dot": e_t = -target
    d_t  = sigma'(w2_0 k_t) * (w1_0^T e_t),  a_t = sigma(w2_0 k_t)
    m_t  = sqrt(|a_t|^2 + |d_t|^2 / (|e_t|^2 + 1e-9) + 1e-12)
    S_t  = c m_t sum_s eta_s m_s (k_t.k_s)^2,           eta~_t = eta_t / max(1, S_t)
    delta2 <- delta2 (alpha_t I - eta_t k_t k_t^T) - eta~_t d_t k_t^T
    delta1 <- alpha_t delta1 - eta~_t e_t a_t^T

A memory is a dict: ``w2`` [N, D], ``w1`` [D_out, N], ``w_skip`` [1, D]; or ``w`` [D_out, D] when linear.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...config import TitansConfig

_erf = np.vectorize(math.erf, otypes=[float])


def sigmoid(z):
    return np.exp(-np.logaddexp(0.0, -z))


def norm(z):
    """z / max(|z|, 1e-6) over the last axis."""
    return z / np.maximum(np.sqrt((z * z).sum(-1, keepdims=True)), 1e-6)


def sigma(z, name: str):
    if name == "silu":
        return z * sigmoid(z)
    if name == "gelu":
        return 0.5 * z * (1 + _erf(z / math.sqrt(2)))
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def sigma_prime(z, name: str):
    if name == "silu":
        return sigmoid(z) * (1 + z * (1 - sigmoid(z)))
    if name == "gelu":
        return 0.5 * (1 + _erf(z / math.sqrt(2))) + z * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)


def evaluate(w: dict, z, scalar: bool, activation: str):
    """M(z) for one vector z [D] -> [D], or [1] for a scalar memory."""
    if "w" in w:
        return w["w"] @ z
    out = w["w1"] @ sigma(w["w2"] @ z, activation)
    if scalar:
        return out + (w["w_skip"] @ z if "w_skip" in w else 0.0)
    return z + out


def plus(base: dict, delta: dict) -> dict:
    return {n: base[n] + delta[n] for n in delta}


@dataclass
class Head:
    """One head of one sequence: deviations and momentum per memory, and the open chunks' tokens of both clocks."""

    delta: dict
    momentum: dict
    memory_tokens: list = field(default_factory=list)  # (k, v, eta, alpha, beta), for M_memory
    other_tokens: list = field(default_factory=list)  # the same, for all other memories


def new_head(config: TitansConfig, w_init: dict) -> Head:
    """w_init: memory name -> dict of initial weights of this head."""
    zero = {m: {n: np.zeros_like(w) for n, w in w_init[m].items()} for m in config.memories}
    start = (
        {m: {n: w.copy() for n, w in w_init[m].items()} for m in config.memories}
        if config.retain_to == "zero" else zero
    )
    return Head(start, copy.deepcopy(zero))


def in_force(config: TitansConfig, w_init: dict, head: Head) -> dict:
    """The weights with which memories are read: w_base + delta."""
    if config.retain_to == "zero":
        return head.delta
    return {m: plus(w_init[m], head.delta[m]) for m in config.memories}


def produce(config: TitansConfig, w: dict, x, eta_bias: float, alpha_bias: float):
    """k, v, eta, alpha, and the adaptive q (else None) of one token from the memories; x [D]."""
    unit = norm if config.qk_l2norm else lambda z: z
    act = config.activation
    k, v = unit(evaluate(w["k"], x, False, act)), evaluate(w["v"], x, False, act)
    eta = gate_eta(config, evaluate(w["eta"], x, True, act)[0] + eta_bias)
    alpha = sigmoid(evaluate(w["alpha"], x, True, act)[0] + alpha_bias) if config.retention else 1.0
    q = unit(evaluate(w["q"], x, False, act)) if config.adaptive_q else None
    return k, v, eta, alpha, q


def gate_eta(config: TitansConfig, z):
    return config.eta_scale * (sigmoid(z) if config.eta_activation == "sigmoid" else np.logaddexp(0.0, z))


def inner_error(config: TitansConfig, w: dict, k, v, scalar: bool):
    """e of one token at weights w."""
    value = evaluate(w, v, scalar, config.activation) if config.own_values or scalar else v
    target = value
    if config.target_norm:
        target = np.clip(value, -1, 1) if scalar else norm(value)
    if config.objective == "dot":
        return -target
    return config.grad_scale * (evaluate(w, k, scalar, config.activation) - target)


def commit(config: TitansConfig, head: Head, w: dict, name: str, tokens: list) -> None:
    """Writes a full chunk into one memory, token by token; w: its weights at the chunk's start."""
    scalar = name in ("eta", "alpha")
    linear = "w" in w
    c = config.grad_scale if config.objective == "l2" else 1.0
    facts = []
    for k, v, *_ in tokens:
        e = inner_error(config, w, k, v, scalar)
        if linear:
            facts.append((e, None, None, math.sqrt(k @ k + 1e-12)))
            continue
        z = w["w2"] @ k
        a, d = sigma(z, config.activation), sigma_prime(z, config.activation) * (w["w1"].T @ e)
        facts.append((e, a, d, math.sqrt(a @ a + (d @ d) / (e @ e + 1e-9) + 1e-12)))
    delta, s = head.delta[name], head.momentum[name]
    for (k, _, eta, alpha, beta), (e, a, d, m) in zip(tokens, facts):
        step = eta
        if config.step_clip:
            S = c * m * sum(t[2] * f[3] * (k @ t[0]) ** 2 for t, f in zip(tokens, facts))
            step = eta / max(1.0, S)
        gradient = (
            {"w": np.outer(e, k)} if linear
            else {"w2": np.outer(d, k), "w1": np.outer(e, a), "w_skip": np.outer(e, k)}
        )
        for n in delta:
            increment = step * gradient[n]
            if config.momentum is not None:
                s[n] = beta * s[n] + increment
                increment = s[n]
            kept = alpha * delta[n]
            if config.dgd and n != "w1":
                kept = kept - eta * np.outer(delta[n] @ k, k)
            delta[n] = kept - increment


def step(config: TitansConfig, w_init: dict, head: Head, pos: int, token: dict, write: bool = True):
    """Reads one token with one head and returns o [D]; ``pos`` tokens were read before it.

    token: ``x`` [D] with eta_bias and alpha_bias (self_modifying), or ``k``, ``v`` [D], ``eta``, ``alpha``;
    ``q`` [D] unless adaptive; ``beta`` with momentum.
    """
    w = in_force(config, w_init, head)
    if config.self_modifying:
        k, v, eta, alpha, q = produce(
            config, w, token["x"], token.get("eta_bias", 0.0), token.get("alpha_bias", 0.0)
        )
    else:
        k, v, eta, alpha, q = token["k"], token["v"], token["eta"], token.get("alpha", 1.0), None
    o = evaluate(w["memory"], token["q"] if q is None else q, False, config.activation)
    if not write:
        return o
    read = (k, v, eta, alpha, token.get("beta"))
    head.memory_tokens.append(read)
    head.other_tokens.append(read)
    if (pos + 1) % config.chunk_memory == 0:
        commit(config, head, w["memory"], "memory", head.memory_tokens)
        head.memory_tokens = []
    if (pos + 1) % config.chunk_other == 0:
        for name in config.memories[1:]:
            commit(config, head, w[name], name, head.other_tokens)
        head.other_tokens = []
    return o


# The whole layer ------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One sequence: its heads, the convolution's last W-1 inputs, and how many tokens it has read."""

    heads: list
    tail: np.ndarray | Any  # None without a convolution
    pos: int = 0


def new_row(config: TitansConfig, params: dict) -> Row:
    W = config.conv_window
    tail = None if W is None else np.zeros((W - 1, config.d_model))
    return Row([new_head(config, head_weights(config, params, h)) for h in range(config.num_heads)], tail)


def head_weights(config: TitansConfig, params: dict, h: int) -> dict:
    """memory name -> its initial weights of head h, from ``params`` entries "w2.k" [H, N, D], "w1.k" [H, D,
    N], "w.k" [H, D, D], ..."""
    return {
        m: {key.split(".")[0]: value[h] for key, value in params.items() if key.endswith("." + m)}
        for m in config.memories
    }


def layer_token(config: TitansConfig, params: dict, row: Row, x, write: bool = True):
    """One token x [d] through the whole layer: y [d]. params: matrices [out, in] by name, see ``layers.titans``.

    write=False leaves memories, open chunks and position as they are; the convolution's window moves on all
    the same.
    """
    H, D = config.num_heads, config.head_dim
    u = x
    if config.conv_window is not None:
        window = np.concatenate([row.tail, x[None]])
        u = (window * params["conv"].T).sum(0)
        row.tail = window[1:]
    if config.uses_in_proj:
        u = params["in_proj"] @ u
    unit = norm if config.qk_l2norm else lambda z: z
    q = None if config.adaptive_q else unit((params["q_proj"] @ u).reshape(H, D))
    if not config.self_modifying:
        k, v = unit((params["k_proj"] @ u).reshape(H, D)), (params["v_proj"] @ u).reshape(H, D)
        eta = gate_eta(config, params["eta_proj"] @ u + params["eta_bias"])
        alpha = sigmoid(params["alpha_proj"] @ u + params["alpha_bias"]) if config.retention else np.ones(H)
    beta = [config.momentum] * H
    if config.momentum == "learned":
        beta = sigmoid(params["beta_proj"] @ u + params["beta_bias"])
    o = np.empty((H, D))
    for h, head in enumerate(row.heads):
        token = {"q": None if q is None else q[h], "beta": beta[h]}
        if config.self_modifying:
            token |= {"x": u.reshape(H, D)[h], "eta_bias": params["eta_bias"][h]}
            token |= {"alpha_bias": params["alpha_bias"][h]} if config.retention else {}
        else:
            token |= {"k": k[h], "v": v[h], "eta": eta[h], "alpha": alpha[h]}
        o[h] = step(config, head_weights(config, params, h), head, row.pos, token, write)
    if write:
        row.pos += 1
    if config.out_norm:
        o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * params["norm_gain"]
    y = o.reshape(-1)
    if config.gate:
        g = params["gate_proj"] @ x
        y = y * g * sigmoid(g)
    return params["out_proj"] @ y if config.out_proj else y


def layer(config: TitansConfig, params: dict, x, rows: list | None = None, lengths=None, update: bool = True):
    """A batch x [B, T, d]: y [B, T, d] (zero where padded) and new rows; the given rows are not modified.

    update=False: a pure read with the memories as they are in ``rows``, which come back unchanged.
    """
    B, T, _ = x.shape
    given = [new_row(config, params) for _ in range(B)] if rows is None else rows
    rows = copy.deepcopy(given)
    y = np.zeros_like(x)
    for b, row in enumerate(rows):
        for t in range(T if lengths is None else lengths[b]):
            y[b, t] = layer_token(config, params, row, x[b, t], update)
    return y, rows if update else given
