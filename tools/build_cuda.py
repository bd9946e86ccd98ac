"""How the CUDA C++ kernels become a library: for setup.py, the compile report, benchmarks.gpu and the tests.
Imports nothing but Python's own modules.

    hope_kernels/_hope_cuda.so   by nvcc, for the architectures below, against LibTorch's stable ABI: one library
                                 serves PyTorch >= 2.11
    build/cuda/emulated-*.so     the same sources by a host compiler, for CPU tensors: kernels are tested with it
                                 where there is no GPU
    build/ptx/*.ptx              what nvcc makes of one file of kernels, for tools.ptx

    python -m tools.build_cuda [ARCHITECTURE ...]      builds the first and prints its path

What was built is kept in build/cuda under a hash of the sources, the command and the versions that made it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES, EMULATOR = ROOT / "csrc" / "cuda", ROOT / "csrc" / "emulator"
REGISTRATION = SOURCES / "registration.cpp"
LIBRARY = ROOT / "hope_kernels" / "_hope_cuda.so"
KEPT, KEPT_PTX = ROOT / "build" / "cuda", ROOT / "build" / "ptx"
ARCHITECTURES = (80, 90, 100, 120)  # code for 8.0 runs on all of 8.x; the newest also as PTX, for GPUs to come
# a fused multiply-add is one where the source says so: all kernels round alike
DEVICE_FLAGS = ("-std=c++20", "-O3", "-fmad=false")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of 2.11


class BuildError(Exception):
    """Why there is no library, in one sentence or in the compiler's words."""


def target(arch: int) -> str:
    """What nvcc is asked for: on 9.0 instructions of that architecture alone are used (wgmma), which its name
    says."""
    return "90a" if arch == 90 else str(arch)


def nvcc() -> str | None:
    """The compiler: on PATH, or of CUDA_HOME or CUDA_PATH."""
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    return next(
        (found for home in homes if home and (found := shutil.which("nvcc", path=os.path.join(home, "bin")))),
        shutil.which("nvcc")
    )


def host_compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def kernels() -> list[Path]:
    return sorted(SOURCES.rglob("*.cu"))


def headers() -> list[Path]:
    return sorted(p for p in SOURCES.rglob("*") if p.suffix in (".h", ".cuh"))


def files(emulated: bool = False) -> list[Path]:
    """Everything the library is made of."""
    emulator = [p for p in EMULATOR.glob("*") if p.is_file()] if emulated else []
    return sorted([*(p for p in SOURCES.rglob("*") if p.is_file()), *emulator]) + [Path(__file__)]


def architectures(compiler: str) -> tuple[int, ...]:
    """Those of HOPE_KERNELS_CUDA_ARCHS ("80 90"), else the ARCHITECTURES that this nvcc knows."""
    wanted = os.environ.get("HOPE_KERNELS_CUDA_ARCHS", "").replace(",", " ").split()
    if not wanted:
        known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        return tuple(arch for arch in ARCHITECTURES if f"compute_{arch}" in known) or ARCHITECTURES
    try:
        return tuple(sorted({int(arch) for arch in wanted}))
    except ValueError:
        raise BuildError(
            f"HOPE_KERNELS_CUDA_ARCHS is {' '.join(wanted)!r}, expected numbers such as 80 90"
        ) from None


def pytorch() -> tuple[Path, str, str | None] | None:
    """(folder, version, version of its CUDA) of the PyTorch this interpreter would import, which is not
    imported; None without one."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    version = runpy.run_path(str(folder / "version.py"))
    return folder, version["__version__"], version["cuda"]


def hash_of(paths: list[Path], *more: object) -> str:
    """20 hex digits over the names and contents of files and whatever else a result depends on."""
    digest = hashlib.sha256(repr(more).encode())
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def build(archs: tuple[int, ...] | None = None) -> Path:
    """Compiles the library and returns where it is kept. Raises BuildError without nvcc or PyTorch, and with
    the messages of nvcc where it fails."""
    compiler = nvcc()
    if compiler is None:
        raise BuildError("nvcc was not found, neither on PATH nor in CUDA_HOME")
    archs = architectures(compiler) if archs is None else archs
    code = [f"-gencode=arch=compute_{target(a)},code=sm_{target(a)}" for a in archs] + [
        f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    ]
    flags = [*DEVICE_FLAGS, *code, "-DUSE_CUDA", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    link = ["--shared", "--cudart=static", "-Xlinker=--exclude-libs=ALL,-z,defs,--no-as-needed"]
    return _compiled("hope_cuda", compiler, flags, link, files(), "sm_" + " sm_".join(map(str, archs)))


def build_emulated() -> Path:
    """Compiles the same sources for CPU tensors and returns where the library is kept. Raises BuildError
    without a compiler or PyTorch, and with the compiler's messages where it fails."""
    compiler = host_compiler()
    if compiler is None:
        raise BuildError("needs a C++ compiler")
    # -O2 takes a minute of one core, -Og half of that, and the tests that run on its code a sixth longer
    flags = [
        "-std=c++20", "-Og", "-ffp-contract=off", "-DHOPE_EMULATED", "-fPIC", "-fvisibility=hidden",
        "-pthread", "-x", "c++"
    ]
    return _compiled(
        "emulated", compiler, flags, ["-shared", "-pthread", "-Wl,-z,defs,--no-as-needed"],
        files(emulated=True), "emulated"
    )


def ptx(source: Path, arch: int) -> Path:
    """Where the PTX of one file of kernels for an architecture is kept, with the source lines of
    instructions; compiles it if need be. Raises BuildError without nvcc, and with its messages where it
    fails."""
    compiler = nvcc()
    if compiler is None:
        raise BuildError("nvcc was not found, neither on PATH nor in CUDA_HOME")
    flags = [*DEVICE_FLAGS, "-DNDEBUG", "-lineinfo", "-ptx", f"-arch=compute_{target(arch)}"]
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    path = KEPT_PTX / f"{source.stem}-{arch}-{hash_of([source, *headers()], flags, about)}.ptx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        command = [compiler, *flags, source.relative_to(ROOT), "-o", fresh]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise BuildError(f"nvcc failed: {(done.stderr or done.stdout).strip()[-4000:]}")
        fresh.replace(path)
    return path


def _compiled(name: str, compiler: str, flags: list[str], link: list[str], contents: list[Path], what: str) -> Path:
    """The library made of the sources and PyTorch's headers, several files at a time; the kept one where
    nothing has changed since it was made."""
    found = pytorch()
    if found is None:
        raise BuildError("PyTorch is not installed where the library is built (pip install --no-build-isolation)")
    folder, version, _ = found
    command = shlex.split(compiler)
    about = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    path = KEPT / f"{name}-{hash_of(contents, flags, link, about, version)}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    described = f'-DHOPE_BUILD="{what}, sources {hash_of(contents)}, torch {version}"'

    def run(*arguments: object) -> None:
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise BuildError(
                f"{os.path.basename(command[0])} failed: {(done.stderr or done.stdout).strip()[-4000:]}"
            )

    def compiled(source: Path) -> Path:  # paths relative to ROOT, which is what error messages show
        run(
            *flags, STABLE_ABI, described, f"-I{folder / 'include'}", "-c", source.relative_to(ROOT), "-o",
            made / f"{source.stem}.o"
        )
        return made / f"{source.stem}.o"

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, ThreadPoolExecutor(
        min(8, os.cpu_count() or 1)
    ) as pool:
        made = Path(scratch)
        objects = list(pool.map(compiled, [*kernels(), REGISTRATION]))
        run(*link, "-o", made / path.name, *objects, f"-L{folder / 'lib'}", "-ltorch", "-ltorch_cpu")
        (made / path.name).replace(path)
    return path


def install(archs: tuple[int, ...] | None = None) -> Path:
    """``build``, then puts the library where hope_kernels looks for it in this checkout."""
    fresh = LIBRARY.with_suffix(f".{os.getpid()}")  # not rewritten in place: a process may have it loaded
    shutil.copy(build(archs), fresh)
    fresh.replace(LIBRARY)
    return LIBRARY


if __name__ == "__main__":
    try:
        print(install(tuple(sorted(map(int, sys.argv[1:]))) or None))
    except BuildError as reason:
        sys.exit(str(reason))
