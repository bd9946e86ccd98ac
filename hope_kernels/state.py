"""Everything a sequence has learned, and what all states can do.

A state is a dataclass whose fields are batch-first tensors, host counters (one int per row), other states, or
lists and dicts of these. Cloning, row selection, moving and checking are written once, here, over that tree;
files are in ``state_file.py``.

One rule for copies: what ``clone``, ``detach``, ``to``, ``select``, ``replace``, ``copy.copy`` and
``copy.deepcopy`` return, and what a pickle holds, is independent. Whatever later advances one of the two, in
place or not, leaves the other as it is. (Attention's keys are shared where that is the same: they are only
ever appended to.) ``dataclasses.replace`` only exchanges fields and shares the rest.
A state sent to another process is independent once that has it: torch.multiprocessing sends memory, not
values, until then.

One call at a time may advance a state; a second one, from another thread say, raises ValueError. Any number
may read it meanwhile with ``update=False`` if none advances it.

What is written into a state is prepared before, and then written by a function that leads to the same from wherever
an interrupt has left it (``State.written``): so a state is as it was before a call, or as it is after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level

from .check import check_rows, check_state
from .counters import KINDS, AnyState, Counters
from .identity import Checksum, checksum, matches
from .in_hand import InHand, WrittenWhole
from .joined import joined
from .state_file import save_state

_names: dict[type, tuple[str, ...]] = {}  # of the fields that a state's value consists of: every call walks them


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what a sequence learns (deviations, its own weights, accumulators, momentum), for an input of
    ``dtype``: fp32, or fp64 where that is fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expanded(t: Tensor) -> bool:
    """Whether several elements of t lie in one place, so that it cannot be written."""
    return t.numel() > 1 and 0 in t.stride()


def _gather(value: Any, found: list[Tensor]) -> None:
    """All tensors of the tree, in the order of ``State._leaves``."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, State):
        for _, v in value._fields():
            _gather(v, found)
    elif type(value) is list:
        for v in value:
            _gather(v, found)
    elif type(value) is dict:
        for v in value.values():
            _gather(v, found)


def _map(value: Any, tensor: Callable[[Tensor], Tensor], counters: Callable[[Counters], Counters]) -> Any:
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, Counters):
        return counters(value)
    if isinstance(value, State):
        return value._mapped(tensor, counters)
    if isinstance(value, list):
        return [_map(v, tensor, counters) for v in value]
    if isinstance(value, dict):
        return {k: _map(v, tensor, counters) for k, v in value.items()}
    return value


def _assign(old: Any, new: Any) -> Any:
    """``new``, written into ``old``'s tensors where that is possible; returns what the field must hold."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        if old is new:
            return old
        # a compiler cannot ask, and does not mix the two modes
        frozen = not torch.compiler.is_compiling() and old.is_inference() and not torch.is_inference_mode_enabled()
        if frozen or old.requires_grad or old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
            return new
        if expanded(old):
            return new
        return old.copy_(new)
    if isinstance(old, State) and isinstance(new, State):
        return old._take(new)
    if isinstance(old, Counters) and isinstance(new, Counters):
        old[:] = new
        return old
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old[:] = [_assign(a, b) for a, b in zip(old, new)]
        return old
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for k in old:
            old[k] = _assign(old[k], new[k])
        return old
    return new


@dataclass(eq=False)
class State(WrittenWhole, AnyState):
    """Base of all states. ``pos[b]`` is the number of tokens row b has read since the start of its sequence.

    owner: the module that read it last. fingerprint: the checksum of that module's weights as they were then;
    None before the first read. parts: over how many processes the heads and hidden units are divided of which
    this state has its process's share (``hope_kernels.parallel``); a file has whole ones.
    """

    pos: Counters
    config: Any
    owner: nn.Module | None = field(default=None, repr=False, kw_only=True)
    fingerprint: Checksum | str | None = field(default=None, repr=False, kw_only=True)
    parts: int = field(default=1, repr=False, kw_only=True)

    # Tensors in the dtype of the layer's input; all others are masters: fp32, or fp64 when the input is fp64.
    INPUT_DTYPE = frozenset()
    kinds = KINDS

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    @property
    def batch(self) -> int:
        return len(self.pos)

    def _fields(self):
        names = _names.get(type(self))
        if names is None:
            others = ("owner", "fingerprint", "config", "parts")
            names = tuple([f.name for f in dataclasses.fields(self) if f.name not in others])
            _names[type(self)] = names
        return [(n, getattr(self, n)) for n in names]

    def _mapped(self, tensor, counters):
        self.settle()
        return dataclasses.replace(self, **{n: _map(v, tensor, counters) for n, v in self._fields()})

    def clone(self):
        """An independent copy."""
        return self._mapped(lambda t: t.clone(), lambda c: Counters(c))

    def __copy__(self):
        return self.clone()

    def __deepcopy__(self, memo):
        return self.clone()

    def __getstate__(self) -> dict:
        """For pickles: the module that read the state is no part of it, the mark of its weights is."""
        self.settle()
        mark = self.fingerprint or (None if self.owner is None else checksum(self.owner))
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {
            "owner": None, "fingerprint": None if mark is None else str(mark)
        }

    def __setstate__(self, fields: dict) -> None:
        """What comes from another process (torch.multiprocessing) shares memory with what was sent: it leaves
        that here."""
        self.__dict__.update(
            {n: _map(v, lambda t: t.clone() if t.is_shared() else t, Counters) for n, v in fields.items()}
        )

    def replace(self, **fields):
        """A copy with other values in ``fields``, independent of this state (but not of what is given)."""
        return dataclasses.replace(self.clone(), **fields)

    def snapshot(self):
        """A state that stays as it is while this one advances, in place or not."""
        return self.clone()

    def compact(self):
        """The same state without storage that means nothing: what a file holds."""
        return self

    def detach(self):
        """An independent copy, cut from the autograd graph."""
        return self._mapped(lambda t: t.detach().clone(), lambda c: Counters(c))

    def constant(self):
        """The same values cut from the graph; tensors are shared, counters are not."""
        return self._mapped(lambda t: t.detach(), lambda c: Counters(c))

    def select(self, rows):
        """An independent state of some rows, in the order given.

        rows: integers (a sequence or a 1-D tensor; negative ones count from the end, a row may be taken more
        than once), or a mask of booleans, one per row. Raises IndexError for a row that does not exist,
        ValueError for anything else.
        """
        rows = check_rows(f"{type(self).__name__}.select", "rows", rows, self.batch, absent=IndexError)
        index: dict[torch.device, Tensor] = {}

        def taken(t: Tensor) -> Tensor:
            if t.device not in index:
                index[t.device] = torch.tensor(rows, dtype=torch.long, device=t.device)
            return t.index_select(0, index[t.device])

        return self._mapped(taken, lambda c: Counters([c[r] for r in rows]))

    @staticmethod
    def join(states):
        """The state of one batch with the rows of ``states``, in their order: sequences that were read apart
        go on together, each as it would alone, wherever it stands.

        states: a list of states of one kind, configuration, device and dtype, read with the same weights. The
        result is independent of them. Activations that a model keeps of a segment's end for the next call
        stay behind: that segment is read once more.
        Raises TypeError for other things than states or several kinds, ValueError for an empty list and for
        states that differ in the above, or of which some are guarded or keep segments and some do not.
        """
        return joined(states)

    def split(self, rows=None):
        """Independent states of one row each, for every row of ``rows`` (as ``select`` takes them; None:
        all), without what the batch had for other rows only. Raises as ``select`` does."""
        rows = range(self.batch) if rows is None else check_rows(
            f"{type(self).__name__}.split", "rows", rows, self.batch, absent=IndexError
        )
        return [self.select([b])._lean() for b in rows]

    @classmethod
    def _alike(cls, states: list) -> list:
        """``states`` with the same parts, each of one shape but for the rows: what ``join`` puts together.
        They may share tensors with those given."""
        return states

    def _tidied(self):
        """A state that ``join`` has put together, once its storage is what one call would have made."""
        return self

    def _lean(self):
        """The state without tensors that mean nothing for its rows."""
        return self

    def merge(self, other, rows: list[bool]):
        """Row b from ``other`` where ``rows[b]``, else from self; both of one structure."""
        if all(rows):
            return other.clone()
        theirs = iter(other.tensors())

        def pick(t: Tensor) -> Tensor:
            mask = torch.tensor(rows, device=t.device).view(-1, *[1] * (t.dim() - 1))
            return torch.where(mask, next(theirs), t)

        counters = iter(other._counters())
        return self._mapped(pick, lambda c: Counters([b if r else a for a, b, r in zip(c, next(counters), rows)]))

    def caught_up(self, later, rows: list[bool]):
        """``merge`` with a later state of the same sequences: it may share that one's storage."""
        return self.merge(later, rows)

    def _counters(self) -> list[Counters]:
        return [v for v in self._leaves() if isinstance(v, Counters)]

    def _leaves(self) -> Iterator[Any]:
        """Everything in the tree that is no list, dict or state, in a fixed order; counters are one leaf."""
        stack = [v for _, v in reversed(self._fields())]
        while stack:
            value = stack.pop()
            if isinstance(value, State):
                stack.extend(v for _, v in reversed(value._fields()))
            elif isinstance(value, list) and not isinstance(value, Counters):
                stack.extend(reversed(value))
            elif isinstance(value, dict):
                stack.extend(reversed(list(value.values())))
            else:
                yield value

    def states(self) -> list[State]:
        """This state and all those inside it, in a fixed order."""
        found: list[State] = [self]

        def look(value: Any) -> None:
            if isinstance(value, State):
                found.extend(value.states())
            elif isinstance(value, (list, dict)):
                for v in value.values() if isinstance(value, dict) else value:
                    look(v)

        for _, value in self._fields():
            look(value)
        return found

    def _counted(self) -> list[tuple[State, list[int]]]:
        """The states inside that kernels advance, each with its ``count``, from one read of the device."""
        found = [(s, getattr(s, "count", None)) for s in self.states()]
        states, counts = [s for s, t in found if isinstance(t, Tensor)], [t for _, t in found if isinstance(t, Tensor)]
        if not states:
            return []
        return list(zip(states, torch.stack([t.to(counts[0].device) for t in counts]).tolist()))

    def synchronize(self):
        """``pos`` as the device has it, where a kernel or a replayed CUDA graph has moved ``count`` without
        the host. In place.

        Costs one read of the device. Whatever goes by ``pos`` needs it first: any call but
        ``ops.titans_advance_``. ``save`` does it. Returns self.
        """
        self.settle()
        for state, count in self._counted():
            state.pos[:] = count
        return self

    def usable(self):
        """The state without inference tensors, which autograd refuses, without expanded ones, and without those of
        a graph, which a state shares with weights: call it outside inference mode."""
        def own(t: Tensor) -> Tensor:
            return t.detach().clone() if t.requires_grad or t.is_inference() or expanded(t) else t

        return self._mapped(own, lambda c: c)

    def to(self, device=None, dtype: torch.dtype | None = None):
        """An independent copy on ``device``; ``dtype`` is that of the layer's input (deviations stay fp32, or
        become fp64 with an fp64 input). Raises ValueError for a dtype that is no floating one."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{type(self).__name__}.to: argument dtype is {dtype!r}, expected a floating dtype")
        self.settle()
        master = None if dtype is None else master_dtype(dtype)

        def cast(name: str, value: Any) -> Any:
            want = dtype if name in self.INPUT_DTYPE else master

            def moved(t: Tensor) -> Tensor:
                return t.to(device=device, dtype=want if t.is_floating_point() else None, copy=True)

            return _map(value, moved, lambda c: Counters(c))

        moved = {}
        for name, value in self._fields():
            if isinstance(value, State):
                moved[name] = value.to(device, dtype)
            elif isinstance(value, list) and value and all(v is None or isinstance(v, State) for v in value):
                moved[name] = [None if v is None else v.to(device, dtype) for v in value]
            else:
                moved[name] = cast(name, value)
        return dataclasses.replace(self, **moved)

    def assign(self, new: State):
        """Becomes ``new``, keeping its own tensors (and their addresses) where shapes agree; wholly, if at all. ``new``
        is of no use any more. Returns self."""
        if torch.compiler.is_compiling():
            return self._take(new)
        self.written(partial(self._take, new))
        return self

    def _take(self, new: State):
        """``assign``, from wherever it has been left."""
        if self.config is not new.config:
            self.config = new.config
        for name, value in new._fields():
            setattr(self, name, _assign(getattr(self, name), value))
        return self

    def tensors(self) -> list[Tensor]:
        """All tensors of the tree, in a fixed order."""
        found: list[Tensor] = []
        _gather(self, found)
        return found

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def validate(
        self, where: str, dtype: torch.dtype | None = None, device: torch.device | None = None, *,
        values: bool = False
    ) -> None:
        """Raises ValueError, naming the part, unless this is a state that calls of its configuration produce.

        Checked: every tensor's shape against the configuration and the number of rows, its dtype (for an
        input of ``dtype``; None: that of the state itself) and device (None: one for all), that no two
        tensors share memory, all counters against each other and the periods, and all that for the states
        inside. values: also what only the tensors' values say (costs syncs on a device).
        """
        self.settle()
        if not isinstance(self.pos, list):
            raise ValueError(f"{where}: state.pos is {self.pos!r}, expected one integer per row")
        if dtype is None:
            dtype = self.input_dtype()
        if device is None:
            device = next((t.device for t in self.tensors()), torch.device("cpu"))
        self._check(where, dtype, device, values)
        if not torch.compiler.is_compiling() and maybe_current_level() is None:
            self._check_memory(where)

    def input_dtype(self) -> torch.dtype | None:
        """Of the layer's input, as far as the tensors say; None: none of them does."""
        raise NotImplementedError

    def _check(self, where: str, dtype: torch.dtype | None, device: torch.device, values: bool) -> None:
        """``validate`` for what is particular to one kind of state."""
        raise NotImplementedError

    def _distinct(self) -> list[Tensor]:
        """The tensors that a call may write in place."""
        return self.tensors()

    def _check_memory(self, where: str) -> None:
        found = [t.data_ptr() for t in self._distinct() if t.numel() and t.device.type != "meta"]
        if len(set(found)) < len(found):
            raise ValueError(
                f"{where}: argument state has two tensors in the same memory, which a call in place would both change"
            )

    def admit(self, where: str, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Whether ``module``, whose configuration it has, may read this state: ``validate``, and the weights
        it was read with before.

        Raises ValueError; the state is as it was.
        """
        if self.parts != getattr(module, "parts", 1):
            raise ValueError(f"{where}: the state has its share of {self.parts} processes, and the model is divided "
                             f"over {getattr(module, 'parts', 1)}; save_session and load_session of "
                             "hope_kernels.parallel carry it from one to the other")
        self.validate(where, dtype, device, values=device.type == "cpu" and not torch.compiler.is_compiling())
        if self.owner is not module and self.fingerprint is not None:
            same, mine = matches(module, self.fingerprint)
            if not same:
                raise ValueError(f"{where}: the state belongs to weights {self.fingerprint}, these are weights {mine}; "
                                 "state.adopt(module) says that it may go on with them all the same")

    def adopt(self, module: nn.Module) -> None:
        """From here on this is a state of ``module``'s weights as they are now, whichever it was read with
        before: after training on, say, or consolidating. In place. Raises ValueError for another
        configuration."""
        where = f"{type(self).__name__}.adopt"
        check_state(where, self, type(self), module.config, self.batch)
        self.owned_by(module)
        self.fingerprint = checksum(module, anew=True)

    def owned_by(self, module: nn.Module) -> None:
        """``module`` reads this state: it and the states inside know their modules."""
        self.owner = module

    def reading(self, where: str, module: nn.Module, advances: bool = True):
        """A context: the block reads this state with ``module``, for which ``admit`` let it pass, and
        (``advances``) changes it in place.

        Inside, the state belongs to the module's weights as they are now; with an error, or where nothing was
        to be read into it, it goes back to those before. Raises ValueError where another call has the state
        in hand that this one may not meet.
        """
        if torch.compiler.is_compiling():  # which follows neither locks nor version counters
            if self.owner is not module:
                self.owned_by(module)
            return contextlib.nullcontext()
        return InHand(where, self, module, advances)

    def save(self, path: str | os.PathLike, note: dict | None = None) -> None:
        """Synchronizes the state and writes it to ``path`` (safetensors), atomically: see
        ``files.write_atomically``; a new file is the user's alone (mode 0600). note: anything JSON can hold,
        for ``load_note``.
        Raises ValueError for a state that ``load_state`` would refuse and for a path that is no regular file, OSError,
        and then leaves an existing file as it was."""
        save_state(self, path, note)
