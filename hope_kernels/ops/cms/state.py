"""CMSState: what sequences have learned in a Continuum Memory System, and the drafts that a call changes
before it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...check import check_counters, check_part
from ...config import CMSConfig
from ...state import Counters, State, master_dtype
from .level import Adam
from .precondition import SOURCE
from .schedule import matrices

_LISTS = ("weights", "copies", "grads", "moments", "squares", "left", "right", "inverses", "following")
_FLAGS = ("own", "rank", "dirty", "tokens", "steps")
_MOST = 2**62  # of a counter


def _no_counters() -> Counters:
    return Counters([])  # torch.compile cannot trace a bare ``Counters()``


Place = tuple[str, int, str]  # of a tensor in a CMSState: part, level, matrix


class Private:
    """Which tensors of a draft may be written in place: "made", those the call has made itself; "all"; or
    "none", where a graph outside may hold any of them. spare: see ``CMSState.spare``.

    late: in a call that is recorded to be made again, where ``Adam.late`` of a step lies, by level, step and
    rate. outer: how an outer graph goes through refreshes, "first_order" or "second_order"; None: it does not."""

    late: Callable[[int, Adam, float], Tensor] | None = None
    outer: str | None = None

    def __init__(self, which: str, spare: dict[Place, Tensor]):
        self.which, self.spare, self.made = which, spare, {}

    def put(self, t: Tensor) -> Tensor:
        """``t``, which the call has made."""
        self.made[id(t)] = t  # kept alive: an id is good for a living object only
        return t

    def writable(self, place: Place, t: Tensor) -> Tensor:
        """``t`` where that may be written, else a copy."""
        if self.which == "none":
            return t.clone()
        if id(t) in self.made or self.which == "all" and not _frozen(t):
            return t
        spare = self.spare.pop(place, None)
        if spare is None or _frozen(spare) or not _alike(spare, t):
            return self.put(t.clone())
        return self.put(spare.copy_(t))


def _frozen(t: Tensor) -> bool:
    """Whether t was made in inference mode and is written outside it."""
    return t.is_inference() and not torch.is_inference_mode_enabled()


def _alike(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return same and a.is_contiguous() and not a.requires_grad


@dataclass(eq=False)
class CMSState(State):
    """What B sequences have learned in a CMS of K levels; None stands for tensors that no sequence has needed yet.

    Lists with an entry for every level: None, or a tensor for every matrix [r, c] by its name. With
    ``config.rank``, L [r, rank] stands everywhere in the matrix's place: see ``low_rank.py``.

    weights      [B, r, c], master dtype, in force where ``own`` is 1; None: all rows share the layer's
    copies       ``weights`` in the input dtype, where that is another one; no file has them
    grads        [B, r, c]: sum since the level's last commit, zero where ``dirty`` is 0; None: zero
    moments      [B, r, c]: momentum, or Adam's average of gradients; None: zero
    squares      [B, r, c]: Adam's average of squared gradients; None: zero
    left, right  [B, R, r], [B, R, c]: factors of refreshes not yet folded into ``weights``, input dtype
    inverses     [B, c, c] for ``up`` and ``down``: P of ``precondition.py``, of their inputs; None: I
    following    [B, c, c]: P from the level's next commit on, if it sums segments up; None: as ``inverses``

    Lists with an entry for every level: one integer for every row of the batch.

    own          1 from the row's first (folded) refresh of the level on, 0 again after a nested reset
    rank         slots of ``left`` and ``right`` that count; the others are zero
    dirty        1 where ``grads`` counts
    tokens       whose gradients ``grads`` is a sum of
    steps        steps that ``moments`` and ``squares`` are averages over, for optimizer="adam"

    The open segment, which a model with a loss of its own does not keep here.

    inputs, errors   None or [B, C1, d]: inputs, and delivered dL/dy
    seen, delivered  per row: tokens read with learn=True, and how many of their errors have arrived
    tainted          per row: 1 if a token was read with learn=False

    The open segment of a row at count ``pos`` is the one that holds token pos - 1; a segment whose gradient
    has been taken is closed.

    ``spare`` is no part of the value, and no copy, file or pickle has it: memory for what a call writes. A
    call copies a tensor there when it first writes it; when the call has succeeded (``assign``), the state has
    the tensors written, and those it had are spare. So a call allocates nothing that an earlier one of the
    same state has allocated, and one that fails leaves the state as it was.

    ``base``: the layer's matrices that ``weights`` are to be read as deviations from, after calls with ``outer``
    (``deviations.py``); None: they are what they are, wherever the layer's go. No file has it.
    """

    weights: list = field(default_factory=list)
    grads: list = field(default_factory=list)
    moments: list = field(default_factory=list)
    own: list = field(default_factory=list)
    inputs: Tensor | None = None
    errors: Tensor | None = None
    seen: Counters = field(default_factory=_no_counters)
    delivered: Counters = field(default_factory=_no_counters)
    tainted: Counters = field(default_factory=_no_counters)
    copies: list = field(default_factory=list)
    left: list = field(default_factory=list)
    right: list = field(default_factory=list)
    rank: list = field(default_factory=list)
    dirty: list = field(default_factory=list)
    squares: list = field(default_factory=list)
    tokens: list = field(default_factory=list)
    steps: list = field(default_factory=list)
    inverses: list = field(default_factory=list)
    following: list = field(default_factory=list)
    private: Private | None = field(default=None, repr=False, kw_only=True)
    base: Any = field(default=None, repr=False, kw_only=True)

    INPUT_DTYPE = frozenset({"inputs", "errors", "copies", "left", "right"})

    def __post_init__(self) -> None:
        self.spare: dict[Place, Tensor] = {}
        self.made: dict[int, Tensor] = {}  # by the call whose finished draft this is
        for name in _LISTS:
            if not getattr(self, name):
                setattr(self, name, [None] * self.config.num_levels)
        for name in _FLAGS:
            if not getattr(self, name):
                held = [name == "dirty" and g is not None for g in self.grads]  # files from before these counters
                setattr(self, name, [Counters([int(h)] * self.batch) for h in held])
        for name in ("seen", "delivered", "tainted"):
            if len(getattr(self, name)) != self.batch:
                setattr(self, name, Counters([0] * self.batch))

    def __setstate__(self, fields: dict) -> None:
        super().__setstate__(fields)
        for name in ("squares", "tokens", "steps", "inverses", "following"):  # of earlier pickles
            self.__dict__.setdefault(name, [])
        self.__dict__.setdefault("base", None)
        self.__post_init__()

    def _fields(self):
        return [(n, v) for n, v in super()._fields() if n not in ("private", "base")]

    def input_dtype(self) -> torch.dtype | None:
        for part in (self.inputs, self.errors, *self.copies, *self.left, *self.right):
            for t in part.values() if isinstance(part, dict) else (part,):
                if isinstance(t, Tensor):
                    return t.dtype
        masters = [
            t for name in _LISTS if name not in self.INPUT_DTYPE for part in getattr(self, name)
            if isinstance(part, dict) for t in part.values()
        ]
        return torch.float64 if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in masters) else None

    def _check(self, where: str, dtype: torch.dtype | None, device: torch.device, values: bool) -> None:
        c, master = self.config, torch.float32 if dtype is None else master_dtype(dtype)
        for name in (*_LISTS, *_FLAGS):
            held = getattr(self, name)
            if not isinstance(held, list) or len(held) != c.num_levels:
                raise ValueError(f"{where}: state.{name} is no list of {c.num_levels} levels")
        for l in range(c.num_levels):
            slots = self._slots(where, l)
            for name in _LISTS:
                part = getattr(self, name)[l]
                if part is None:
                    continue
                square = name in ("inverses", "following")
                names = tuple(n for n in matrices(c) if not square or SOURCE[n] == n)
                if not isinstance(part, dict) or part.keys() != set(names):
                    raise ValueError(f"{where}: state.{name}[{l}] does not hold the matrices {names}")
                for matrix, t in part.items():
                    outputs, inputs = _shape(c, matrix, self.parts)
                    shape = {"left": (slots, outputs), "right": (slots, inputs)}.get(name, (outputs, inputs))
                    shape = (inputs, inputs) if square else shape
                    wanted = dtype if name in self.INPUT_DTYPE else master
                    check_part(where, f"{name}[{l}].{matrix}", t, (self.batch, *shape), wanted, device)
        for name in ("inputs", "errors"):
            if getattr(self, name) is not None:
                check_part(where, name, getattr(self, name), (self.batch, c.chunks[0], c.d_model), dtype, device)
        if not torch.compiler.is_compiling():
            self._check_counters(where)

    def _slots(self, where: str, l: int) -> int:
        """Tokens that the pending factors of a level have room for."""
        left, right = self.left[l], self.right[l]
        if (left is None) != (right is None):
            raise ValueError(f"{where}: state.left[{l}] and state.right[{l}] must both be there or both be None")
        t = left["up"] if isinstance(left, dict) and "up" in left else None
        return t.shape[1] if isinstance(t, Tensor) and t.dim() == 3 else 0

    def _check_counters(self, where: str) -> None:
        C1, tainted = self.config.chunks[0], self.tainted
        check_counters(where, "pos", self.pos, self.batch, 0)
        for name, high in (("seen", C1), ("delivered", C1), ("tainted", 1)):
            check_counters(where, name, getattr(self, name), self.batch, 0, high)
        for b, (pos, seen, delivered) in enumerate(zip(self.pos, self.seen, self.delivered)):
            read = (pos - 1) % C1 + 1 if pos else 0  # of the segment that holds token pos - 1
            if not delivered <= seen <= read or seen and not tainted[b] and seen != read:
                raise ValueError(f"{where}: state.seen is {seen} and state.delivered {delivered} for row {b}, "
                                 f"{read} tokens into a segment")
            if not tainted[b] and (seen and self.inputs is None or delivered and self.errors is None):
                raise ValueError(
                    f"{where}: row {b} of state has seen {seen} tokens and has no inputs, or no errors"
                )
        for l in range(self.config.num_levels):
            slots = self._slots(where, l)
            for name, high, part in (
                ("own", 1, self.weights), ("dirty", 1, self.grads), ("rank", slots, self.left),
                ("tokens", _MOST, self.grads), ("steps", _MOST, self.squares),
            ):
                check_counters(where, f"{name}[{l}]", getattr(self, name)[l], self.batch, 0, high)
                if any(getattr(self, name)[l]) and part[l] is None:
                    raise ValueError(f"{where}: state.{name}[{l}] counts tensors that are not there")

    def compact(self):
        return replace(self, copies=[])

    @classmethod
    def _alike(cls, states: list[CMSState]) -> list[CMSState]:
        """Where one has a tensor and others have None: what None stands for."""
        parts = [{n: list(getattr(s, n)) for n in _LISTS} for s in states]
        for l in range(states[0].config.num_levels):
            for name in _LISTS:  # weights before copies, inverses before following
                held = [p[name][l] for p in parts if p[name][l] is not None]
                for state, part in zip(states, parts) if held else ():
                    slots = max(t["up"].shape[1] for t in held)
                    part[name][l] = _filled(name, part, l, held[0], state.batch, slots)
        # rows that were read with the same weights deviate from the same ones
        base = next((s.base for s in states if s.base is not None), None)
        found = [replace(s, base=base, **p) for s, p in zip(states, parts)]
        for name in ("inputs", "errors"):
            held = [t for s in found if (t := getattr(s, name)) is not None]
            for s in found if held else ():
                if getattr(s, name) is None:
                    setattr(s, name, held[0].new_zeros(s.batch, *held[0].shape[1:]))
        return found

    def _lean(self):
        counters = {"weights": "own", "copies": "own", "grads": "dirty", "left": "rank", "right": "rank"}

        def counts(name: str, l: int) -> bool:
            if name in counters:
                return any(getattr(self, counters[name])[l])
            held, eye = getattr(self, name)[l] or {}, name in ("inverses", "following")
            return any(bool((t - _eye(t) if eye else t).any()) for t in held.values())

        lists = {n: [t if counts(n, l) else None for l, t in enumerate(getattr(self, n))] for n in _LISTS}
        for l, held in enumerate(lists["following"]):
            if (held is None) != (lists["inverses"][l] is None):  # the one says what the other is
                lists["inverses"][l], lists["following"][l] = self.inverses[l], self.following[l]
        return replace(self, **lists)

    def merge(self, other, rows: list[bool]):
        mine, theirs = self._alike([self, other])
        return State.merge(mine, theirs, rows)

    def to(self, device=None, dtype: torch.dtype | None = None):
        casts = dtype is not None or isinstance(device, torch.dtype)
        # copies round the masters once: not those of another dtype a second time
        return State.to(self.compact() if casts else self, device, dtype)

    def draft(self, in_place: str = "made", outer: str | None = None) -> CMSState:
        """A state for one call to change: its lists and counters are its own, its tensors become so when they
        are first written. in_place, outer: see ``Private``."""
        lists = {n: list(getattr(self, n)) for n in _LISTS} | {
            n: [Counters(c) for c in getattr(self, n)] for n in _FLAGS
        }
        private = Private(in_place, self.spare)
        private.outer = outer
        return replace(self, **lists, private=private)

    def finished(self) -> CMSState:
        """The draft as a state of its own."""
        if self.private is None:
            return self
        found = replace(self, private=None)
        found.made = self.private.made
        return found

    def _take(self, new: State):
        """As any state; but what the call has written in memory of its own, the state takes, and gives
        its own away for the next call."""
        assert isinstance(new, CMSState)
        for part in _LISTS:
            for l, (old, now) in enumerate(zip(getattr(self, part), getattr(new, part))):
                if old is None or now is None or old is now:
                    continue
                getattr(self, part)[l] = kept = dict(old)
                for n, t in now.items():
                    if n in old and old[n] is not t and id(t) in new.made:
                        self.spare[part, l, n], kept[n] = old[n], t
        new.made, self.base = {}, new.base
        return super()._take(new)

    def writable(self, part: str, level: int) -> dict[str, Tensor]:
        """``weights``, ``grads``, ... of a level, for this draft to write into."""
        assert self.private is not None
        held = getattr(self, part)[level]
        held = {n: self.private.writable((part, level, n), t) for n, t in held.items()}
        getattr(self, part)[level] = held
        return held

    def put(self, part: str, level: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """``tensors``, which this call has made, become that part of the level."""
        assert self.private is not None
        getattr(self, part)[level] = {n: self.private.put(t) for n, t in tensors.items()}
        return getattr(self, part)[level]

    def detach_level(self, level: int, row: int = 0) -> dict[str, Tensor]:
        """What ``row`` has learned in ``level``, taken out of the state: see
        ``ContinuumMemory.detach_level``. Raises ValueError for a state from a file that no layer has read
        yet."""
        layer: Any = self.owner
        if layer is None:
            raise ValueError(
                "CMSState.detach_level: the state has no layer yet; use layer.detach_level(state, level)"
            )
        return layer.detach_level(self, level, row)

    def level_bytes(self, level: int) -> int:
        """Bytes of what all rows have of one level: weights, copies, accumulators, momentum, pending factors
        and preconditioners."""
        parts = (getattr(self, n)[level] or {} for n in _LISTS)
        return sum(t.numel() * t.element_size() for part in parts for t in part.values())


def _filled(
    name: str, part: dict[str, list], l: int, like: dict[str, Tensor], batch: int, slots: int
) -> dict[str, Tensor]:
    """``part[name]`` of level ``l`` of ``batch`` rows as ``like`` has it, with room for ``slots`` factors."""
    held = part[name][l]
    if held is not None:
        short = slots - held["up"].shape[1] if name in ("left", "right") else 0
        return {n: F.pad(t, (0, 0, 0, short)) for n, t in held.items()} if short else held
    if name == "copies" and part["weights"][l] is not None:
        return {n: t.to(like[n].dtype) for n, t in part["weights"][l].items()}
    if name == "following" and part["inverses"][l] is not None:
        return part["inverses"][l]
    if name in ("inverses", "following"):
        return {n: _eye(t).expand(batch, -1, -1) for n, t in like.items()}
    return {n: t.new_zeros(batch, *t.shape[1:]) for n, t in like.items()}


def _eye(like: Tensor) -> Tensor:
    """[1, c, c] for [B, c, c]."""
    return torch.eye(like.shape[2], dtype=like.dtype, device=like.device).unsqueeze(0)


def _shape(config: CMSConfig, matrix: str, parts: int) -> tuple[int, int]:
    """[outputs, inputs] of what is learned of a matrix of a level: of the matrix, or of L (``low_rank.py``).
    parts: over how many processes the hidden units are divided."""
    hidden = config.hidden // parts
    r, c = (config.d_model, hidden) if matrix == "down" else (hidden, config.d_model)
    return r, c if config.rank is None else config.rank
