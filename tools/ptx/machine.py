"""The machine that runs PTX on the CPU: kernels, launches, and what was executed.

    kernel = Kernel(ptx, "scan_kernel")
    kernel.launch((8, 1, 1), 128, arguments, [Region(t.data_ptr(), t.nbytes, "x"), ...], shared=16384)

A warp of 32 lanes at a time, several blocks at work at once, in turns or in a random order. Accesses out of
bounds, races on shared and global memory, deadlocks and lanes that go different ways where all are wanted are
faults. The C++ half is csrc/emulator/ptx, built by the host's compiler when it is first needed.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools import build_cuda

from .decode import Constant, Decoder, Predicate, Register, UnknownInstruction
from .parse import Entry, Instruction, Parameter, entries, parse
from .registers import intervals, places

__all__ = [
    "Counts", "Fault", "Instruction", "Kernel", "Options", "Parameter", "Region", "UnknownInstruction", "entries",
]

SOURCES = build_cuda.EMULATOR / "ptx"
KEPT = build_cuda.ROOT / "build" / "ptx"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
CONSTANT = 1 << 30  # operands with this bit are places among the constants


class Fault(RuntimeError):
    """What a device would answer with garbage, hang on or trap; names the thread and the PTX line."""


@dataclass(frozen=True)
class Options:
    """seed: 0, and warps take turns; else they run in a random order of this seed, interrupted anywhere, and
    asynchronous copies are done at a random time. resident: blocks at work at a time, at least a cluster.
    races: accesses that nothing orders are faults. measure: count passes of shared memory and sectors."""

    seed: int = 0
    resident: int = 8
    races: bool = True
    measure: bool = False


@dataclass(frozen=True)
class Region:
    """Global memory that a launch may touch."""

    address: int
    bytes: int
    name: str


@dataclass(frozen=True)
class Counts:
    """Of every instruction, int64 arrays in the order of ``Kernel.instructions``: executed by warps; lanes that
    took part; bytes of memory; wavefronts of shared memory and 32-byte sectors of global memory (0 without
    ``Options.measure``)."""

    executed: np.ndarray
    lanes: np.ndarray
    bytes: np.ndarray
    wavefronts: np.ndarray
    sectors: np.ndarray


class _Record(ctypes.Structure):
    _fields_ = [("form", ctypes.c_void_p), *((n, ctypes.c_int32) for n in (
        "first", "count", "guard", "negated", "starts", "line", "first_register", "register_count"))]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_int32), ("cluster", ctypes.c_int32),
        ("shared_bytes", ctypes.c_uint64), ("seed", ctypes.c_uint64), ("resident", ctypes.c_int32),
        ("races", ctypes.c_int32), ("measure", ctypes.c_int32), ("parameter_bytes", ctypes.c_uint64),
        ("parameters", ctypes.c_char_p), ("region_count", ctypes.c_int32),
        ("regions", ctypes.POINTER(ctypes.c_uint64)), ("region_names", ctypes.POINTER(ctypes.c_char_p)),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The machine, built if it is not there. Raises BuildError without a compiler."""
    compiler = build_cuda.host_compiler()
    if compiler is None:
        raise build_cuda.BuildError("needs a C++ compiler")
    command = shlex.split(compiler)
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    here = subprocess.run([*command, "-march=native", "-Q", "--help=target"], capture_output=True, text=True).stdout
    contents = sorted([*SOURCES.glob("*"), *build_cuda.EMULATOR.glob("*.h")])
    path = KEPT / f"machine-{build_cuda.hash_of(contents, FLAGS, version, here)}.so"
    if not path.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with open(KEPT / "building", "w") as building, tempfile.TemporaryDirectory(dir=KEPT) as folder:
            fcntl.flock(building, fcntl.LOCK_EX)  # a process that comes second finds what the first has built
            if not path.exists():
                made = Path(folder, path.name)
                done = subprocess.run([*command, *FLAGS, "-o", str(made), str(SOURCES / "library.cpp")],
                                      capture_output=True, text=True)
                if done.returncode:
                    raise build_cuda.BuildError(f"{command[0]} failed: {done.stderr.strip()[-4000:]}")
                os.replace(made, path)
    found = ctypes.CDLL(str(path))
    found.hope_ptx_form.restype = found.hope_ptx_program.restype = ctypes.c_void_p
    return found


class Kernel:
    """One kernel of a PTX text, ready to be launched.

    Raises UnknownInstruction where it uses what the machine does not have, and ValueError where the text is not
    understood.
    """

    def __init__(self, ptx: str, entry: str | None = None):
        self._program = None
        found = parse(ptx, entry)
        self.name, self.parameters, self.instructions = found.name, found.parameters, found.instructions
        self.files, self.static_shared = found.files, found.static_shared
        self.parameter_bytes = max((p.offset + p.bytes for p in found.parameters), default=0)
        self._program = _assemble(found)

    def __del__(self):
        if getattr(self, "_program", None):
            library().hope_ptx_free(ctypes.c_void_p(self._program))

    def launch(
        self, grid: tuple[int, int, int], threads: int, arguments: bytes, regions: Sequence[Region],
        shared: int = 0, cluster: int = 1, options: Options = Options(),
    ) -> None:
        """Runs the grid. threads: of a block, whole warps. arguments: the parameter block. shared: bytes of
        dynamic shared memory. Raises Fault."""
        if threads % 32 or not 0 < threads <= 1024:
            raise ValueError(f"launch: a block of {threads} threads, expected 1 to 32 whole warps")
        blocks = grid[0] * grid[1] * grid[2]
        if grid[0] % cluster or options.resident < cluster:
            raise ValueError(f"launch: {blocks} blocks in clusters of {cluster}, {options.resident} resident")
        if len(arguments) < self.parameter_bytes:
            raise ValueError(f"launch: {len(arguments)} bytes of parameters, {self.name} has {self.parameter_bytes}")
        flat = [n for r in regions for n in (r.address, r.bytes)]
        record = _Launch(
            (ctypes.c_uint32 * 3)(*grid), threads, cluster, self.static_shared + shared, options.seed,
            options.resident, options.races, options.measure, len(arguments), arguments, len(regions),
            (ctypes.c_uint64 * max(1, len(flat)))(*flat),
            (ctypes.c_char_p * max(1, len(regions)))(*(r.name.encode() for r in regions)),
        )
        error = ctypes.create_string_buffer(8192)
        if library().hope_ptx_launch(ctypes.c_void_p(self._program), ctypes.byref(record), error, len(error)):
            raise Fault(error.value.decode(errors="replace"))

    @property
    def counts(self) -> Counts:
        """What all launches since the last ``reset_counts`` executed."""
        found = np.zeros((len(self.instructions), 5), np.uint64)
        library().hope_ptx_counts(ctypes.c_void_p(self._program), found.ctypes.data_as(ctypes.c_void_p))
        return Counts(*(np.ascontiguousarray(column) for column in found.astype(np.int64).T))

    def reset_counts(self) -> None:
        library().hope_ptx_reset_counts(ctypes.c_void_p(self._program))


def _assemble(entry: Entry) -> int:
    """Decodes the instructions, gives registers their places, and hands all of it to the machine."""
    lib, decoder = library(), Decoder(entry)
    decoded = [decoder.decode(i) for i in entry.instructions]
    for i, d in zip(entry.instructions, decoded):
        if not lib.hope_ptx_form(d.form.encode()):
            raise UnknownInstruction(f"{entry.name}, line {i.line}: {i.text}: the machine has no form {d.form!r}")
    if not decoded or decoded[-1].falls:
        raise ValueError(f"PTX: {entry.name} does not end")

    # a guarded instruction leaves what it does not write: its results are used, too
    def names(d, guard, kind, defined):
        return [o.name for o in d.operands if isinstance(o, kind) and (
            o.defined if defined else o.used or (o.defined and guard is not None))]

    targets, falls = [d.target for d in decoded], [d.falls for d in decoded]
    kept_of = {}
    for kind in (Register, Predicate):
        used = [names(d, i.guard, kind, False) for i, d in zip(entry.instructions, decoded)]
        if kind is Predicate:
            used = [[*u, *([i.guard] if i.guard else [])] for u, i in zip(used, entry.instructions)]
        defined = [names(d, i.guard, kind, True) for i, d in zip(entry.instructions, decoded)]
        if kind is Register:  # a wait writes the sums of all products before it
            sums = sorted({o.name for d in decoded if d.form.startswith("wgmma.mma") for o in d.operands
                           if isinstance(o, Register) and o.defined})
            used = [[*u, *sums] if d.form == "wgmma.wait_group" else u for u, d in zip(used, decoded)]
        kept_of[kind] = intervals(defined, used, targets, falls)
    fixed = sorted({o.name for d in decoded for o in d.operands if isinstance(o, Register)} - set(entry.registers))
    specials = {name: lib.hope_ptx_special(name.encode()) for name in fixed}
    for name, number in specials.items():
        if number < 0:
            raise UnknownInstruction(f"{entry.name}: the machine has no register {name}")
    registers = {n: where for n, where in kept_of[Register].items() if n not in specials}
    place, slots = places(registers, {n: 2 if entry.registers[n] == 8 else 1 for n in registers})
    for name in fixed:
        place[name], slots = slots, slots + 1
    predicates = {n: w for n, w in kept_of[Predicate].items() if n not in ("true", "false")}
    predicate_place, predicate_count = places(predicates, dict.fromkeys(predicates, 1))
    predicate_place |= {"true": predicate_count, "false": predicate_count + 1}

    constants: dict[Constant, int] = {}
    constant_slots = 0
    records, flat, waited = (_Record * len(decoded))(), [], []
    products = any(d.form.startswith("wgmma.mma_async") for d in decoded)
    starts = {t for t in targets if t is not None} | {
        k + 1 for k, d in enumerate(decoded) if d.target is not None or not d.falls
    }
    for k, (i, d) in enumerate(zip(entry.instructions, decoded)):
        first = len(flat)
        for o in d.operands:
            if isinstance(o, Register):
                flat.append(place[o.name])
            elif isinstance(o, Predicate):
                flat.append(predicate_place[o.name])
            elif isinstance(o, Constant):
                if o not in constants:
                    constants[o] = constant_slots
                    constant_slots += 2 if o.bytes == 8 else 1
                flat.append(constants[o] | CONSTANT)
            else:
                flat.append(o)
        guard = -1 if i.guard is None else predicate_place[i.guard]
        form = lib.hope_ptx_form(d.form.encode())
        first_waited = len(waited)
        # a copy of a register is the compiler's way to name what the next wait is for
        if products and d.form != "mov.b32" and not d.form.startswith("wgmma.mma_async"):
            waited += [place[o.name] for o in d.operands if isinstance(o, Register)]
        records[k] = _Record(form, first, len(flat) - first, guard, i.negated, k in starts, i.line, first_waited,
                             len(waited) - first_waited)
    words = np.zeros((max(1, constant_slots), 32), np.uint32)
    for c, at in constants.items():
        if c.bytes == 8:
            words[at:at + 2].reshape(-1).view(np.uint64)[:] = c.bits
        else:
            words[at] = c.bits
    ints = ctypes.c_int32
    of_specials = [n for name in fixed for n in (specials[name], place[name])]
    single = any(d.form in ("ld", "st") and d.operands[3] == 1 for d in decoded)
    texts = [i.text.encode() for i in entry.instructions]
    return lib.hope_ptx_program(
        entry.name.encode(), records, len(decoded), (ints * max(1, len(flat)))(*flat), len(flat),
        words.ctypes.data_as(ctypes.c_void_p), constant_slots, (ints * max(1, len(of_specials)))(*of_specials),
        len(fixed), (ints * 1)(predicate_count), 1, (ints * max(1, len(waited)))(*waited), len(waited), slots,
        predicate_count + 2, int(single), int(any("mbarrier" in d.form for d in decoded)), entry.local_bytes,
        (ctypes.c_char_p * len(texts))(*texts),
    )
