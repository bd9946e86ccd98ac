"""backend="triton": the memory's kernels over a whole call. Per chunk one launch of reads and three of writes, nothing waits for the host.

The host knows where every row stands (state.pos), so it launches only what some row needs; on the device each program looks at its own row.
Forward only; states and outputs are bit-identical for any split of a sequence and any company in the batch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from ...config import TitansConfig
from ...state import Counters
from ..triton_build import DTYPES, aligned
from .fast_weights import FastWeights, Layout, TitansState
from .triton_read import append_kernel, close_kernel, read_kernel
from .triton_tiles import CHUNKS, MULTIPLES, WIDTHS, chunks_of, constants, group_constants, groups
from .triton_write import errors_kernel, hidden_kernel, update_kernel

_WRITTEN = ("delta2", "delta1", "delta1s", "pending_k", "pending_v", "pending_eta", "pending_alpha")


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    return triton.knobs.runtime.interpret


def unavailable() -> str | None:
    """Why this machine cannot use the backend, or None."""
    return None if torch.cuda.is_available() or interpreted() else "needs a CUDA device (or TRITON_INTERPRET=1, to debug)"


def unserved(config: TitansConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the backend cannot serve a layer, or None."""
    if torch.is_grad_enabled():
        return "has no gradient yet, which training and learning while reading need (torch.no_grad() serves the rest)"
    if dtype not in DTYPES:
        return f"serves {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    if config.memory != "mlp" or config.momentum is not None or config.adaptive_q:
        return 'serves memory="mlp" without momentum and adaptive_q'
    if config.head_dim not in WIDTHS or config.hidden_mult not in MULTIPLES:
        return f"serves head widths {WIDTHS} and hidden_mult {MULTIPLES}, not {config.head_dim} and {config.hidden_mult}"
    if not {config.chunk_memory, config.chunk_other} <= set(CHUNKS):
        return f"serves chunks of {CHUNKS} tokens, not {config.chunk_memory} and {config.chunk_other}"
    if device.type != "cuda" and not interpreted():
        return f"needs a CUDA device, not {device.type}"
    return unavailable()


def titans_triton(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, lengths: list[int],
    *, update: bool = True, constant_memory: bool = False, stats=None,
) -> tuple[Tensor, TitansState]:
    """As ``chunked.titans_chunk``, under no_grad; ``constant_memory`` changes nothing there. Raises ValueError for ``stats``."""
    if stats is not None:
        raise ValueError("titans: backend 'triton' collects no statistics; the chunked backend does")
    return _Call(config, w_init, inputs, state, lengths, update).run()


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format)


class _Call:
    def __init__(self, config, w_init, inputs, state, lengths, update):
        first = inputs.x if inputs.x is not None else inputs.k
        self.config, self.state, self.lengths, self.update = config, state, lengths, update
        self.B, self.T, self.H, self.D = first.shape
        self.device, self.dtype, self.itemsize = first.device, first.dtype, first.element_size()
        self.layout = Layout.of(config)
        self.small, self.big = chunks_of(config)
        self.phase = [p % self.big for p in state.pos]
        self.inputs = type(inputs)(*(None if t is None else aligned(t.detach()) for t in inputs))
        changed = [n for n in _WRITTEN if update and (n.startswith("pending") or self._commits_anything())]
        self.new = {n: None if (t := getattr(state, n)) is None else _copy(t) if n in changed else aligned(t.detach()) for n in _WRITTEN}
        base = w_init if config.retain_to == "init" else (None, None, None)
        self.base = [None if t is None else aligned(t.detach()) for t in base]
        self.o = torch.zeros(self.B, self.T, self.H, self.D, device=self.device, dtype=self.dtype)
        place = {"device": self.device, "dtype": torch.int64}
        self.pos, self.len = torch.tensor(list(state.pos), **place), torch.tensor(lengths, **place)

    def _commits_anything(self) -> bool:
        return any(p // self.small != (p + n) // self.small for p, n in zip(self.state.pos, self.lengths))

    def _some_row(self, slot: int, end: int) -> bool:
        return any(n and p < end and p + n > slot for p, n in zip(self.phase, self.lengths))

    def _some_commit(self, end: int) -> bool:
        return any(p < end <= p + n for p, n in zip(self.phase, self.lengths))

    def run(self) -> tuple[Tensor, TitansState]:
        last = max((p + n for p, n in zip(self.phase, self.lengths) if n), default=0)
        made = constants(self.config, self.itemsize)
        for step in range(min(self.phase, default=0) // self.small, triton.cdiv(last, self.small)):
            slot, end = step * self.small, (step + 1) * self.small
            if not self._some_row(slot, end):
                continue
            self._read(made, step)
            if not self.update or not self._some_commit(end):
                continue
            for M0, M1, C in groups(self.config):
                if end % C == 0:
                    self._commit(M0, M1, C, end)
        if not self.update:
            return self.o, self.state
        if last:
            self._close(made["close"])
        pos = Counters(p + n for p, n in zip(self.state.pos, self.lengths))
        return self.o, replace(self.state, pos=pos, **{n: t for n, t in self.new.items() if t is not None})

    def _weights(self) -> list[Tensor | None]:
        return [*(b if b is not None else d for b, d in zip(self.base, self._deltas())), *self._deltas()]

    def _deltas(self) -> list[Tensor | None]:
        found = [self.new[n] for n in ("delta2", "delta1", "delta1s")]
        return [t if t is not None else found[1] for t in found]  # a layer without scalar memories never looks at the last one

    def _slots(self) -> list[Tensor]:
        k, v, eta, alpha = (self.new[n] for n in ("pending_k", "pending_v", "pending_eta", "pending_alpha"))
        return [k, v, eta, eta if alpha is None else alpha]

    def _read(self, made: dict, step: int) -> None:
        i, c = self.inputs, made["read"]
        produce = self.update and self.config.self_modifying
        grid = (self.B * self.H, len(self.config.memories) if produce else 1, triton.cdiv(self.small, c["CT"]))
        x = i.q if i.x is None else i.x
        biases = [i.q if t is None else t for t in (i.eta_bias, i.alpha_bias)]
        place = (self.pos, self.len)
        read_kernel[grid](
            x, i.q, self.o, *self._weights(), *self._slots(), *biases, *place, self.T, step, self.config.eta_scale, **c)
        if self.update and not self.config.self_modifying:
            c = made["append"]
            grid = (self.B * self.H, triton.cdiv(self.small, c["CT"]))
            alpha = i.eta if i.alpha is None else i.alpha
            append_kernel[grid](i.k, i.v, i.eta, alpha, *self._slots(), self.pos, self.len, self.T, step, **c)

    def _commit(self, M0: int, M1: int, C: int, end: int) -> None:
        made = group_constants(self.config, self.itemsize, M0, M1, C)
        e, h = made["errors"], made["hidden"]
        G, N, M, D = self.B * self.H, self.config.hidden, len(self.config.memories), self.D
        MF, MS = len(self.layout.full), max(1, len(self.layout.scalars))

        def scratch(*shape, dtype=torch.float32):
            return torch.empty(G, *shape, device=self.device, dtype=dtype)

        errors, scalar_errors, e2 = scratch(MF, D, C), scratch(MS, C), scratch(M, C)
        keys, vectors, gram = scratch(C, D), scratch(3, C), scratch(C, C if self.config.step_clip else 1)
        a, d = scratch(M, N, C, dtype=self.dtype), scratch(M, N, C)
        norms = scratch(M, N // h["NT"], 2, C)
        k, v, eta, alpha = self._slots()
        weights, place = self._weights(), (self.pos, self.len)
        scale = 1.0 if self.config.objective == "dot" else self.config.grad_scale
        errors_kernel[(G, M1 - M0 + 1, C // e["CT"])](
            *weights, k, v, eta, alpha, *place, errors, scalar_errors, e2, keys, vectors, gram, end, scale, **e)
        tiles = (G, M1 - M0, N // h["NT"])
        hidden_kernel[tiles](*weights, k, *place, errors, scalar_errors, a, d, norms, end, **h)
        update_kernel[tiles](
            weights[0], *weights[3:], k, eta, *place, errors, scalar_errors, e2, a, d, norms, keys, vectors, gram, end, scale,
            **made["update"])

    def _close(self, c: dict) -> None:
        close_kernel[(self.B * self.H, triton.cdiv(self.big, c["CT"]))](*self._slots(), self.pos, self.len, **c)
