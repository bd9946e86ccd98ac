"""Checks of user input, with messages of one form: "op: argument k has shape [2, 3], expected [B, T, 64]"."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from .differences import described, differences

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what layers compute in


def _brackets(shape: Sequence) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def check_tensor(
    op: str, name: str, t: Any, shape: Sequence[int | str], dtype: torch.dtype | None = None, device=None
) -> dict[str, int]:
    """Checks one tensor and returns the sizes of its named axes.

    ``shape`` holds an int where the size is fixed and a letter where it is free; a letter used twice must
    have one size.
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


def _listed(values: Any) -> list:
    """Raises TypeError for what has no order, or is text."""
    if isinstance(values, (str, bytes, bytearray, Set, Mapping)):
        raise TypeError("no sequence")
    return list(values)


def check_lengths(op: str, lengths: Any, batch: int, tokens: int) -> list[int]:
    """One int per row, 0 <= n <= tokens; None means every row is full. A tensor on a device costs one sync.
    Raises ValueError."""
    if lengths is None:
        return [tokens] * batch
    if isinstance(lengths, Tensor):
        if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
            raise ValueError(f"{op}: argument lengths has dtype {lengths.dtype}, expected integers")
        check_tensor(op, "lengths", lengths, (batch,))
        values = lengths.tolist()
    else:
        try:
            values = _listed(lengths)
            if any(isinstance(n, bool) or n != int(n) for n in values):
                raise TypeError
            values = [int(n) for n in values]
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{op}: argument lengths is {lengths!r}, expected {batch} integers") from None
    if len(values) != batch:
        raise ValueError(f"{op}: argument lengths has {len(values)} entries, expected one per row ({batch})")
    for row, n in enumerate(values):
        if not 0 <= n <= tokens:
            raise ValueError(f"{op}: argument lengths has {n} for row {row}, expected 0 to {tokens}")
    return values


def check_state(op: str, state: Any, cls: type, config: Any, batch: int) -> None:
    """A state of this kind, with this many rows, whose sequences may go on with this configuration (which need
    not be its own: see ``differences.py``). Raises TypeError for another kind, else ValueError."""
    if not isinstance(state, cls):
        raise TypeError(f"{op}: argument state is a {type(state).__name__}, expected a {cls.__name__}")
    # compilers follow an object more easily than its fields
    if state.config is not config and state.config != config:
        found = differences(state.config, config)
        if found:
            raise ValueError(f"{op}: argument state {described(found, state.config, config)}")
    if isinstance(state.pos, list) and state.batch != batch:  # else ``State.validate`` says so
        raise ValueError(f"{op}: argument state has {state.batch} rows, expected {batch}")


def check_batch(op: str, batch: Any) -> int:
    """A number of rows. Raises ValueError."""
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 0:
        raise ValueError(f"{op}: argument batch is {batch!r}, expected an integer >= 0")
    return batch


def check_rows(op: str, name: str, rows: Any, batch: int, absent: type[Exception] = ValueError) -> list[int]:
    """Row numbers 0 .. batch - 1 from integers (negative ones count from the end) or a mask of booleans, in a
    sequence or 1-D tensor.

    Raises ``absent`` for a row that does not exist, ValueError for anything else.
    """
    values = rows.tolist() if isinstance(rows, Tensor) else rows
    try:
        values = _listed(values)
        mask = [isinstance(r, bool) or type(r).__name__ in ("bool_", "bool") for r in values]
        if any(mask):
            if not all(mask) or len(values) != batch:
                raise TypeError("no mask")
            return [b for b, r in enumerate(values) if r]
        values = [operator.index(r) for r in values]
    except TypeError:
        raise ValueError(
            f"{op}: argument {name} is {rows!r}, expected row numbers, or one boolean for each of {batch} rows"
        ) from None
    for r in values:
        if not -batch <= r < batch:
            raise absent(f"{op}: row {r} does not exist in a batch of {batch}")
    return [r % batch for r in values]


def check_mask(op: str, name: str, mask: Any, batch: int) -> list[int]:
    """The rows that a mask, one boolean per row, marks. Raises ValueError, for row numbers too."""
    if not isinstance(mask, (list, tuple)) or len(mask) != batch or not all(isinstance(r, bool) for r in mask):
        raise ValueError(f"{op}: argument {name} is {mask!r}, expected one boolean for each of {batch} rows")
    return [b for b, r in enumerate(mask) if r]


def check_index(op: str, name: str, value: Any, size: int) -> int:
    """An index 0 .. size - 1. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise ValueError(f"{op}: argument {name} is {value!r}, expected 0 to {size - 1}")
    return value


def check_counters(where: str, name: str, counters: Any, batch: int, low: int, high: int = 2**62) -> None:
    """One int per row, from low to high, as a state holds it. Raises ValueError."""
    if not isinstance(counters, list) or len(counters) != batch:
        raise ValueError(f"{where}: state.{name} is {counters!r}, expected one integer for each of {batch} rows")
    for n in counters:
        if type(n) is not int or not low <= n <= high:
            raise ValueError(f"{where}: state.{name} is {list(counters)!r}, expected integers from {low} to {high}")


def check_part(
    where: str, name: str, t: Any, shape: tuple[int, ...] | None, dtype: torch.dtype | None, device: torch.device
) -> None:
    """A state's tensor: of this shape (None: there is none), dtype (None: any floating one) and device.
    Raises ValueError."""
    if shape is None:
        if t is not None:
            raise ValueError(f"{where}: state.{name} is a {type(t).__name__}, expected None for its configuration")
        return
    if not isinstance(t, Tensor):
        raise ValueError(f"{where}: state.{name} is a {type(t).__name__}, expected a tensor {_brackets(shape)}")
    if t.shape != shape:
        raise ValueError(f"{where}: state.{name} has shape {_brackets(t.shape)}, expected {_brackets(shape)}")
    if t.layout != torch.strided:
        raise ValueError(f"{where}: state.{name} has layout {t.layout}, expected {torch.strided}")
    if t.device != device:
        raise ValueError(f"{where}: state.{name} is on {t.device}, expected {device}; move it with state.to(...)")
    if t.dtype != dtype and (dtype is not None or t.dtype not in FLOATING):
        raise ValueError(
            f"{where}: state.{name} has dtype {t.dtype}, expected {dtype or 'a floating one'}; state.to(...) casts it"
        )


def check_values(op: str, name: str, t: Tensor, lengths: list[int]) -> None:
    """Every value of the rows' first ``lengths`` tokens is finite. Raises ValueError naming the first bad
    row; costs one sync."""
    good = torch.isfinite(t).flatten(2).all(-1)
    padding = torch.arange(t.shape[1], device=t.device) >= torch.tensor(lengths, device=t.device).unsqueeze(1)
    rows = (~(good | padding)).any(1).nonzero()
    if len(rows):
        raise ValueError(f"{op}: argument {name} has a non-finite value in row {int(rows[0])}; nothing was read")


def check_integer(op: str, name: str, value: Any, least: int | None, expected: str) -> int:
    """Anything with the value of an integer, not below ``least`` (None: any), as one. Raises ValueError."""
    truth = isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool
    try:
        number = None if truth else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        raise ValueError(f"{op}: argument {name} is {value!r}, expected {expected}")
    return number


def check_number(op: str, name: str, value: Any, fits: Callable[[float], bool], expected: str) -> float:
    """Any real number that ``fits``, also as a tensor of no dimension, as a float. Raises ValueError."""
    scalar = isinstance(value, Tensor) and value.dim() == 0 and value.device.type != "meta"
    given = value.item() if scalar else value
    try:
        number = float(given) if isinstance(given, numbers.Real) and not isinstance(given, bool) else None
    except OverflowError:
        number = None
    if number is None or not fits(number):
        raise ValueError(f"{op}: argument {name} is {value!r}, expected {expected}")
    return number
