"""The hidden states of a model while it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


@contextmanager
def hidden_states(blocks: Sequence[nn.Module], norm: nn.Module) -> Iterator[list[Tensor]]:
    """A list that has, after the ``with``, what each of ``blocks`` was given, and what the head was given: ``norm``
    of what the last one returned. Each [B, T, d_model]."""
    # a block that replays a segment before it reads is called more than once: the last call counts
    given: dict[int, Tensor] = {}

    def note(at: int, _: nn.Module, args: tuple[Any, ...], out: tuple[Any, ...] | None = None) -> None:
        given[at] = args[0] if out is None else out[0]

    kept: list[Tensor] = []
    end = len(blocks)
    hooks = [b.register_forward_pre_hook(partial(note, i)) for i, b in enumerate(blocks)]
    hooks.append(blocks[-1].register_forward_hook(partial(note, end)))
    try:
        yield kept
        kept.extend([*(given[i] for i in range(end)), norm(given[end])])
    finally:
        for hook in hooks:
            hook.remove()
