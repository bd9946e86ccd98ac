"""Whether the PTX machine and the yardstick would notice a wrong kernel: nvcc's PTX with one instruction changed
is caught, by a fault of the machine or by a wrong result."""

import re

import cuda_in_ptx
import pytest
import torch
from cuda_in_ptx import BF16, FP16, config_of
from numerics import within_yardstick
from problems import cast, problem, results, run

from tools.ptx import cuda as ptx
from tools.ptx.machine import Kernel, UnknownInstruction

PREFILL = {  # (width, type, capability) -> the kernel
    "memory": (64, 4, BF16, 80, "_ZN4hope14titans_prefillILi64ENS_4bf16ELi0ELi1ELb1ELb0EEEvNS_12TitansParamsENS_4PlanE"),
    "clusters": (64, 2, FP16, 90, "_ZN4hope14titans_prefillILi64ENS_4fp16ELi0ELi0ELb1ELb0EEEvNS_12TitansParamsENS_4PlanE"),
}
gpu: ptx.Driver


@pytest.fixture(scope="module", autouse=True)
def driver():
    global gpu
    with cuda_in_ptx.driven() as gpu:
        yield


class Judge:
    """Runs a problem of two commits, and says how a changed kernel is caught: "race", "deadlock", .., "yardstick";
    None if it is not."""

    def __init__(self, way: str):
        width, mult, dtype, self.capability, self.name = PREFILL[way]
        self.config = config_of(width, mult)
        given = problem(self.config, 2, 39, 0.5)
        self.given = [cast(t, dtype) for t in given]
        self.exact, self.peer = (
            results(*run(self.config, *(cast(t, kind) for t in given), "chunked", [39, 30]))
            for kind in (torch.float64, dtype)
        )
        cuda_in_ptx.emulate(gpu, self.capability)
        self.text = ptx.text(self.name, gpu.arch)
        self.lines = self.text.split("\n")
        assert self.of(self.text) is None

    def of(self, text: str) -> str | None:
        """What catches the kernel with this PTX."""
        try:
            changed = Kernel(text, self.name)
        except UnknownInstruction:
            return "decoder"
        gpu.kernel = lambda name, arch: changed if name == self.name else ptx.kernel(name, arch)
        try:
            for seed in (1, 2, 3):
                cuda_in_ptx.emulate(gpu, self.capability, seed)
                found = results(*run(self.config, *self.given, "cuda", [39, 30]))
                for name, t in found.items():
                    within_yardstick(t, self.peer[name], self.exact[name], name)
        except AssertionError:
            return "yardstick"
        except RuntimeError as error:
            assert "Fault: " in str(error), error
            return re.search(r"Fault: (\w+( of bounds)?)", str(error))[1]
        finally:
            gpu.kernel = ptx.kernel
        return None

    def at(self, pattern: str) -> list[int]:
        """The lines of such instructions."""
        found = [n for n, line in enumerate(self.lines) if re.search(pattern, line)]
        assert found, pattern
        return found

    def without(self, n: int) -> str:
        return self.replaced(n, "")

    def replaced(self, n: int, line: str) -> str:
        return "\n".join([*self.lines[:n], line, *self.lines[n + 1 :]])


@pytest.fixture(scope="module", params=PREFILL)
def judge(request, driver):
    return Judge(request.param)


def tally(judge: Judge, lines: list[int], change) -> dict[str | None, list[str]]:
    """What catches the change at each of the lines: the instructions, by it."""
    found: dict[str | None, list[str]] = {}
    for n in lines:
        found.setdefault(judge.of(change(n)), []).append(f"{n + 1}: {judge.lines[n].strip()}")
    return found


def test_a_dropped_barrier(judge):
    found = tally(judge, judge.at(r"bar\.sync|barrier\.cluster"), judge.without)
    print(found)


def test_a_swapped_fragment(judge):
    def change(n):
        return judge.replaced(n, re.sub(r"\}, \{(%\w+), (%\w+), ", r"}, {\2, \1, ", judge.lines[n], count=1))

    found = tally(judge, judge.at(r"mma\.sync")[::40], change)
    print(found)


def hoisted(lines: list[str], barrier: int) -> str | None:
    """The first load from shared memory after a barrier moved before it; None if it needs what lies between."""
    made = set()
    for n in range(barrier + 1, len(lines)):
        line = lines[n].strip()
        if not line or line.startswith("."):
            continue
        if re.match(r"\$L|bra|@|bar|ret|\}", line):
            return None
        if re.match(r"ld\.shared|ldmatrix", line) and not made & set(re.findall(r"%\w+", line.split("[")[1])):
            return "\n".join([*lines[:barrier], lines[n], *lines[barrier:n], "", *lines[n + 1 :]])
        made |= set(re.findall(r"%\w+", line))
    return None


def test_a_load_moved_before_the_barrier(judge):
    moved = [text for n in judge.at(r"bar\.sync") if (text := hoisted(judge.lines, n))]
    print(len(moved), [judge.of(t) for t in moved])


def test_a_wrong_offset_in_shared_memory(judge):
    def change(n):
        return judge.replaced(n, re.sub(r"\[(%\w+)(\+\d+)?\]", lambda m: f"[{m[1]}+{int(m[2] or 0) + 16}]", judge.lines[n]))

    found = tally(judge, judge.at(r"\b(ld|st)\.shared\.v4|ldmatrix")[::10], change)
    print(found)


def test_a_copy_that_nobody_waits_for(judge):
    found = tally(judge, judge.at(r"cp\.async\.wait_all"), judge.without)
    print(found)


def test_a_weaker_order(judge):
    weaker = {"atom.add.acq_rel": "atom.add.relaxed", "ld.acquire": "ld.relaxed", "arrive.release": "arrive.relaxed"}

    def change(n):
        line = judge.lines[n]
        for order, less in weaker.items():
            line = line.replace(order, less)
        return judge.replaced(n, line)

    found = tally(judge, judge.at("|".join(map(re.escape, weaker))), change)
    print(found)
