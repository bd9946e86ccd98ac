"""Which weights a state was read with: a checksum of a module's parameters, taken when a state is read and
kept beside it.

A state must not go on under other weights, and by the time it is saved an optimizer may have changed those it
was read with. So every read takes the checksum; the work is done once per set of values, found again by the
tensors' version counters, on their own device and without waiting for it. Fused optimizers and those of other
packages move no version counter, so every optimizer's step counts as a change. An edit that PyTorch does not
notice (``p.data.mul_(2)``, NumPy) is seen only where a state passes to another module: ``matches`` and
``State.adopt`` look at the values themselves. A copy of a module, or the same file loaded twice, has the same
checksum: values count, not objects.
"""

from __future__ import annotations

import hashlib
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.optim.optimizer import register_optimizer_step_post_hook

from .ops.shared import cpu_library

_PREFIX = "c1:"  # files from before there were checksums have plain hexadecimal digits of ``fingerprint``
_version = operator.attrgetter("_version")
_WIDTH, _ROWS = 4096, 2048  # of the matrices whose row and column sums are weighted; 64 MB each
_COLUMN, _ROW = 3523014627193176565, 1189123992306739459  # odd, and without a simple ratio
_in_cpp = cpu_library.Function("hope_checksum", "checksum", cpu_library.SIZE, *[cpu_library.POINTER] * 2)


class Checksum:
    """Checksum of one set of values; ``str()`` waits for the device and is then remembered."""

    def __init__(self, kinds: list[str], sums: list[Tensor]):
        self._kinds, self._sums, self._text = kinds, sums, None

    def __str__(self) -> str:
        if self._text is None:
            values = torch.stack(self._sums).tolist() if self._sums else []
            data = repr(list(zip(self._kinds, values))).encode()
            self._text, self._sums = _PREFIX + hashlib.sha256(data).hexdigest()[:16], []
        return self._text


class _Known:
    """The checksum of a module's tensors ``held``, and what says that nothing has changed since: steps of optimizers,
    which modules, parameters and buffers there are, and the tensors' versions and addresses. Every token that is
    read alone asks, so looking takes a few microseconds."""

    def __init__(self, module: nn.Module, held: list[Tensor]):
        self.steps, self.held = _steps, held
        tables: list[dict] = [t for m in module.modules() for t in (m._parameters, m._buffers, m._modules)]
        self.tables, self.empty = [t for t in tables if t], [t for t in tables if not t]
        self.versioned = not any(t.is_inference() for t in held)  # others have no version counter
        self.entries, self.marks = self._entries(), self._marks()
        self.found = checksum_of(held)  # after the marks: a write by another thread meanwhile is a change

    def holds(self) -> bool:
        entries = self._entries()
        return (self.steps == _steps and len(entries) == len(self.entries) and not any(self.empty)
                and all(map(operator.is_, entries, self.entries)) and self._marks() == self.marks)

    def _entries(self) -> list:
        return list(chain.from_iterable(map(dict.values, self.tables)))

    def _marks(self) -> list[int]:
        versions = map(_version, self.held) if self.versioned else (
            -1 if t.is_inference() else t._version for t in self.held
        )
        return [*versions, *map(Tensor.data_ptr, self.held)]


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
_whole: WeakKeyDictionary[nn.Module, Callable[[bool], Checksum | None]] = WeakKeyDictionary()
_steps = 0  # of all optimizers of the process


class _Vouched(threading.local):
    of: tuple[Any, Any] = (None, None)  # a module, and its checksum


_vouched = _Vouched()


def divided(module: nn.Module, whole: Callable[[bool], Checksum | None]) -> None:
    """From here on the checksum of ``module``, whose weights are divided over processes, is what ``whole(anew)``
    says of the whole ones."""
    _whole[module] = whole


def steps() -> int:
    """How many steps all optimizers of the process have taken."""
    return _steps


def checksum_of(tensors: Iterable[Tensor]) -> Checksum:
    """Of ``tensors``, which are looked at one after another."""
    kinds, sums = [], []
    with torch.inference_mode(False), torch.no_grad():
        for t in tensors:
            kinds.append(f"{t.dtype}{tuple(t.shape)}")
            sums.append(weighted_sum(t))
        return Checksum(kinds, [s.to(sums[0].device) for s in sums])


def _stepped(*_) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_stepped)


@contextmanager
def unchanged(module: Any, mark: Checksum | str | None) -> Iterator[None]:
    """Inside, in this thread, ``checksum(module)`` is ``mark`` unlooked: for loops in which no code of others runs."""
    before, _vouched.of = _vouched.of, (module, mark)
    try:
        yield
    finally:
        _vouched.of = before


def checksum(module: nn.Module, anew: bool = False) -> Checksum | None:
    """Of the values, dtypes and shapes of all parameters and persistent buffers, in order, whatever the names.

    None where they cannot be looked at: inside a compiler or a transformation of torch.func, on the meta
    device, sharded over processes by other means than ``hope_kernels.parallel``. anew: look at the values even
    if nothing says that they have changed.
    """
    if torch.compiler.is_compiling() or maybe_current_level() is not None:
        return None
    if _vouched.of[0] is module and not anew:
        return _vouched.of[1]
    if module in _whole:
        return _whole[module](anew)
    known = None if anew else _known.get(module)
    if known is not None and known.holds():
        return known.found
    held: list[Tensor] = []
    collect(module, held)
    if not all(type(t.data) is Tensor and t.layout == torch.strided and t.device.type != "meta" for t in held):
        return None
    known = _known[module] = _Known(module, held)
    return known.found


def matches(module: nn.Module, mark: Checksum | str) -> tuple[bool, str]:
    """Whether ``module`` has the weights of ``mark``, and its own mark in the same form."""
    text, mine = str(mark), checksum(module, anew=True)
    if mine is None:
        return True, text
    mine = str(mine) if text.startswith(_PREFIX) or module in _whole else fingerprint(module)
    return mine == text, mine


def fingerprint(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names, dtypes, shapes and values of the module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, t in sorted(module.state_dict().items()):
        digest.update(f"{name}:{t.dtype}:{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def collect(module: nn.Module, found: list[Tensor]) -> None:
    """The parameters and persistent buffers of ``module``, as ``state_dict`` orders them."""
    for p in module._parameters.values():
        if p is not None:
            found.append(p)
    if module._buffers:
        found.extend(
            b for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set
        )
    for child in module._modules.values():
        if child is not None:
            collect(child, found)


def weighted_sum(t: Tensor) -> Tensor:
    """The tensor's bytes as 64-bit integers x, each with x >> 32 beside it and weighted by its place, modulo
    2^64: an int64 scalar.

    As matrices of _WIDTH columns, sum_ij x_ij (u_j + w_i) comes from row and column sums alone. u is even and
    w odd: no weight loses a bit, so one changed number always changes the sum. The shifted sum is there for
    signs: two of them would cancel at the highest bit. On a CPU in one pass (csrc/cpu/checksum.cpp): training asks
    at every step, and forty small sums a tensor took longer than its optimizer.
    """
    x = t.detach().contiguous().flatten().view(torch.uint8)
    if x.is_cpu and cpu_library.unavailable() is None:
        found = torch.empty((), dtype=torch.int64, device="cpu")
        _in_cpp(len(x), x.data_ptr(), found.data_ptr())
        return found
    return _weighted_sum_chunked(x)


def _weighted_sum_chunked(x: Tensor) -> Tensor:
    """``weighted_sum`` of bytes in PyTorch, on any device."""
    whole = len(x) // 8 * 8
    tail = torch.zeros(8, dtype=torch.uint8, device=x.device)
    tail[: len(x) - whole] = x[whole:]
    found = tail.view(torch.int64)[0]
    x = (x[:whole] if x.storage_offset() % 8 == 0 else x[:whole].clone()).view(torch.int64)
    whole = len(x) // _WIDTH * _WIDTH
    for part in (*x[:whole].view(-1, _WIDTH).split(_ROWS), x[whole:].unsqueeze(0)):
        u = torch.arange(part.shape[1], dtype=torch.int64, device=x.device) * (2 * _COLUMN)
        w = torch.arange(part.shape[0], dtype=torch.int64, device=x.device) * (2 * _ROW) + 1
        for y in (part, part >> 32):
            found = found * _ROW + (y.sum(0) * u).sum() + (y.sum(1) * w).sum()
    return found
