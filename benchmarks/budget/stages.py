"""The stage of every instruction: which part of a kernel's work it belongs to.

An instruction comes from a line of a function that was inlined into another, and so on up to the kernel: the
compilers write this into PTX as .loc. The stage is that of the outermost function that has one in STAGES, or
"wait" where one of the functions waits for other programs: those loops run as often as a schedule likes, and
are counted apart. """

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
WAIT = "wait"
WAITS = ("_wait", "arrive_and_wait", "pause")
UNKNOWN = "unknown"
STAGES = {
    # Triton, the memory's forward (hope_kernels/ops/titans/triton/schedule.py)
    "read_task": "read", "append_task": "append", "close_task": "close", "clock_body": "clock",
    "momentum_body": "momentum", "errors_task": "errors", "hidden_task": "hidden", "gain_task": "gain",
    "update_task": "update", "_done": "release", "_slots": "schedule", "_extent": "schedule", "_commit": "",
    "scan_kernel": "schedule",
    # and where memories are carried (carry.py)
    "rounded_full": "read", "read_full": "read", "put_full": "read", "read_gates": "read gates",
    "commit_full": "commit",
    "commit_gates": "commit gates", "clock_block": "clock", "full_member": "carry", "gates_member": "carry",
    "carry_kernel": "carry",
    # CUDA C++ (csrc/cuda/titans/prefill.cuh, commit.cuh, clock.cuh)
    "evaluate": "evaluate", "errors": "errors", "gradients": "gradients", "key_products": "key products",
    "decays": "decays", "transformed_keys": "transformed keys", "step_sizes": "step sizes",
    "update_inputs": "update inputs", "update_outputs": "update outputs",
    "update_scalar_outputs": "update outputs", "read_shares": "read", "finish_panel": "results",
    "read_results": "results", "fetch": "fetch", "fetch_panel": "fetch", "round_block": "weights",
    "base_block": "weights", "block": "weights", "at": "weights", "for_blocks": "weights",
    "put_shares": "shares", "put_norms": "shares", "begin": "exchange",
    "acquire": "exchange", "release": "exchange", "load_deviations": "state", "load_scalar_weights": "state",
    "move_pending": "state", "clear_pending": "state", "store_block": "state", "run": "commit",
    "load_state": "state", "store_state": "state", "enter": "state", "round_weights": "weights",
    "clear_outputs": "results", "commit_pending": "commit", "prefill": "panel loop",
    "titans_prefill": "panel loop", "decode": "decode", "titans_decode": "decode", "titans_step": "decode",
    "step": "decode", "count_tokens": "count",
}
_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)([^/]*)(?://\s*(.*))?")
_INLINED = re.compile(r"inlined_at\s+(\d+)\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.M)
_FRAME = re.compile(r"([\w.]+\.py):(\d+):\d+")
_CUDA_FUNCTION = re.compile(
    r"^\s*(?:template <[^;{]*> )?(?:static )?(?:HOPE_DEVICE|HOPE_KERNEL\(\w+\))\s+(?:static )?"
    r"[^;{(]*?(operator.|\w+)\("
)
_LAMBDA = re.compile(r"^(\s*)const auto (\w+) = \[&\]")

Frame = tuple[str, int]  # a file of the repository, or the name of another one, and a line


def stage_of(functions: list[str], kernel: str) -> str:
    """functions: from the kernel inwards."""
    if any(name in WAITS for name in functions):
        return WAIT
    found = [STAGES[name] for name in functions if STAGES.get(name)]
    # the kernel's own code and the schedule's are what is left over: a function further in says more
    outer = ("panel loop", "schedule", "carry", "commit", "decode")
    inner = [stage for stage in found if stage not in outer]
    return inner[0] if inner else found[-1] if found else STAGES.get(kernel, kernel) if functions else UNKNOWN


def stages(ptx: str, lines: list[int], kernel: str) -> list[str]:
    """Of the instructions at these lines of a PTX text, in ascending order. kernel: the stage of what belongs
    to no function in STAGES."""
    return [stage_of([function_at(*frame) for frame in reversed(f)], kernel) for f in frames(ptx, lines)]


def frames(ptx: str, lines: list[int]) -> list[tuple[Frame, ...]]:
    """Where each instruction comes from, innermost first; () where the compiler says nothing."""
    names = {int(n): _local(f"{folder}/{name}" if name else folder) for n, folder, name in _FILE.findall(ptx)}
    by_base = {Path(name).name: name for name in names.values()}
    chains: dict[tuple[int, int, int], tuple[Frame, ...]] = {}  # of the latest .loc at (file, line, column)
    known: dict[str, tuple[Frame, ...]] = {}
    found, at, present = [], 0, ()
    for number, text in enumerate(ptx.split("\n"), 1):
        while at < len(lines) and lines[at] <= number:
            found.append(present)
            at += 1
        if not (m := _LOC.match(text)):
            continue
        place = int(m[1]), int(m[2]), int(m[3])
        here: Frame = names.get(place[0], ""), place[1]
        if m[5] and ".py:" in m[5]:
            if text not in known:
                known[text] = tuple((by_base.get(n, n), int(k)) for n, k in _FRAME.findall(m[5]))
            present = known[text]
        elif inlined := _INLINED.search(m[4]):
            site = tuple(map(int, inlined.groups()))
            outer = chains.get(site, ((names.get(site[0], ""), site[1]),))
            present = (here, *outer)
        elif here[1]:
            present = (here,)
        else:  # line 0: code that was moved or merged counts where it was put
            continue
        chains[place] = present
    found += [present] * (len(lines) - len(found))
    return found


def _local(path: str) -> str:
    """A path relative to the repository; the file's name for others."""
    for top in ("hope_kernels", "csrc"):
        if f"/{top}/" in path:
            return str(Path(top, *Path(path.split(f"/{top}/", 1)[1]).parts))
    return Path(path).name


@cache
def _functions(path: str) -> list[tuple[int, int, str]]:
    """(first line, last line, name), inner functions after those around them."""
    file = ROOT / path
    if "/" not in path or not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    if path.endswith(".py"):
        found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
        return sorted((n.lineno, n.end_lineno or n.lineno, n.name) for n in found)
    lines = text.split("\n")
    defined = [(k, m[1]) for k, line in enumerate(lines, 1) if (m := _CUDA_FUNCTION.match(line))]
    ends = [k for k, _ in defined[1:]] + [len(lines) + 1]
    whole = [(first, end - 1, name) for (first, name), end in zip(defined, ends)]
    inner = []
    for k, line in enumerate(lines, 1):
        if m := _LAMBDA.match(line):
            last = next(i for i in range(k, len(lines) + 1) if lines[i - 1].startswith(m[1] + "};"))
            inner.append((k, last, m[2]))
    return whole + inner


@cache
def function_at(path: str, line: int) -> str:
    """The innermost function of a file that has this line; "" if none is known."""
    found = ""
    for first, last, name in _functions(path):
        if first <= line <= last:
            found = name
    return found
