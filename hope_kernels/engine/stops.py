"""Where a written text ends: sequences of token ids, from text, bytes, ids and the end-of-sequence tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..check import check_integer
from .protocol import Model

Stop = str | bytes | Sequence[int]


def stop_sequences(model: Model, stop: Any) -> list[list[int]]:
    """Sequences of token ids, none of them empty."""
    def is_id(t: Any) -> bool:
        return (
            not isinstance(t, (str, bytes, bytearray)) and (not isinstance(t, Tensor) or t.dim() == 0)
            and not hasattr(t, "__len__")
        )

    if isinstance(stop, (str, bytes, bytearray)):
        stop = [stop]
    elif stop is None:
        stop = []
    try:
        stop = list(stop.tolist() if isinstance(stop, Tensor) else stop)
    except TypeError:
        raise ValueError(f"generate: argument stop is {stop!r}, expected text, bytes, token ids or a list of "
                         "these") from None
    if stop and all(is_id(t) for t in stop):
        stop = [stop]
    return [_stop_ids(model, s) for s in stop]


def end_tokens(model: Model, ids: Any) -> list[list[int]]:
    """Each of these ids as a sequence."""
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    given = [] if ids is None else ids if isinstance(ids, (list, tuple, set, frozenset)) else [ids]
    size = model.config.vocab_size
    expected = f"None, a token id from 0 to {size - 1}, or several of them"
    numbers = [check_integer("generate", "eos_token_id", i, 0, expected) for i in given]
    if max(numbers, default=0) >= size:
        raise ValueError(f"generate: argument eos_token_id has token {max(numbers)}, expected {expected}")
    return [[n] for n in numbers]


def _stop_ids(model: Model, stop: Any) -> list[int]:
    size = model.config.vocab_size
    if isinstance(stop, str):
        stop = stop.encode()
    if isinstance(stop, (bytes, bytearray)) and size != 256:
        raise ValueError(f"generate: stop strings need a byte model (vocab_size 256, not {size}); pass token ids")
    expected = f"text, bytes or token ids from 0 to {size - 1}"
    try:
        entries = list(stop)
    except TypeError:
        raise ValueError(f"generate: argument stop has an entry {stop!r}, expected {expected}") from None
    if not entries:
        raise ValueError("generate: argument stop has an empty entry")
    ids = [check_integer("generate", "stop", t, 0, expected) for t in entries]
    if max(ids) >= size:
        raise ValueError(f"generate: argument stop has token {max(ids)}, expected 0 to {size - 1}")
    return ids
