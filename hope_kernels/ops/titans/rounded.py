"""A copy of the fast weights as one token reads them: initial weights + deviations, rounded to 16 bits, in the
order in which the kernels of ``backend="cuda"`` hold them (csrc/cuda/titans/rounded.cuh). With it, decoding
in place reads 2 bytes a weight in place of 6. No bit of an output or a state depends on it, and it is part of
no state.

Who keeps it true:

    kernels    write it. The copy of a (row, head) names the chunk whose weights it has; kernels change weights
               only where a chunk ends. One that finds another chunk's copy reads the weights themselves and
               makes the copy anew: at the first token of every chunk, and after a prefill, other backends, a
               graph of others.
    the host   forgets it where PyTorch has written weights in between (``assign``, ``copy_``, an optimizer's
               step), which their version counters say, or where others have taken their place.

What is written past both (``.data``, NumPy, copies in a graph of your own) is not seen: call ``forget``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import TitansConfig
from .state import FastWeights, TitansState

# csrc/cuda/launch.h has the same numbers: what is kept of a warp, and the most that a memory in one block has
_NUMBERS, _LARGEST = 4096 + 2 * 64 + 8, 16384


def unserved_copy(config: TitansConfig) -> str | None:
    """Why ``RoundedWeights`` cannot serve a configuration that the backend serves, or None."""
    if config.head_dim * config.hidden > _LARGEST:
        return f"serves head width x hidden width up to {_LARGEST}, not {config.head_dim} x {config.hidden}"
    return None


class RoundedWeights:
    """The copy for one state of one layer, empty at first. Raises ValueError where ``unserved_copy``."""

    def __init__(self, config: TitansConfig, w_init: FastWeights, state: TitansState):
        reason = unserved_copy(config)
        if reason is not None:
            raise ValueError(f"RoundedWeights {reason}")
        B, H, _, D = state.delta2.shape
        shape, like = (B, H, 4 * config.hidden * D // 2048, _NUMBERS), state.pending_k
        self.numbers = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self._of = _weights(config, w_init, state)
        self._versions = _versions(self._of)

    def of(self, config: TitansConfig, w_init: FastWeights, state: TitansState) -> Tensor | None:
        """The copy, for a call that reads and advances these weights; what it has of others is forgotten. None
        for inference tensors, since nothing counts who writes them: such a call reads the weights themselves."""
        now = _weights(config, w_init, state)
        if any(a is not b for a, b in zip(now, self._of, strict=True)):
            self._of = now
            self.forget()
        if any(t.is_inference() for t in now):
            return None
        self.renew()
        return self.numbers

    def renew(self) -> None:
        """Forgets the copy if its weights have been written since. Calls do so themselves; a graph that reads it
        needs this before a replay."""
        now = _versions(self._of)
        if now != self._versions:
            self._versions = now
            self.forget()

    def forget(self) -> None:
        self.numbers.zero_()


def _weights(config: TitansConfig, w_init: FastWeights, state: TitansState) -> list[Tensor]:
    base = tuple(w_init) if config.retain_to == "init" else ()
    return [t for t in (*base, *state.deviation) if t is not None]


def _versions(tensors: list[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]
