"""What code a measured case depends on, and a hash of it: a figure whose hash is not the present one is older
than its code.

A case is the data a result carries ("case" of a record of benchmarks.gpu, "kernel_of" of the other files).
Its code is what a few entry points reach: Python definitions (definitions.py) and C++ files (native.py).
Moving or renaming them changes nothing; changing a function that several cases share makes all of them older.
Other backends than the case's are left out, and of operators and layers also the choice among backends, the
configuration and checks of arguments: what is asked, not what is computed. A case not known here depends on
the whole package: too old is the safe mistake.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from benchmarks import native
from benchmarks.definitions import Tree, module_files

ROOT = Path(__file__).parents[1]

# -- entry points --------------------------------------------------------------------------------------------
# "module:name" in the package, or the whole "module"; a pattern with "/" is of files in C++.

STATE = ("ops.titans.state:init_titans_state",)
CPU_LIBRARY = ("setup:cpu_library",)
TITANS = {
    "reference": (*STATE, "ops.titans.reference_backend:titans_reference"),
    "chunked": (*STATE, "ops.titans.scan:titans_chunk"),
    "cpp": (*STATE, "ops.titans.cpp:titans_cpp", "csrc/cpu/titans*.cpp", "csrc/cpu/read_backward*.cpp",
            *CPU_LIBRARY),
    "cuda": (*STATE, "ops.titans.cuda:titans_cuda", "ops.titans.cuda:titans_advance_", "csrc/cuda/**/*.cu",
             "csrc/cuda/**/*.cpp", "tools.build_cuda:build"),
    "triton": (*STATE, "ops.titans.triton.operator:titans_triton",
               "ops.titans.triton.operator:titans_advance_"),
}
TITANS_GRADIENT = {
    "cpp": (*TITANS["cpp"], "ops.titans.cpp_training:titans_cpp_training"),
    "triton": (*TITANS["triton"], "ops.titans.triton.training:titans_triton_training"),
}
CONV = {
    "chunked": ("ops.conv.forward:causal_conv_chunked",),
    "cpp": ("ops.conv.cpp:causal_conv", "csrc/cpu/layer*.cpp", *CPU_LIBRARY),
    "triton": ("ops.conv.triton.forward:causal_conv_triton",),
}
GATE = {
    "chunked": ("ops.output_gate.forward:output_gate_chunked",),
    "cpp": ("ops.output_gate.cpp:output_gate", "csrc/cpu/layer*.cpp", *CPU_LIBRARY),
    "triton": ("ops.output_gate.triton.forward:output_gate_triton",),
}
LAYER = ("layers.titans:SelfModifyingTitans",)
LINEAR_CPP = ("csrc/cpu/linear*.cpp", *CPU_LIBRARY)
LAYER_CPP = ("layers.titans_pullback:pullback", "ops.unit.cpp:unit", "ops.linear.cpp:linear", *LINEAR_CPP)
CMS_KINDS = {
    "forward": ("ops.cms.chain:cms_forward",),
    "refresh": ("ops.cms.refresh:cms_refresh_",),
    "segment": ("layers.cms:ContinuumMemory",),
    "pending": ("layers.cms:ContinuumMemory",),
    "newton": ("ops.cms.muon:muon_step_",),
}
CMS_FUNCTIONS = ("level_forward", "level_backward", "refresh_", "outer_add_", "newton_schulz")
CMS = {
    "chunked": tuple(f"ops.cms.level:{name}" for name in CMS_FUNCTIONS),
    "cpp": (*(f"ops.cms.cpp:{name}" for name in CMS_FUNCTIONS), "csrc/cpu/cms*.cpp", *LINEAR_CPP),
    "triton": tuple(f"ops.cms.triton.operator:{name}" for name in CMS_FUNCTIONS),
}
ATTENTION = ("layers.attention:CausalAttention",)
ATTENTION_CPP = ("ops.attention.cpp:attend", "csrc/cpu/attention.cpp", "csrc/cpu/attention_avx512.cpp", *LINEAR_CPP)
BLOCKS = ("layers.block:HopeBlock", "layers.block:HopeAttentionBlock")
SERVE = ("joined:joined", "serve.worker:Worker", "serve.store:Store")
MODEL = ("model:HopeForCausalLM", "engine.generation:read", "engine.generation:generate",
         "engine.decoder:Decoder")
OPTIMIZERS = tuple(f"optim.{name}" for name in (
    "deep_momentum:DeepMomentum", "delta_momentum:DeltaMomentum", "dgd:DGD", "m3:M3"
))
STEP_CPP = ("csrc/cpu/token*.cpp", "csrc/cpu/segment*.cpp", "csrc/cpu/attention_model.cpp", "csrc/cpu/checksum*.cpp",
            "csrc/cpu/draw*.cpp", *CPU_LIBRARY)

# -- modules left out ----------------------------------------------------------------------------------------

CHECKS = ("*.check", "*.identity", "*.files", "*.folders", "*.state_file", "*.cli.*", "*.text", "*.text.*",
          "*.compat.*")
CHOICE = ("*.config", "*.config.*", "*.backend", "*.backends", "*.triton_library")
OF_BACKEND = {
    "cpp": ("*.cpp", "*.cpp_training", "*.titans_pullback", "*.cpu_library"),
    "triton": ("*.triton", "*.triton.*", "*.triton_library"),
    "cuda": ("*.cuda", "*.cuda_library"),
    "reference": ("*.reference", "*.reference_*"),
}
OPERATORS = ("prefill", "step", "step graph", "step graph rounded", "grad", "accuracy")
OTHERS = ("fla", "fla layer", "sdpa", "ttt", "titans", "copy", "matmul")  # nothing of this package in it
# what may serve a case that names no backend
ON_CPU, ON_GPU = ("chunked", "cpp"), ("chunked", "cpp", "triton", "cuda")


class Code(NamedTuple):
    """Entry points of a case and patterns of the modules that it does not use."""

    entries: tuple[str, ...]
    cut: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [e for e in self.entries if "/" not in e]

    @property
    def files(self) -> list[str]:
        return [e for e in self.entries if "/" in e]


EVERYTHING = Code(("*", "csrc/**/*.cpp", "csrc/**/*.cu"))


def code(case: dict) -> Code | None:
    """The code a case measures; None where it is none of this package's."""
    kind, backend = case.get("kind"), case.get("backend")
    if not case or kind in OTHERS:
        return None
    used = (backend,) if backend in TITANS else ON_CPU if case.get("device") == "cpu" else ON_GPU
    left_out = (*CHECKS, *(p for name, patterns in OF_BACKEND.items() if name not in used for p in patterns))
    model = (*MODEL, *STEP_CPP * ("cpp" in used))
    if case.get("model") or kind in ("model", "state", "long"):
        return Code((*model, *parts(BLOCKS, used), *layer(used), *cms(used)), left_out)
    if kind == "optimizer":
        return Code((*OPTIMIZERS, *model, *parts(BLOCKS, used), *layer(used), *cms(used)), left_out)
    if kind == "train":
        return Code((*model, *parts(BLOCKS, used), *layer(used), *parts(TITANS_GRADIENT, used), *cms(used)), left_out)
    if kind == "serve":
        checked = tuple(p for p in left_out if p not in ("*.files", "*.state_file"))
        return Code((*SERVE, *model, *parts(BLOCKS, used), *layer(used), *cms(used)), checked)
    operator = Code((), (*left_out, *CHOICE))
    if kind in CMS_KINDS:
        return operator._replace(entries=(*CMS_KINDS[kind], *cms(used)))
    if kind == "linear":
        return operator._replace(entries=("ops.linear.cpp:linear", *LINEAR_CPP))
    if kind in ("conv", "gate"):
        return operator._replace(entries=parts(CONV if kind == "conv" else GATE, used))
    if kind == "compiled":
        return operator._replace(entries=TITANS["chunked"])
    if kind in OPERATORS and backend in TITANS:
        return operator._replace(entries=(TITANS | TITANS_GRADIENT if kind == "grad" else TITANS)[backend])
    if kind in ("layer", "layer step", "package"):
        return operator._replace(entries=layer(used))
    if kind in ("attention", "attention step"):
        return operator._replace(entries=(*ATTENTION, *ATTENTION_CPP * ("cpp" in used)))
    if kind and kind.startswith("block "):
        return operator._replace(
            entries=(*BLOCKS, *ATTENTION_CPP * ("cpp" in used), *layer(used), *cms(used))
        )
    return EVERYTHING


def parts(table: dict[str, tuple[str, ...]] | tuple[str, ...], used: tuple[str, ...]) -> tuple[str, ...]:
    """Of a table by backend, what the backends used have; with CUDA C++ memories Triton serves the rest."""
    if isinstance(table, tuple):
        return table
    names = dict.fromkeys("triton" if name == "cuda" and "cuda" not in table else name for name in used)
    return tuple(e for name in names for e in table.get(name, ()))


def layer(used: tuple[str, ...]) -> tuple[str, ...]:
    memories = tuple(e for name in used for e in TITANS[name])
    return (*LAYER, *LAYER_CPP * ("cpp" in used), *memories, *parts(CONV, used), *parts(GATE, used))


def cms(used: tuple[str, ...]) -> tuple[str, ...]:
    """Levels that a backend has no kernels for are read in PyTorch."""
    return (*parts(CMS, used), *CMS["chunked"])


# -- hashes --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _tree(root: Path, changed: int) -> Tree:
    """``changed``: when its latest file was, so that a long process sees an edit."""
    return Tree(root)


@lru_cache(maxsize=256)
def _digest(found: Code, root: Path, changed: int) -> str:
    tree = _tree(root, changed)
    names = tree.names if found == EVERYTHING else found.names
    parts = sorted(tree.hashes(names, found.cut) | native.hashes(found.files, root))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


_at_rest: dict[Path, int] = {}


def _changed(root: Path) -> int:
    """When the latest file of the code was."""
    if root in _at_rest:
        return _at_rest[root]
    paths = (*(path for _, path in module_files(root)), *root.glob("csrc/**/*.*"))
    return max(p.stat().st_mtime_ns for p in paths)


@contextmanager
def at_rest(root: Path = ROOT) -> Iterator[None]:
    """Nobody edits the code meanwhile: the dates of its files are looked up once, not for every record."""
    before = _at_rest.get(root)
    _at_rest[root] = _changed(root)
    try:
        yield
    finally:
        if before is None:
            del _at_rest[root]


def digest(found: Code, root: Path = ROOT) -> str:
    """16 hex digits over what ``found`` reaches."""
    return _digest(found, root, _changed(root))


def kernel_hash(case: dict, root: Path = ROOT) -> str | None:
    """16 hex digits over the code that a case measures; None for what measures none of this package's."""
    found = code(case)
    return None if found is None else digest(found, root)


def mark(kind: str, backend: str | None = None, device: str | None = None) -> dict:
    """What a result file says of the code it measured: {"kernel_of": the case, "kernel": its hash}. device
    "cpu": code that a GPU alone runs does not count."""
    case = {"kind": kind, "backend": backend, "device": device}
    return {"kernel_of": case, "kernel": kernel_hash(case)}


def age(record: dict) -> str:
    """"current", "older" than the code it measured, "unknown" where a result does not say, "" where nothing
    of this package was measured."""
    case = record.get("kernel_of") or record.get("case") or {}
    if not record.get("kernel"):
        return "" if case and code(case) is None else "unknown"
    present = kernel_hash(case)
    return "" if case and present is None else "current" if record["kernel"] == present else "older"
