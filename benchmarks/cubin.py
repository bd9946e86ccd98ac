"""What a cubin says about its kernels: registers, stack and spills as the assembler left them, and which
units its SASS drives."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass

import triton

from hope_kernels.ops.shared.triton_build import SHARED_KIB

_FUNCTION = re.compile(r"^\s*Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE)
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^\s,]+)")
_INSTRUCTION = re.compile(
    r"^\s*(?:\.L_\S+:\s*)?/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE
)
_UNITS = {
    "spill_stores": re.compile(r"STL\b"),
    "spill_loads": re.compile(r"LDL\b"),
    "wgmma": re.compile(r"[HIQB]GMMA\b"),  # sm_90
    "tcgen05": re.compile(r"UTC[HIQO]MMA\b"),  # sm_100
    "mma": re.compile(r"[HIQODB]MMA\b"),  # mma.sync, every architecture
    "barriers": re.compile(r"BAR\b"),
}


@dataclass(frozen=True)
class Usage:
    """One kernel of a cubin. shared: static bytes a block. stack, local: bytes a thread. spill_stores,
    spill_loads: STL and LDL instructions; a kernel that fits its registers has none. wgmma, tcgen05, mma,
    barriers, instructions (all but NOP): how many are in the SASS, not how many are executed."""

    registers: int
    stack: int
    shared: int
    local: int
    spill_stores: int
    spill_loads: int
    wgmma: int
    tcgen05: int
    mma: int
    barriers: int
    instructions: int = 0


def usage(cubin: str) -> dict[str, Usage]:
    """Kernel name -> Usage, of all kernels in the cubin file at this path, by the cuobjdump and nvdisasm that
    come with Triton."""
    sass: dict[str, Counter] = {}
    section = ""
    for line in _run(triton.knobs.nvidia.nvdisasm.path, "-ndf", "-c", cubin).splitlines():
        if header := _SECTION.match(line):
            section = header[1]
        elif instruction := _INSTRUCTION.match(line):
            sass.setdefault(section, Counter())[instruction[1]] += 1
    found = {}
    for name, *resources in _FUNCTION.findall(_run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)):
        units = {
            unit: sum(n for op, n in sass[name].items() if wanted.match(op)) for unit, wanted in _UNITS.items()
        }
        found[name] = Usage(*map(int, resources), **units, instructions=sass[name].total() - sass[name]["NOP"])
    return found


def violations(u: Usage, arch: int, shared: int, wants_mma: bool) -> list[str]:
    """Why this kernel must not ship: one sentence each, none for a kernel that fits. shared: bytes a block
    asks for."""
    found = []
    if u.spill_stores or u.spill_loads:
        found.append(
            f"spills: {u.spill_stores} stores and {u.spill_loads} loads of local memory in its SASS, "
            f"{u.registers} registers"
        )
    if u.stack or u.local:
        found.append(f"local memory: {u.stack + u.local} bytes a thread")
    if shared > SHARED_KIB[arch] * 1024:
        found.append(f"shared memory: {shared} bytes a block, sm_{arch} has {SHARED_KIB[arch] * 1024}")
    if wants_mma and not (u.wgmma or u.tcgen05 or u.mma):
        found.append("no tensor-core instruction, its row wants one")
    return found


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
