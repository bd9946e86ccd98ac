"""Functional operators behind the layers: plain tensors and states in, tensors and new states out; no modules.

Arguments are left as they are, but for the operators whose names end with an underscore: ``titans_advance_``
(for CUDA graphs) and ``cms_refresh_`` work in place. ``titans/README.md`` and ``cms/README.md`` derive what is
computed.

B rows, T tokens, H heads of width D, N hidden units, M memories (Mf with D outputs, Ms scalar ones), R stacked
rows of w2, C tokens a chunk, K CMS levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..check import check_lengths, check_state, check_tensor
from ..config import TitansConfig
from ..state import expanded
from .cms.chain import cms_forward, cms_gradients
from .cms.refresh import cms_refresh, cms_refresh_
from .titans.backends import DEVICE_DECIDES, IN_PLACE, resolve
from .titans.inputs import TokenInputs
from .titans.rounded import RoundedWeights
from .titans.state import FastWeights, Layout, TitansState, init_titans_state

__all__ = [
    "FastWeights", "Layout", "RoundedWeights", "TitansState", "TokenInputs", "cms_forward", "cms_gradients",
    "cms_refresh", "cms_refresh_", "init_titans_state", "titans_advance_", "titans_chunk", "titans_step",
]


def titans_chunk(
    config: TitansConfig, w_init: FastWeights, inputs: TokenInputs, state: TitansState | None = None, lengths=None,
    *, update: bool = True, backend: str | None = None,
) -> tuple[Tensor, TitansState]:
    """Reads and writes T tokens with all memories of a layer: (o [B, T, H, D], new state); arguments are not
    modified.

    w_init: w2 [H, R, D], w1 [H, Mf, D, N], w1s [H, Ms, N] (``Layout.of(config)`` says what is where). inputs:
    see ``TokenInputs``; q and x (or k, v) in one floating dtype, eta, alpha, beta in the same. state: None
    starts new sequences. lengths: [B], tokens of each row that count; o is zero after them. update=False
    reads with the memories as they are.
    Raises ValueError for shapes, dtypes, lengths, a state of another configuration, and a backend that cannot
    serve.
    Source: Nested Learning eq 83-93.
    """
    name = "titans_chunk"
    given, B, T = _check_inputs(name, config, w_init, inputs)
    lengths = check_lengths(name, lengths, B, T)
    if state is None:
        state = init_titans_state(config, w_init, B, given.device, given.dtype)
    check_state(name, state, TitansState, config, B)
    state.validate(name, given.dtype, given.device, values=given.device.type == "cpu")
    o, new = resolve(config, given.dtype, given.device, backend)(
        config, w_init, inputs, state, lengths, update=update
    )
    if any(n < T for n in lengths):
        real = torch.arange(T, device=o.device) < torch.tensor(
            lengths, dtype=torch.long, device=o.device
        ).unsqueeze(1)
        o = torch.where(real[:, :, None, None], o, 0.0)
    return o, new


def _check_inputs(
    name: str, config: TitansConfig, w_init: FastWeights, inputs: TokenInputs
) -> tuple[Tensor, int, int]:
    """What the memories read (x, or k), B and T. Raises ValueError for anything of another shape or place."""
    given = inputs.x if config.self_modifying else inputs.k
    shape = ("B", "T", config.num_heads, config.head_dim)
    sizes = check_tensor(name, "x" if config.self_modifying else "k", given, shape)
    B, T = sizes["B"], sizes["T"]
    static = not config.self_modifying
    needed = {"q": not config.adaptive_q, "eta_bias": not static,
              "alpha_bias": not static and config.retention, "v": static, "eta": static,
              "alpha": static and config.retention, "beta": config.momentum is not None}
    for field, t in zip(inputs._fields, inputs):
        if t is None and needed.get(field):
            raise ValueError(f"{name}: argument inputs.{field} is None, and this configuration needs it")
        if t is not None and field.endswith("_bias"):
            check_tensor(name, field, t, (config.num_heads,), device=given.device)
        elif t is not None and field in ("q", "v"):
            check_tensor(name, field, t, (B, T, *shape[2:]), dtype=given.dtype, device=given.device)
        elif t is not None and field in ("eta", "alpha", "beta"):
            check_tensor(name, field, t, (B, T, config.num_heads), device=given.device)
    for field, t, want in zip(w_init._fields, w_init, Layout.of(config).shapes(config.num_heads)):
        if want is not None:
            check_tensor(name, f"w_init.{field}", t, want, device=given.device)
    return given, B, T


@torch.no_grad()
def titans_advance_(
    config: TitansConfig, w_init: FastWeights, inputs: TokenInputs, state: TitansState, lengths: Tensor,
    *, update: bool = True, backend: str = "triton", rounded: RoundedWeights | None = None,
) -> Tensor:
    """``titans_chunk`` on the Triton or the CUDA backend, in place and decided on the device alone: o [B, T,
    H, D], zero after a row's length.

    lengths: [B] int64 on the inputs' device, in 0..T. Reads state.count where the rows stand and advances it
    with every other tensor of ``state``. So a captured CUDA graph of this call, at T = 1 say, may be replayed
    for every token, chunk boundaries included. ``state.pos``, on the host, stays behind. Every other call
    goes by it: call ``state.synchronize()``, one read of the device, when you leave the loop (and after
    replaying a captured graph of a whole layer).
    rounded: of backend "cuda", the state's rounded weights: one token then reads a third of the bytes, with the
    same bits. Before a captured graph is replayed, call ``rounded.renew()`` if anybody may have written the state
    or the weights since.
    Raises ValueError for shapes, dtypes, a state of another configuration, and a backend that cannot serve.
    """
    name = "titans_advance_"
    given, B, _ = _check_inputs(name, config, w_init, inputs)
    check_state(name, state, TitansState, config, B)
    state.check_tensors(name, given.dtype, given.device)
    check_tensor(name, "lengths", lengths, (B,), dtype=torch.int64, device=given.device)
    if any(t.requires_grad for t in state.tensors()):
        raise ValueError(
            f"{name}: argument state requires a gradient, which a change in place would lose; pass state.detach()"
        )
    if any(map(expanded, state.tensors())):
        raise ValueError(
            f"{name}: argument state has an expanded tensor, which cannot be written in place; pass state.clone()"
        )
    if backend not in DEVICE_DECIDES:
        raise ValueError(f"{name}: argument backend is {backend!r}, expected {' or '.join(map(repr, DEVICE_DECIDES))}")
    if rounded is not None and backend != "cuda":
        raise ValueError(f"{name}: argument rounded is for backend 'cuda', not {backend!r}")
    advance_ = resolve(config, given.dtype, given.device, backend, entries=IN_PLACE)
    more = {} if rounded is None else {"rounded": rounded}
    return advance_(config, w_init, inputs, state, lengths, update=update, **more)


def titans_step(
    config: TitansConfig, w_init: FastWeights, inputs: TokenInputs, state: TitansState, *,
    backend: str | None = None
) -> tuple[Tensor, TitansState]:
    """One token per row, T = 1: ``titans_chunk`` under the name decoding knows it by. Raises ValueError for T
    other than 1."""
    given = inputs.x if config.self_modifying else inputs.k
    check_tensor(
        "titans_step", "x" if config.self_modifying else "k", given, ("B", 1, config.num_heads, config.head_dim)
    )
    return titans_chunk(config, w_init, inputs, state, backend=backend)
