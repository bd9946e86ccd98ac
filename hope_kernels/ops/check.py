"""Checks of user input, with messages of one form: "op: argument k has shape [2, 3], expected [B, T, 64]"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _brackets(shape: Sequence) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def check_tensor(op: str, name: str, t: Any, shape: Sequence[int | str], dtype: torch.dtype | None = None, device=None) -> dict[str, int]:
    """Checks one tensor and returns the sizes of its named axes.

    ``shape`` holds an int where the size is fixed and a letter where it is free; a letter used twice must have one size.
    Raises TypeError if ``t`` is not a tensor, ValueError for another shape, dtype or device.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: argument {name} is a {type(t).__name__}, expected a tensor {_brackets(shape)}")
    sizes: dict[str, int] = {}
    fits = t.dim() == len(shape) and all(
        (sizes.setdefault(want, got) if isinstance(want, str) else want) == got for want, got in zip(shape, t.shape)
    )
    if not fits:
        raise ValueError(f"{op}: argument {name} has shape {_brackets(t.shape)}, expected {_brackets(shape)}")
    if dtype is not None and t.dtype != dtype:
        raise ValueError(f"{op}: argument {name} has dtype {t.dtype}, expected {dtype}")
    if device is not None and t.device != torch.device(device):
        raise ValueError(f"{op}: argument {name} is on {t.device}, expected {device}")
    return sizes


def check_lengths(op: str, lengths: Any, batch: int, tokens: int) -> list[int]:
    """One int per row, 0 <= n <= tokens; None means every row is full. A tensor on a device costs one sync. Raises ValueError."""
    if lengths is None:
        return [tokens] * batch
    if isinstance(lengths, Tensor):
        if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
            raise ValueError(f"{op}: argument lengths has dtype {lengths.dtype}, expected integers")
        check_tensor(op, "lengths", lengths, (batch,))
        values = lengths.tolist()
    else:
        try:
            values = list(lengths)
            if any(isinstance(n, bool) or n != int(n) for n in values):
                raise TypeError
            values = [int(n) for n in values]
        except (TypeError, ValueError):
            raise ValueError(f"{op}: argument lengths is {lengths!r}, expected {batch} integers") from None
    if len(values) != batch:
        raise ValueError(f"{op}: argument lengths has {len(values)} entries, expected one per row ({batch})")
    for row, n in enumerate(values):
        if not 0 <= n <= tokens:
            raise ValueError(f"{op}: argument lengths has {n} for row {row}, expected 0 to {tokens}")
    return values


def check_state(op: str, state: Any, cls: type, config: Any, batch: int) -> None:
    """A state of this kind, of this configuration, with this many rows. Raises TypeError for another kind, else ValueError."""
    if not isinstance(state, cls):
        raise TypeError(f"{op}: argument state is a {type(state).__name__}, expected a {cls.__name__}")
    if state.config is not config and state.config != config:  # compilers follow an object more easily than its fields
        raise ValueError(f"{op}: argument state belongs to {state.config}, expected {config}")
    if state.batch != batch:
        raise ValueError(f"{op}: argument state has {state.batch} rows, expected {batch}")


def check_placement(op: str, state: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Every tensor of ``state`` is on ``device`` and fits an input of ``dtype`` (masters: fp32, or fp64 with fp64). Raises ValueError."""
    master = torch.float64 if dtype == torch.float64 else torch.float32

    def check(name: str, value: Any, want: torch.dtype) -> None:
        if isinstance(value, Tensor):
            if value.device != device:
                raise ValueError(f"{op}: state.{name} is on {value.device}, expected {device}; move it with state.to(...)")
            if value.is_floating_point() and value.dtype != want:
                raise ValueError(f"{op}: state.{name} has dtype {value.dtype}, expected {want} for an input of {dtype}; "
                                 "state.to(...) casts it")
        elif isinstance(value, dict):
            for key, v in value.items():
                check(f"{name}.{key}", v, want)
        elif isinstance(value, list):
            for i, v in enumerate(value):
                check(f"{name}[{i}]", v, want)

    for name, value in state._fields():
        check(name, value, dtype if name in state.ACTIVATIONS else master)


def check_values(op: str, name: str, t: Tensor, lengths: list[int]) -> None:
    """Every value of the rows' first ``lengths`` tokens is finite. Raises ValueError naming the first bad row; costs one sync."""
    good = torch.isfinite(t).flatten(2).all(-1)
    padding = torch.arange(t.shape[1], device=t.device) >= torch.tensor(lengths, device=t.device).unsqueeze(1)
    rows = (~(good | padding)).any(1).nonzero()
    if len(rows):
        raise ValueError(f"{op}: argument {name} has a non-finite value in row {int(rows[0])}; nothing was read")
