"""The Triton half of the compile report: one row of a kernel's table through Triton's compiler, for a GPU
that need not be here."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

# before the first import of Triton: an interpreted kernel cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks import cubin  # noqa: E402
from hope_kernels.ops.shared.triton_build import Specialization  # noqa: E402


def source(spec: Specialization) -> ASTSource:
    signature, constexprs, attrs = spec.source()
    return ASTSource(fn=spec.fn, signature=signature, constexprs=constexprs, attrs=attrs)


def key(spec: Specialization, arch: int) -> str:
    """A hash of the kernel's source with all it calls, the row, the architecture, Triton's version, and the
    code that reads what was compiled."""
    readers = b"".join(Path(path).read_bytes() for path in (__file__, cubin.__file__))
    options = (spec.num_warps, spec.num_stages, spec.maxnreg, spec.wants_mma)
    identity = (source(spec).hash(), list(spec.source()[0].items()), spec.name, spec.row, *options, arch,
                triton.__version__, hashlib.sha256(readers).hexdigest())
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def compile_row(spec: Specialization, arch: int) -> dict:
    """Compiles one row for one architecture and reads the result. Returns a flat record."""
    start = time.perf_counter()
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "maxnreg": spec.maxnreg}
    kernel = triton.compile(source(spec), target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        used = cubin.usage(f.name)[kernel.metadata.name]
    return {
        "kernel": spec.name, "row": spec.row, "arch": arch, "num_warps": spec.num_warps, **asdict(used),
        "shared": kernel.metadata.shared, "seconds": round(seconds, 2),
        "violations": cubin.violations(used, arch, kernel.metadata.shared, spec.wants_mma),
    }

