"""Counts of launches by stage and class, and what a unit of work (a chunk, a call) costs.

    with recording(arch) as gpu:        # launches of both backends run on the PTX machine
        few = gpu.counted(lambda: call(2))
        more = gpu.counted(lambda: call(4))
    tally(more, few, units=2)

The difference of two lengths is free of what a launch does once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from benchmarks.budget import stages as stage_names
from benchmarks.budget.classes import class_of, flops, group_of
from benchmarks.measure import poisoned
from hope_kernels.ops.shared import cuda_library
from hope_kernels.ops.shared.triton_build import SHARED_KIB
from tools import build_cuda
from tools.ptx import cuda, triton_device
from tools.ptx.machine import Counts, Kernel, Options

SUMS = ("wavefronts", "sectors", "shared_bytes", "global_bytes", "l2_bytes", "flops")
MEASURES = ("executed", "lanes", "bytes", "wavefronts", "sectors")


@dataclass
class Text:
    """A kernel that has run. ptx: its text; numbers of lines are those of the file it was compiled from."""

    kernel: Kernel
    name: str
    ptx: str

    @property
    def key(self) -> tuple[str, int]:
        return self.name, hash(self.ptx)

    @property
    def short(self) -> str:
        """The name without what a C++ compiler adds."""
        found = cuda.SYMBOL.fullmatch(self.name)
        return found[1] if found else self.name


@dataclass
class Stage:
    """A stage's share of a unit of work; everything per unit."""

    classes: Counter = field(default_factory=Counter)  # class -> warp instructions
    wavefronts: float = 0
    sectors: float = 0
    shared_bytes: float = 0
    global_bytes: float = 0
    l2_bytes: float = 0  # of global memory that lanes ask for, each byte once an instruction
    flops: float = 0

    @property
    def instructions(self) -> float:
        return sum(self.classes.values())

    def record(self) -> dict:
        rest = {n: short(getattr(self, n)) for n in SUMS}
        kept = {n: short(v) for n, v in sorted(self.classes.items()) if v}
        return {"instructions": short(self.instructions), **rest, "classes": kept}


def short(value: float) -> float | int:
    """An exact count has few digits: units divide most of them."""
    value = round(float(value), 3)
    return int(value) if value == int(value) else value


class Recorder:
    """The launches of a block of code, whichever backend made them."""

    def __init__(self, arch: int, device: triton_device.Device, driver: cuda.Driver | None):
        self.arch, self.device, self.driver = arch, device, driver
        self._cuda: dict[tuple[str, int], Text] = {}
        if driver is not None:
            driver.kernel = self._kernel

    def _kernel(self, name: str, arch: int) -> Kernel:
        if (name, arch) not in self._cuda:
            self._cuda[name, arch] = text = _cuda_text(name, arch)
            text.kernel.reset_counts()
        return self._cuda[name, arch].kernel

    def _texts(self) -> list[Text]:
        mine = [Text(k, k.name, ptx) for ptx, k in self.device.kernels.items()]
        return [*mine, *self._cuda.values()]

    def counted(self, call: Callable[[], object]) -> dict[tuple[str, int], tuple[Text, Counts]]:
        """What the call's launches executed, by kernel."""
        for text in self._texts():
            text.kernel.reset_counts()
        call()
        found = {t.key: (t, t.kernel.counts) for t in self._texts()}
        return {k: (t, c) for k, (t, c) in found.items() if c.executed.any()}


@cache
def _cuda_text(name: str, arch: int) -> Text:
    return Text(cuda.kernel(name, arch), name, cuda.text(name, arch))


@cache
def _device(arch: int) -> triton_device.Device:
    return triton_device.install(arch)


@contextmanager
def recording(arch: int, with_cuda: bool = True, together: int = 1) -> Iterator[Recorder]:
    """A GPU of this compute capability. Of Triton's kernels ``together`` programs run at a time: one of a
    persistent kernel, so that none waits, or those that exchange; of the CUDA kernels as many blocks as work
    together. Raises BuildError without nvcc."""
    device = _device(80)
    device.arch, device.multiprocessors = arch, 1
    device.options = Options(resident=together, races=False, measure=True)
    with poisoned():
        if not with_cuda:
            yield Recorder(arch, device, None)
            return
        library = build_cuda.build_emulated()
        cuda_library.emulate(str(library))
        if reason := cuda_library.unavailable():
            raise build_cuda.BuildError(reason)
        with cuda.Driver(library) as driver:
            driver.arch = 80 if arch < 90 else arch
            driver.options = Options(resident=16, races=False, measure=True)
            torch.ops.hope_kernels_cuda.emulate(arch, 1024 * SHARED_KIB[arch], driver.arch, 0, 16, True)
            yield Recorder(arch, device, driver)
        cuda_library.emulate(None)


@cache
def _labels(key: tuple[str, int], text: TextOf) -> tuple[list[str], list[str], list[int]]:
    instructions = text.of.kernel.instructions
    found = stage_names.stages(text.of.ptx, [i.line for i in instructions], text.of.short)
    return found, [class_of(i.opcode) for i in instructions], [flops(i.opcode) for i in instructions]


@dataclass(frozen=True)
class TextOf:
    """A text as an argument of a cached function: equal to every other one of the same key."""

    of: Text = field(compare=False, hash=False)


def tally(
    more: dict[tuple[str, int], tuple[Text, Counts]], less: dict[tuple[str, int], tuple[Text, Counts]],
    units: float,
) -> dict[str, Stage]:
    """Per unit of work, stage by stage, what ``more`` executed beyond ``less``."""
    found: dict[str, Stage] = defaultdict(Stage)
    for key, (text, counts) in more.items():
        where, kinds, work = _labels(key, TextOf(text))
        delta = {n: getattr(counts, n).astype(float) for n in MEASURES}
        if key in less:
            delta = {n: v - getattr(less[key][1], n) for n, v in delta.items()}
        for k in np.nonzero(delta["executed"])[0]:
            stage, kind = found[where[k]], kinds[k]
            if kind.startswith("generic"):
                kind = kind.replace("generic", "shared" if delta["wavefronts"][k] else "global")
            stage.classes[kind] += delta["executed"][k] / units
            stage.wavefronts += delta["wavefronts"][k] / units
            stage.sectors += delta["sectors"][k] / units
            stage.flops += work[k] * delta["executed"][k] / units
            if group_of(kind) == "shared":
                stage.shared_bytes += delta["bytes"][k] / units
            elif group_of(kind) in ("global", "copy", "atomic"):
                stage.global_bytes += delta["bytes"][k] / units
            # also of generic addresses that are some warps' shared memory and others' global memory
            stage.l2_bytes += min(delta["bytes"][k], 32 * delta["sectors"][k]) / units
    return dict(found)


def total(of: dict[str, Stage]) -> Stage:
    """All stages but the waiting."""
    whole = Stage()
    for name, stage in of.items():
        if name == stage_names.WAIT:
            continue
        whole.classes.update(stage.classes)
        for n in SUMS:
            setattr(whole, n, getattr(whole, n) + getattr(stage, n))
    return whole


def groups(classes: Counter) -> Counter:
    found: Counter = Counter()
    for name, n in classes.items():
        found[group_of(name)] += n
    return found


def known_share(of: dict[str, Stage]) -> float:
    """Share of the instructions whose stage is known."""
    whole = sum(stage.instructions for stage in of.values())
    return 1 - of[stage_names.UNKNOWN].instructions / whole if stage_names.UNKNOWN in of and whole else 1.0


def kernels(found: dict[tuple[str, int], tuple[Text, Counts]]) -> list[str]:
    return sorted({text.name for text, _ in found.values()})
