"""backend="reference": the NumPy token loop behind the operator's interface. Slow, fp64, no gradient: for
checking, not for work."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference
from .state import FastWeights, Layout, TitansState


def _array(t: Tensor | None) -> np.ndarray | Any:
    return None if t is None else t.detach().double().cpu().numpy()


def titans_reference(config, w_init, inputs, state, lengths, *, update=True, constant_memory=False, stats=None):
    """As ``titans_chunk``. Raises ValueError when a gradient is wanted."""
    wants_graph = any(t is not None and t.requires_grad for t in (*w_init, *inputs))
    if torch.is_grad_enabled() and wants_graph and not constant_memory:
        raise ValueError("titans: backend 'reference' has no gradient; call it under torch.no_grad()")
    first = inputs.x if inputs.x is not None else inputs.k
    B, T, H, D = first.shape
    layout = Layout.of(config)
    per_token = {n: _array(getattr(inputs, n)) for n in ("x", "q", "k", "v", "eta", "alpha", "beta")}
    biases = {n: _array(getattr(inputs, n)) for n in ("eta_bias", "alpha_bias")}
    o = np.zeros((B, T, H, D))
    rows = []
    for b in range(B):
        heads = [_head(config, layout, state, b, h) for h in range(H)]
        for t in range(lengths[b]):
            for h, head in enumerate(heads):
                token = {n: a[b, t, h] for n, a in per_token.items() if a is not None}
                token |= {n: a[h] for n, a in biases.items() if a is not None}
                token.setdefault("q", None)
                init = {m: {n: _array(w)[h] for n, w in layout.views(w_init, m).items()} for m in layout.names}
                o[b, t, h] = reference.step(config, init, head, state.pos[b] + t, token, update)
        rows.append(heads)
    o = torch.from_numpy(o).to(first)
    return (o, _state(config, layout, state, rows, lengths)) if update else (o, state)


def _head(config, layout: Layout, state: TitansState, b: int, h: int) -> reference.Head:
    """One row and head of a TitansState as the reference keeps it."""
    def weights(stacked):
        return {m: {n: _array(w)[b, h].copy() for n, w in layout.views(stacked, m).items()} for m in layout.names}

    head = reference.Head(
        weights(state.deviation), weights(state.momentum) if state.momentum is not None
        else weights(state.deviation)
    )
    fill = state.pos[b] % max(config.chunk_memory, config.chunk_other)

    def value(t, s):
        return None if t is None else _array(t)[b, s, h]

    tokens = []
    for s in range(fill):
        k, v, eta, alpha, beta = (
            value(getattr(state, f"pending_{n}"), s) for n in ("k", "v", "eta", "alpha", "beta")
        )
        tokens.append((k, v, eta, 1.0 if alpha is None else alpha, beta))
    for name, chunk in (("memory_tokens", config.chunk_memory), ("other_tokens", config.chunk_other)):
        setattr(head, name, tokens[len(tokens) - state.pos[b] % chunk :])
    return head


def _state(config, layout: Layout, old: TitansState, rows: list, lengths: list[int]) -> TitansState:
    new = old.clone().advanced(lengths)

    def fill(stacked: FastWeights, kind: str) -> None:
        for m in layout.names:
            for n, view in layout.views(stacked, m).items():
                for b, heads in enumerate(rows):
                    for h, head in enumerate(heads):
                        view[b, h] = torch.from_numpy(getattr(head, kind)[m][n]).to(view)

    fill(new.deviation, "delta")
    if new.momentum is not None:
        fill(new.momentum, "momentum")
    big = "memory_tokens" if config.chunk_memory >= config.chunk_other else "other_tokens"
    for b, heads in enumerate(rows):
        if lengths[b] == 0:
            continue
        for h, head in enumerate(heads):
            for i, name in enumerate(("k", "v", "eta", "alpha", "beta")):
                buffer = getattr(new, f"pending_{name}")
                if buffer is None:
                    continue
                buffer[b, :, h] = 0
                for s, token in enumerate(getattr(head, big)):
                    buffer[b, s, h] = torch.as_tensor(token[i], device="cpu").to(buffer)
    return new
