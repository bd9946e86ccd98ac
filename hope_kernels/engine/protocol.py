"""What the engine asks of a language model. ``HopeForCausalLM`` is one; the engine imports no model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import HopeConfig
from ..layers.block import Block
from ..layers.cms import Inner
from ..model_state import MixerState, ModelState
from ..ops.cms.level import Level
from ..ops.cms.state import CMSState

CMSWeights = CMSState | list[Level] | None  # of one block: a state, the levels in force, or no CMS


class Model(Protocol):
    """Token embedding, blocks (a mixer over time, and possibly a CMS), head."""

    @property
    def config(self) -> HopeConfig: ...

    @property
    def embed(self) -> nn.Module:
        """ids [B, T] -> h [B, T, d_model]; its device and dtype are the model's."""
        ...

    @property
    def blocks(self) -> Sequence[Block]: ...

    @property
    def segment(self) -> int:
        """Tokens between two boundaries of the fastest CMS level; 0 without a CMS."""
        ...

    @property
    def learns(self) -> bool:
        """Whether reading with learn="next_token" can change anything."""
        ...

    @property
    def holds(self) -> bool:
        """Whether the graph of a segment that ends with a call may be held until the next one."""
        ...

    @property
    def plain(self) -> bool:
        """Whether a call is what the class itself says: no subclass, no hooks, no ``forward`` of its own."""
        ...

    @property
    def parallel(self) -> Any:
        """What divides the model over processes; None: nothing does."""
        ...

    def __call__(
        self, ids: Tensor, state: ModelState | None = None, lengths: Any = None, learn: str = "off",
        backend: str | None = None, *, check_finite: bool = False, wavefront: int | None = None,
        output: str = "logits", following: Tensor | None = None, guard: bool | None = None,
    ) -> tuple[Any, ModelState]:
        """Reads ids: (logits [B, T, vocab_size], or with output="losses" ``head.Losses``; the state after
        them)."""
        ...

    def run(
        self, h: Tensor, mixers: list[MixerState], cms: Sequence[CMSWeights], lengths: list[int],
        backend: str | None = None, inner: list[Inner] | None = None,
    ) -> tuple[Tensor, list[MixerState]]:
        """All blocks over h, as a function of its arguments: (h, new mixer states)."""
        ...

    def logits(self, h: Tensor, lengths: list[int], backend: str | None = None) -> Tensor:
        """The head over h [B, T, d_model]: [B, T, vocab_size], zero past a row's length."""
        ...

    def levels(self, state: ModelState) -> list[list[Level] | None]:
        """The CMS weights in force, per block."""
        ...

    def flush(self, state: ModelState, backend: str | None = None) -> list[int]:
        """Learns the open segments now, in place: the tokens of each row that contributed."""
        ...

    def init_state(self, batch: int, device: torch.device | str | None = None) -> ModelState:
        """Of sequences that have read nothing."""
        ...

    def claim(self, op: str, state: ModelState) -> None:
        """``state`` is this model's from here on. Raises TypeError or ValueError, in the name of ``op``,
        where this model may not read it."""
        ...

    def reading(self, op: str, state: ModelState) -> AbstractContextManager[None]:
        """The context in which ``state`` is advanced in place: see ``State.reading``."""
        ...
