"""Everything a sequence has learned: what all states can do, and the files they are kept in.

A state is a dataclass whose fields are batch-first tensors, host counters (one int per row), other states, or lists and dicts of
these. Cloning, row selection, moving and saving are written once, here, over that tree.

A file is one safetensors file: the tensors, and in its metadata the format version, the tree (with configurations and counters),
a fingerprint of the weights the state was read with and, where the writer has one, a note of its own. Nothing is ever unpickled. Saving
writes a temporary file beside the target, syncs it and renames it, so an interrupted save leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as _safetensors_bytes
from torch import Tensor, nn

from .config import CMSConfig, HopeConfig, TitansConfig

FORMAT = "hope_kernels.state"
VERSION = 1
_CONFIGS = {c.__name__: c for c in (TitansConfig, CMSConfig, HopeConfig)}
_STATES: dict[str, type[State]] = {}


class Counters(list):
    """One int per row, kept on the host: advancing a state never asks the device."""


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
        return old.copy_(new)
    if isinstance(old, State) and isinstance(new, State):
        return old.assign(new)
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
class State:
    """Base of all states. ``pos[b]`` is the number of tokens row b has read since the start of its sequence."""

    pos: Counters
    config: Any
    owner: nn.Module | None = field(default=None, repr=False, kw_only=True)
    fingerprint: str | None = field(default=None, repr=False, kw_only=True)

    # Tensors in the dtype of the layer's input; all others are masters: fp32, or fp64 when the input is fp64.
    ACTIVATIONS = frozenset()

    def __init_subclass__(cls) -> None:
        _STATES[cls.__name__] = cls

    @property
    def batch(self) -> int:
        return len(self.pos)

    def _fields(self):
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in ("owner", "fingerprint", "config")]

    def _mapped(self, tensor, counters):
        return dataclasses.replace(self, **{n: _map(v, tensor, counters) for n, v in self._fields()})

    def clone(self):
        """An independent copy: advancing one leaves the other as it was."""
        return self._mapped(lambda t: t.clone(), lambda c: Counters(c))

    def snapshot(self):
        """A state that stays as it is while this one advances, in place or not."""
        return self.clone()

    def compact(self):
        """The same state without storage that means nothing: what a file holds."""
        return self

    def detach(self):
        """The same values cut from the autograd graph. Tensors are shared: who advances one of the two in place uses ``clone`` as well."""
        return self._mapped(lambda t: t.detach(), lambda c: Counters(c))

    def select(self, idx):
        """Rows ``idx`` (ints, or a 1-D integer tensor), in that order; a row may be taken more than once. Raises IndexError."""
        rows = idx.tolist() if isinstance(idx, Tensor) else [int(i) for i in idx]
        for r in rows:
            if not -self.batch <= r < self.batch:
                raise IndexError(f"{type(self).__name__}.select: row {r} does not exist in a batch of {self.batch}")
        rows = [r % self.batch for r in rows]
        return self._mapped(
            lambda t: t.index_select(0, torch.tensor(rows, dtype=torch.long, device=t.device)), lambda c: Counters([c[r] for r in rows])
        )

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

    def _counters(self) -> list[Counters]:
        found: list[Counters] = []
        _map(self, lambda t: t, lambda c: found.append(c) or c)
        return found

    def states(self) -> list[State]:
        """This state and all those inside it, in a fixed order."""
        found = [self]

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
        states = [s for s in self.states() if isinstance(getattr(s, "count", None), Tensor)]
        if not states:
            return []
        return list(zip(states, torch.stack([s.count.to(states[0].count.device) for s in states]).tolist()))

    def synchronize(self):
        """``pos`` as the device has it, where a kernel or a replayed CUDA graph has moved ``count`` without the host. In place.

        Costs one read of the device. Whatever goes by ``pos`` needs it first: any call but ``ops.titans_advance_``. ``save`` does it.
        Returns self.
        """
        for state, count in self._counted():
            state.pos[:] = count
        return self

    def usable(self):
        """The state without inference tensors, which autograd refuses: call it outside inference mode."""
        return self._mapped(lambda t: t.clone() if t.is_inference() else t, lambda c: c)

    def to(self, device=None, dtype: torch.dtype | None = None):
        """Moved to ``device``; ``dtype`` is that of the layer's input (deviations stay fp32, or become fp64 with an fp64 input)."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        master = None if dtype is None else torch.float64 if dtype == torch.float64 else torch.float32

        def cast(name: str, value: Any) -> Any:
            want = dtype if name in self.ACTIVATIONS else master
            return _map(value, lambda t: t.to(device=device, dtype=want if t.is_floating_point() else None), lambda c: Counters(c))

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
        """Becomes ``new``, keeping its own tensors (and their addresses) where shapes agree. Returns self."""
        for name, value in new._fields():
            setattr(self, name, _assign(getattr(self, name), value))
        return self

    def tensors(self) -> list[Tensor]:
        """All tensors of the tree, in a fixed order."""
        found: list[Tensor] = []
        _map(self, lambda t: found.append(t) or t, lambda c: c)
        return found

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def bind(self, module: nn.Module, where: str) -> None:
        """Checks a state that came from a file against the weights it is now read with. Raises ValueError naming both."""
        if self.owner is module or self.fingerprint is None:
            self.owner = self.owner or module
            return
        mine = fingerprint(module)
        if mine != self.fingerprint:
            raise ValueError(f"{where}: the state belongs to weights {self.fingerprint}, these are weights {mine}")
        self.owner, self.fingerprint = module, None

    def save(self, path: str | os.PathLike, note: dict | None = None) -> None:
        """Synchronizes the state and writes it to ``path`` (safetensors), atomically. note: anything JSON can hold, for ``load_note``.
        Raises OSError, and then leaves an existing file as it was."""
        self.synchronize()
        tensors: dict[str, Tensor] = {}
        tree = _describe(self, "s", tensors)
        mark = fingerprint(self.owner) if self.owner is not None else self.fingerprint
        meta = {"format": FORMAT, "version": str(VERSION), "fingerprint": mark or "", "tree": json.dumps(tree)}
        if note is not None:
            meta["note"] = json.dumps(note)
        write_atomically(path, _safetensors_bytes(tensors, metadata=meta))


def fingerprint(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names, dtypes, shapes and values of the module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, t in sorted(module.state_dict().items()):
        digest.update(f"{name}:{t.dtype}:{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Temporary file in the same folder, fsync, rename: readers see the old file or the new one, never a part."""
    path = os.fspath(path)
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=os.path.basename(path) + ".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as f:
            os.chmod(temporary, 0o666 & ~_umask())
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # an interrupt right after the rename
            os.unlink(temporary)
        raise
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _describe(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Counters):
        return {"counters": list(value)}
    if isinstance(value, tuple(_CONFIGS.values())):
        return {"config": type(value).__name__, "fields": value.to_dict()}
    if isinstance(value, State):
        items = [("config", value.config), *value.compact()._fields()]
        return {"state": type(value).__name__, "fields": {n: _describe(v, f"{name}.{n}", tensors) for n, v in items}}
    if isinstance(value, list):
        return {"list": [_describe(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": {k: _describe(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    raise TypeError(f"state field {name} holds a {type(value).__name__}, which has no form in a file")


def _rebuild(node: dict, tensors: Callable[[str], Tensor]) -> Any:
    if "tensor" in node:
        return tensors(node["tensor"])
    if "counters" in node:
        return Counters([int(i) for i in node["counters"]])
    if "config" in node:
        return _CONFIGS[node["config"]].from_dict(node["fields"])
    if "state" in node:
        return _STATES[node["state"]](**{k: _rebuild(v, tensors) for k, v in node["fields"].items()})
    if "list" in node:
        return [_rebuild(v, tensors) for v in node["list"]]
    if "dict" in node:
        return {k: _rebuild(v, tensors) for k, v in node["dict"].items()}
    return node["value"]


@contextlib.contextmanager
def _opened(path: str | os.PathLike, device: str, where: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """The file and its metadata. Raises FileNotFoundError, or ValueError for a file, or a use of it, that is no saved state."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{where}: no file {path}")
    if os.path.isdir(path):
        raise ValueError(f"{where}: {path} is a folder, expected a file")
    try:
        with safe_open(path, framework="pt", device=device) as f:
            meta = f.metadata() or {}
            if meta.get("format") != FORMAT:
                raise ValueError(f"{where}: {path} is a safetensors file but not a saved state (format {meta.get('format')!r})")
            if meta.get("version") != str(VERSION):
                raise ValueError(f"{where}: {path} has format version {meta.get('version')}, this program reads version {VERSION}")
            yield f, meta
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: {path} is not a complete state file ({error})") from None


def load_state(path: str | os.PathLike, device="cpu") -> State:
    """The state saved at ``path``. Raises FileNotFoundError, or ValueError for a truncated, foreign, newer or inconsistent file."""
    with _opened(path, str(device), "load_state") as (f, meta):
        state = _rebuild(json.loads(meta["tree"]), f.get_tensor)
        state.fingerprint = meta["fingerprint"] or None
    for inner, count in state._counted():
        if list(inner.pos) != count:
            kind = type(inner).__name__
            raise ValueError(f"load_state: {path} holds a {kind} with pos {list(inner.pos)} and count {count}, which must agree")
    return state


def load_note(path: str | os.PathLike) -> dict | None:
    """The note saved along with the state at ``path``; None where there is none. Raises as ``load_state`` does."""
    with _opened(path, "cpu", "load_note") as (_, meta):
        return json.loads(meta.get("note", "null"))
