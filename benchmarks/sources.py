"""Which source files a measured case depends on, and a hash of them: a figure whose hash is not the present
one is older than its kernel.

A case is the data a result carries ("case" of a record of benchmarks.gpu, "kernel_of" of the other files).
Blank lines and lines that hold a comment alone do not count. What is not known here depends on the whole
package: too old is the safe mistake.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPS = "hope_kernels/ops"
PACKAGE = ("hope_kernels/**/*.py", "csrc/**/*.*", "setup.py")
STATE = (f"{OPS}/titans/fast_weights.py",)
TRITON = (*STATE, f"{OPS}/triton_build.py", f"{OPS}/titans/kernel_call.py", f"{OPS}/titans/triton*.py")
FORWARD_ONLY = (f"!{OPS}/titans/triton_backward*.py", f"!{OPS}/titans/triton_training.py")
TITANS = {
    "chunked": (*STATE, f"{OPS}/titans/chunked.py", f"{OPS}/titans/memory.py"),
    "cpp": (*STATE, f"{OPS}/titans/cpp.py", "csrc/cpu/*.*", "setup.py", "!csrc/cpu/cms*", "!csrc/cpu/layer*"),
    "cuda": (*STATE, f"{OPS}/titans/kernel_call.py", f"{OPS}/titans/cuda.py", f"{OPS}/cuda.py",
        "csrc/cuda/**/*.*", "tools/build_cuda.py",
             "!csrc/**/*.md"),
    "triton": (*TRITON, *FORWARD_ONLY),
    "reference": (*STATE, f"{OPS}/titans/reference*.py"),
}
CMS = (
    f"{OPS}/cms/*.py", f"!{OPS}/cms/reference.py", f"{OPS}/triton_build.py", "csrc/cpu/cms*",
    "csrc/cpu/product.h", "csrc/cpu/vec.h"
)
LAYER = ("hope_kernels/layers/titans*.py", "csrc/cpu/layer*", f"{OPS}/conv/*.py", f"{OPS}/output_gate/*.py")
MODEL = (*PACKAGE, "!hope_kernels/compat/*.py", "!hope_kernels/cli/generate.py", "!hope_kernels/cli/demo.py",
         "!hope_kernels/cli/doctor.py",
         "!hope_kernels/convert.py", "!hope_kernels/cli/session.py", "!csrc/emulator/*", "!csrc/**/*.md",
         f"!{OPS}/*/reference*.py")
ON_CPU = ("!csrc/cuda/**/*.*", f"!{OPS}/cuda.py", f"!{OPS}/**/triton*.py", f"!{OPS}/titans/cuda.py", "!setup.py")
PEER = (*TITANS["chunked"], *TITANS["cpp"], *TITANS["triton"], *LAYER)  # what runs beside another package's layer
OPERATORS = ("prefill", "step", "step graph", "grad", "accuracy")
SMALL = {"conv": "conv", "gate": "output_gate"}
CMS_KINDS = ("forward", "refresh", "segment", "pending", "newton")
OTHERS = ("fla", "fla layer", "sdpa", "ttt", "titans", "copy", "matmul")  # nothing of ours in it


def globs(case: dict) -> tuple[str, ...]:
    """Patterns of the files that decide about a case, from the root of the repository; a later "!pattern"
    takes files away."""
    kind, backend = case.get("kind"), case.get("backend")
    if not case or kind in OTHERS:
        return ()
    if case.get("model") or kind in ("model", "state", "long"):
        return (*MODEL, *ON_CPU) if case.get("device") == "cpu" else MODEL
    if kind in CMS_KINDS:
        return CMS
    if kind in SMALL and backend == "cpp":
        return ("csrc/cpu/layer*", "csrc/cpu/vec.h", f"{OPS}/cpu.py")
    if kind in SMALL:
        return (
            f"{OPS}/{SMALL[kind]}/triton*.py", f"{OPS}/{SMALL[kind]}/chunked.py", f"{OPS}/triton_build.py",
            f"{OPS}/triton_sum.py"
        )
    if kind in ("compiled", "package"):
        return TITANS["chunked"] if kind == "compiled" else PEER
    if kind in OPERATORS and backend in TITANS:
        return (*TRITON, *TITANS["chunked"]) if kind == "grad" and backend == "triton" else TITANS[backend]
    if kind in ("layer", "layer step") and backend in TITANS:
        return (*TITANS[backend], *LAYER)
    return PACKAGE


def files(case: dict, root: Path = ROOT) -> list[str]:
    """The files of ``globs``, sorted, relative to ``root``."""
    found: set[str] = set()
    for pattern in globs(case):
        names = {p.relative_to(root).as_posix() for p in root.glob(pattern.removeprefix("!")) if p.is_file()}
        found = found - names if pattern.startswith("!") else found | names
    return sorted(found)


@cache
def _code(path: Path, changed: int) -> bytes:
    """A file without the lines that say nothing to a compiler; ``changed`` is its mtime, so that a long
    process sees an edit."""
    mark = rb"#" if path.suffix == ".py" else rb"//"
    return b"\n".join(
        line.rstrip() for line in path.read_bytes().splitlines()
        if not re.fullmatch(rb"\s*(" + mark + rb".*)?", line)
    )


def kernel_hash(case: dict, root: Path = ROOT) -> str | None:
    """16 hex digits over the code that a case measures; None for what measures none of ours."""
    names = files(case, root)
    if not names:
        return None
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0" + _code(root / name, (root / name).stat().st_mtime_ns) + b"\0")
    return digest.hexdigest()[:16]


def mark(kind: str, backend: str | None = None, device: str | None = None) -> dict:
    """What a result file says of the code it measured: {"kernel_of": the case, "kernel": its hash}. device
    "cpu": of models, code that a GPU alone runs does not count."""
    case = {"kind": kind, "backend": backend, "device": device}
    return {"kernel_of": case, "kernel": kernel_hash(case)}


def age(record: dict) -> str:
    """"current", "older" than the code it measured, "unknown" where a result does not say, "" where nothing
    of ours was measured."""
    case = record.get("kernel_of") or record.get("case") or {}
    if not record.get("kernel"):
        return "" if case and not files(case) else "unknown"
    present = kernel_hash(case)
    return "" if case and present is None else "current" if record["kernel"] == present else "older"
