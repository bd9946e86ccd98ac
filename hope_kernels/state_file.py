"""States as files: one safetensors file with the tensors, and everything else as JSON in its metadata.
Nothing is ever unpickled.

    format, version   what the file is
    tree              the state's fields: configurations, counters, names of tensors
    fingerprint       the checksum of the weights the state was last read with ("" where it could not be taken)
    note              whatever the writer wants to find again, for ``load_note``
    sha256            of all of the above and of every tensor: a flipped bit is an error (files from before it
                      was written still load)

A file is untrusted: it is read into memory whole, every step that can fail on foreign bytes ends in a
ValueError, and the state that comes out has passed ``State.validate``.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors.torch import load as _tensors_of
from safetensors.torch import save as _safetensors_bytes
from torch import Tensor

from .config import CMSConfig, HopeConfig, TitansConfig
from .counters import KINDS, AnyState, Counters
from .files import write_atomically
from .identity import checksum

if TYPE_CHECKING:
    from .state import State

FORMAT = "hope_kernels.state"
VERSION = 1
_CONFIGS = {c.__name__: c for c in (TitansConfig, CMSConfig, HopeConfig)}
_HASHED = ("format", "version", "fingerprint", "tree", "note")
_INTEGER = 2**62  # counters lie below: sums of two of them still are 64-bit numbers


def save_state(state: State, path: str | os.PathLike, note: dict | None = None) -> None:
    """``State.save``."""
    if state.parts != 1:
        raise ValueError(f"{type(state).__name__}.save: the state has its share of {state.parts} processes, "
                         "expected a whole one; hope_kernels.parallel.save_session gathers it")
    state.synchronize()
    tensors: dict[str, Tensor] = {}
    tree = _describe(state, "s", tensors)
    try:
        _whole(tree, tensors)
    except Exception as error:
        raise ValueError(f"{type(state).__name__}.save: the state is none that could be loaded again ({error}); "
                         "nothing has been written") from None
    mark = state.fingerprint or (None if state.owner is None else checksum(state.owner))
    meta = {
        "format": FORMAT, "version": str(VERSION), "fingerprint": "" if mark is None else str(mark),
        "tree": json.dumps(tree)
    }
    if note is not None:
        meta["note"] = json.dumps(note)
    meta["sha256"] = _digest(meta, tensors)
    write_atomically(path, _safetensors_bytes(tensors, metadata=meta), mode=0o600)


def load_state(path: str | os.PathLike, device: torch.device | str = "cpu") -> State:
    """The state saved at ``path``, in memory of its own on ``device``.

    Raises FileNotFoundError, or ValueError for a truncated, damaged, foreign, newer or inconsistent file and
    a device that cannot be used.
    """
    try:
        torch.empty(0, dtype=torch.uint8, device=device)
    except (TypeError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"load_state: argument device is {device!r}, which cannot be used ({error})") from None
    data, meta = _opened(path, "load_state")
    try:
        with torch.device("cpu"):  # an empty tensor comes on the default device
            tensors = {name: t.clone() for name, t in _tensors_of(data).items()}
        if "sha256" in meta and meta["sha256"] != _digest(meta, tensors):
            raise ValueError("its contents do not have the SHA-256 they were written with")
        state = _whole(json.loads(meta["tree"]), tensors)
        state.fingerprint = meta["fingerprint"] or None
    except Exception as error:  # foreign bytes: whatever they lead to is a fault of the file
        raise ValueError(f"load_state: {path} is not a complete state file ({error})") from None
    return state if torch.device(device).type == "cpu" else state.to(device)


def load_note(path: str | os.PathLike) -> dict | None:
    """The note saved along with the state at ``path``, of which no more than the header is read; None where there
    is none. Raises as ``load_state`` does."""
    _, meta = _opened(path, "load_note", whole=False)
    try:
        return json.loads(meta.get("note", "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_note: {path} is not a complete state file ({error})") from None


def _opened(path: str | os.PathLike, where: str, whole: bool = True) -> tuple[bytes, dict[str, str]]:
    """The bytes of the file (whole: all of them), and its metadata. Raises FileNotFoundError, or ValueError for
    what is no saved state."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{where}: no file {path}")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(
            f"{where}: {path} is {'a folder' if os.path.isdir(path) else 'no regular file'}, expected a file"
        )
    with open(path, "rb") as f:
        data = f.read() if whole else f.read(8)
        if not whole and len(data) == 8:
            data += f.read(min(struct.unpack("<Q", data)[0], os.fstat(f.fileno()).st_size))
    try:
        (size,) = struct.unpack("<Q", data[:8])
        meta = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        if len(data) < 8 + size or not all(isinstance(v, str) for v in meta.values()):
            raise ValueError("its header is cut short")
    except (struct.error, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where}: {path} is not a complete state file ({error})") from None
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{where}: {path} is a safetensors file but not a saved state (format {meta.get('format')!r})"
        )
    if meta.get("version") != str(VERSION):
        raise ValueError(
            f"{where}: {path} has format version {meta.get('version')}, this program reads version {VERSION}"
        )
    if not {"tree", "fingerprint"} <= meta.keys():
        raise ValueError(
            f"{where}: {path} is not a complete state file (its metadata lacks the tree or the fingerprint)"
        )
    return data, meta


def _is_state(value: Any) -> TypeGuard[State]:
    return isinstance(value, AnyState)


def _digest(meta: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in _HASHED:
        digest.update(f"{name}:{meta.get(name)!r}\n".encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name}:{t.dtype}:{tuple(t.shape)}\n".encode())
        digest.update(t.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    if _is_state(value):
        items = [("config", value.config), *value.compact()._fields()]
        return {
            "state": type(value).__name__, "fields": {n: _describe(v, f"{name}.{n}", tensors) for n, v in items}
        }
    if isinstance(value, list):
        return {"list": [_describe(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": {k: _describe(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    raise TypeError(f"state field {name} holds a {type(value).__name__}, which has no form in a file")


def _whole(tree: dict, tensors: dict[str, Tensor]) -> State:
    """The state that a file of these has. Raises whatever foreign bytes lead to."""
    tensors = dict(tensors)
    state = _rebuild(tree, tensors)
    if not _is_state(state):
        raise ValueError(f"it holds a {type(state).__name__}")
    if tensors:
        raise ValueError(f"it holds tensors that belong to nothing: {sorted(tensors)[:3]}")
    state.validate("the state in it", values=True)
    return state


def _rebuild(node: dict, tensors: dict[str, Tensor]) -> Any:
    """Takes the tensors it places out of ``tensors``: none serves twice."""
    if "tensor" in node:
        return tensors.pop(node["tensor"])
    if "counters" in node:
        if not all(type(i) is int and abs(i) < _INTEGER for i in node["counters"]):
            raise ValueError(f"counters {node['counters']!r}"[:200])
        return Counters(node["counters"])
    if "config" in node:
        return _CONFIGS[node["config"]].from_dict(node["fields"])
    if "state" in node:
        return KINDS[node["state"]](**{k: _rebuild(v, tensors) for k, v in node["fields"].items()})
    if "list" in node:
        return [_rebuild(v, tensors) for v in node["list"]]
    if "dict" in node:
        return {k: _rebuild(v, tensors) for k, v in node["dict"].items()}
    return node["value"]
