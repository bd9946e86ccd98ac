"""What the assembler makes of a kernel, with the trip counts that PTX counted.

ptxas says from which PTX line every SASS instruction comes, and the PTX machine how often that line ran. All
instructions of a basic block run equally often, so a block's trip count is the median over its instructions.
Weak where a block's instructions come from code that ran differently often (short branches turned into
predicates), and for what the assembler adds in blocks of their own.

The words that control issue (stall cycles, scoreboards) say how long a warp alone would need: each block in
order, an instruction when its stalls and the scoreboards it waits for allow it, with the latencies below.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import get_ptxas

from benchmarks.budget.stages import UNKNOWN
from benchmarks.budget.tally import Text, TextOf
from tools import build_cuda
from tools.ptx import cuda

GROUPS = (  # of SASS opcodes, by their first word
    ("tensor", r"[HIQBD]MMA|[HIQB]GMMA"),
    ("special", r"MUFU"),
    ("convert", r"F2FP?|I2F\w*|F2I\w*|I2I|FRND"),
    ("float", r"[FD](?:ADD|MUL|FMA|SETP|SEL|MNMX|SET|CHK|SWZADD)|H(?:ADD2|MUL2|FMA2|SETP2|SET2|MNMX2)"),
    ("shared", r"LDS|STS|LDSM|STSM|ATOMS"),
    ("copy", r"LDGSTS|UBLKCP|UTMALDG"),
    ("global", r"LDG|STG|LD|ST"),
    ("local", r"LDL|STL"),
    ("parameter", r"U?LDC|LDCU"),
    ("atomic", r"ATOMG?|REDG?"),
    ("exchange", r"SHFL|MOVM|REDUX|VOTEU?|MATCH"),
    ("barrier", r"BAR|B2R|UCGABAR_\w+|WARPSYNC|SYNCS"),
    ("fence", r"MEMBAR|FENCE|DEPBAR|LDGDEPBAR|ERRBAR|CCTL|WARPGROUP|CGAERRBAR|ARRIVES"),
    ("branch", r"BRA|BRXU?|EXIT|BSSY|BSYNC|CALL|RET|BREAK|NANOSLEEP|YIELD|BPT|JMP|KILL|BMOV|WARPGROUPSET|"
               r"ENDCOLLECTIVE|RPCMOV"),
    ("predicate", r"U?ISETP|U?SEL|U?PLOP3|P2R|R2P|U?P2UR|UR2UP|CSEL"),
    ("move", r"U?MOV|R2UR|S2U?R|CS2R|GETLMEMBASE|LEPC|UR2R"),
    ("integer", r"U?IADD3|IADD|U?IMAD|U?LEA|U?SHF|U?LOP3|U?IABS|U?PRMT|V?IMNMX|U?BMSK|U?SGXT|VIADD|U?FLO|"
                r"U?POPC|U?BREV|IDP|VIADDMNMX|VABSDIFF|SHL|SHR|U?I2I\w*|IMNMX|UIMNMX|LOP|XMAD|ISCADD|VHMNMX"),
)
BYTES = 16  # of an instruction
OVERHEAD = ("integer", "predicate", "branch", "move", "parameter")
ANCHORS = ("tensor", "shared", "copy", "global", "exchange", "atomic")
# cycles from issue to a result that a scoreboard announces; Luo et al., arXiv 2402.13499 and 2501.12084,
# rounded
LATENCY = {"shared": 30, "exchange": 25, "special": 25, "convert": 15, "global": 270, "copy": 20,
           "atomic": 300, "parameter": 25, "tensor": 33, "fence": 20, "barrier": 20, "move": 15, "local": 35}
# wgmma are under way one after the other, each as long as its products take at the full rate of a
# multiprocessor, or its operands to come from shared memory (bounds.py); a warp that waits has the last one's
# sums this much later
_GMMA = re.compile(r"[HIQB]GMMA\.(\d+)x(\d+)x(\d+)")
GMMA_LATENCY = 30
_SECTION = re.compile(r"\.section\s+\.text\.([\w$]+)")
_PTX_LINE = re.compile(r'//## File "\.nv_debug_ptx_txt[^"]*", line (\d+)')
_LABEL = re.compile(r"\.L_\w+:|[\w$]+:")
_INSTRUCTION = re.compile(r"\s*(?:\{\s*)?/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)")
_APART = re.compile(r"BRA\.DIV[^`]*`\((\.L_\w+)\)")
_WORD = re.compile(r"/\* (0x[0-9a-f]{16}) \*/")


@dataclass
class Instruction:
    """block: number of its basic block. ptx: line of the PTX it was made of, 0 where none is said. control:
    stall, scoreboards set at the end of writing and reading (7: none), mask of those waited for."""

    opcode: str
    group: str
    block: int
    ptx: int
    control: tuple[int, int, int, int]


class UnknownOpcode(Exception):
    """A SASS opcode without a group."""


@cache
def group_of(opcode: str) -> str:
    """Raises UnknownOpcode."""
    word = opcode.split(".")[0]
    if opcode.startswith("IMAD.MOV"):
        return "move"
    for name, pattern in GROUPS:
        if re.fullmatch(pattern, word):
            return name
    raise UnknownOpcode(f"SASS: {opcode}: benchmarks/budget/sass.py has no group for it")


@cache
def _listing(key: tuple[str, int], text: TextOf, arch: int) -> list[Instruction]:
    return assembled(text.of, arch)


def code_of(text: Text, arch: int) -> list[Instruction]:
    """``assembled``, once a kernel."""
    return _listing(text.key, TextOf(text), arch)


def assembled(text: Text, arch: int) -> list[Instruction]:
    """The SASS of a kernel that has run, without NOPs. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.cubin"
        if cuda.SYMBOL.fullmatch(text.name):
            compiler = build_cuda.nvcc() or "nvcc"
            source = build_cuda.ptx(cuda.source_of(text.name), 80 if arch < 90 else arch)
            ptxas, target = Path(compiler).with_name("ptxas"), f"sm_{build_cuda.target(arch)}"
            _run(str(ptxas), "-arch", target, "-lineinfo", "--entry", text.name, "-o", out, str(source))
        else:
            source = Path(folder, "in.ptx")
            source.write_text(text.ptx)
            target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
            _run(get_ptxas(arch).path, "-lineinfo", f"--gpu-name={target}", "-o", out, str(source))
        return parsed(_run(triton.knobs.nvidia.nvdisasm.path, "-gp", "-c", "-hex", out), text.name)


def parsed(listing: str, name: str) -> list[Instruction]:
    found: list[Instruction] = []
    section, block, line, fresh, pending = "", 0, 0, True, None
    apart, left_out = set(_APART.findall(listing)), False
    for row in listing.split("\n"):
        if m := _SECTION.search(row):
            section, line = m[1], 0
        if section != name:
            continue
        if m := _PTX_LINE.search(row):
            line = int(m[1])
        elif m := _INSTRUCTION.match(row):
            if fresh:
                block, fresh = block + 1, False
            word = m[3].split(".")[0]
            group = "branch" if word == "NOP" else group_of(m[3])
            pending = Instruction(m[3], group, block, line, (0, 7, 7, 0))
            if word != "NOP" and not left_out:
                found.append(pending)
            fresh = word in ("BRA", "EXIT", "BRX", "BRXU", "RET", "CALL", "JMP", "BREAK")
            left_out = left_out and not (word == "BRA" and not m[2])
        elif pending is not None and (m := _WORD.search(row)):
            high = int(m[1], 16) >> 41
            pending.control = (high & 15, high >> 5 & 7, high >> 8 & 7, high >> 11 & 63)
            pending = None
        elif m := _LABEL.match(row.strip()):
            fresh, left_out = True, left_out or m[0][:-1] in apart
    return found


def trips(code: list[Instruction], executed: dict[int, float]) -> list[float]:
    """How often each instruction is issued; executed: PTX line -> how often it ran.

    Where a loop was unrolled or a block copied, a PTX line has several instructions, which share what it ran.
    An instruction of a unit that PTX drives with one instruction (memory, tensor cores, exchanges) tells how
    many; blocks without one count the blocks that have the same opcode from the same line. """
    copies = Counter((i.ptx, i.opcode) for i in code)
    blocks = Counter((ptx, opcode) for ptx, opcode, _ in {(i.ptx, i.opcode, i.block) for i in code})
    sure: dict[int, list[float]] = {}
    likely: dict[int, list[float]] = {}
    for i in code:
        if i.ptx in executed:
            key = i.ptx, i.opcode
            if i.group in ANCHORS:
                sure.setdefault(i.block, []).append(executed[i.ptx] / copies[key])
            likely.setdefault(i.block, []).append(executed[i.ptx] / blocks[key])
    chosen = {block: statistics.median_low(sure.get(block) or values) for block, values in likely.items()}
    return [chosen.get(i.block, 0.0) for i in code]


def mapped_share(code: list[Instruction], executed: dict[int, float], counts: list[float]) -> float:
    """Share of the issued instructions whose own PTX line ran as often as their block is taken to, or a whole
    number of times as often."""
    whole = sum(counts)
    agrees = lambda ran, n: n > 0 and ran >= n and abs(ran / n - round(ran / n)) < 1e-6
    agreeing = sum(n for i, n in zip(code, counts) if agrees(executed.get(i.ptx, 0.0), n))
    return agreeing / whole if whole else 1.0


def by_group(code: list[Instruction], counts: list[float]) -> Counter:
    found: Counter = Counter()
    for i, n in zip(code, counts):
        found[i.group] += n
    return found


def gmma_cycles(opcode: str) -> float:
    """Of a product of 16-bit numbers. What of it comes from shared memory an opcode does not say: b is taken to."""
    m, n, k = map(int, _GMMA.match(opcode).groups())
    return max(2 * m * n * k / 4096, 2 * n * k / 128)


def by_stage(
    code: list[Instruction], counts: list[float], stage_of: dict[int, str]
) -> dict[str, tuple[float, float]]:
    """stage -> (instructions issued, cycles of all warps together if each had its scheduler for itself).
    Cycles: the sum over blocks of the time that a block takes, times its trips, to the stage of each
    instruction."""
    found: dict[str, tuple[float, float]] = {}
    block, at, ready, products = None, 0.0, [0.0] * 6, 0.0
    for i, n in zip(code, counts):
        if i.block != block:
            block, at, ready, products = i.block, 0.0, [0.0] * 6, 0.0
        stall, write, read, wait = i.control
        before = at
        at = max([at, *(ready[b] for b in range(6) if wait >> b & 1)])
        if i.opcode.startswith("WARPGROUP.DEPBAR") and products:
            at = max(at, products + GMMA_LATENCY)
        products = max(products, at) + gmma_cycles(i.opcode) if _GMMA.match(i.opcode) else products
        if write < 6:
            ready[write] = max(ready[write], at + LATENCY.get(i.group, 15))
        if read < 6:
            ready[read] = max(ready[read], at + 15)
        at += max(1, stall)
        if n:
            stage = stage_of.get(i.ptx, UNKNOWN)
            issued, cycles = found.get(stage, (0.0, 0.0))
            found[stage] = issued + n, cycles + n * (at - before)
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout
