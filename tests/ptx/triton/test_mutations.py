"""Whether the PTX machine and the yardstick would notice a wrong kernel: the memory's scan with one instruction
changed is caught, by a fault of the machine or by a wrong result.

Some changes change nothing (a barrier beside another one, an order that another release brings about): of a sample
of places, four in five must be caught.
"""

import re
from collections import Counter

import pytest
import torch
from numerics import within_yardstick
from problems import cast, problem, results, run

from hope_kernels import TitansConfig
from tools.ptx.machine import Fault, Kernel, Options, UnknownInstruction

# architecture, configuration, tokens, the kernel that serves it
SCANS = {
    80: (80, TitansConfig(32, 1), 39, "scan_kernel"),
    90: (90, TitansConfig(64, 1, chunk_memory=64, chunk_other=64), 140, "scan_kernel"),
}
CARRIED = {"carried": (90, TitansConfig(64, 1), 53, "carry_kernel")}
ORDER = re.compile(r"\.(acquire|release|acq_rel)")


class Judge:
    """Runs a problem of two commits, and says how a changed scan is caught; None if it is not."""

    def __init__(self, device, name):
        arch, self.config, tokens, kernel = (SCANS | CARRIED)[name]
        self.device, self.lengths = device, [tokens, tokens - 9]
        device.arch = arch
        given = problem(self.config, 2, tokens, 0.5)
        self.given = [cast(t, torch.bfloat16) for t in given]
        self.exact, self.peer = (
            results(*run(self.config, *(cast(t, kind) for t in given), "chunked", self.lengths))
            for kind in (torch.float64, torch.bfloat16)
        )
        before = set(device.kernels)
        self.unchanged = results(*run(self.config, *self.given, "triton", self.lengths))
        assert self.verdict() is None
        new = [t for t in device.kernels if t not in before or f".target sm_{arch}" in t]
        self.text = next(
            t for t in reversed(new) if f"entry {kernel}(" in t and device.kernels[t].counts.executed.any()
        )
        self.kernel, self.lines = device.kernels[self.text], self.text.split("\n")
        self.executed = {
            i.line - 1 for i, n in zip(self.kernel.instructions, self.kernel.counts.executed) if n
        }

    def verdict(self) -> str | None:
        try:
            for seed in (1, 2):
                self.device.options = Options(seed=seed)
                found = results(*run(self.config, *self.given, "triton", self.lengths))
                for name, t in found.items():
                    within_yardstick(t, self.peer[name], self.exact[name], name)
                # whatever the schedule, a kernel has bits of its own
                differ = [name for name, t in found.items() if not torch.equal(t, self.unchanged[name])]
                assert not differ, differ
        except AssertionError:
            return "yardstick"
        except Fault as fault:
            return "race" if ": race" in str(fault) else "fault"
        return None

    def of(self, text: str) -> str | None:
        """What catches the scan with this PTX."""
        try:
            changed = Kernel(text)
        except (UnknownInstruction, ValueError):
            return "decoder"
        self.device.changed[self.kernel] = changed
        try:
            return self.verdict()
        finally:
            self.device.changed.clear()

    def at(self, pattern: str) -> list[int]:
        found = [n for n, line in enumerate(self.lines) if re.search(pattern, line) and n in self.executed]
        assert found, pattern
        return found

    def replaced(self, n: int, line: str = "") -> str:
        return "\n".join([*self.lines[:n], line, *self.lines[n + 1 :]])

    def hoisted(self, barrier: int) -> str | None:
        """The first load from shared memory after a barrier moved before it; None if it needs what lies between."""
        made = set()
        for n in range(barrier + 1, len(self.lines)):
            line = self.lines[n].strip()
            if not line or line.startswith((".", "//")):
                continue
            if re.match(r"\$L|bra|@|bar|ret|\}", line):
                return None
            if re.match(r"ld\.shared|ldmatrix", line) and not made & set(re.findall(r"%\w+", line.split("[")[1])):
                before, between, after = self.lines[:barrier], self.lines[barrier:n], self.lines[n + 1 :]
                return "\n".join([*before, self.lines[n], *between, "", *after])
            made |= set(re.findall(r"%\w+", line))
        return None

    def tally(self, texts: list[str | None], sample: int = 8) -> Counter:
        """What catches a sample of changed texts; four in five of them must be."""
        texts = [t for t in texts if t]
        texts = texts[:: max(1, len(texts) // sample)][:sample]
        caught = Counter(map(self.of, texts))
        assert caught[None] <= len(texts) / 5, caught
        return caught


@pytest.fixture(params=SCANS)
def judge(request, device, judges={}):  # noqa: B006
    if request.param not in judges:
        judges[request.param] = Judge(device, request.param)
    device.arch = (SCANS | CARRIED)[request.param][0]
    return judges[request.param]


def test_a_dropped_barrier(judge):
    caught = judge.tally([judge.replaced(n) for n in judge.at(r"bar\.sync")])
    assert caught["race"]


def test_a_load_moved_before_the_barrier(judge):
    caught = judge.tally([judge.hoisted(n) for n in judge.at(r"bar\.sync")])
    assert caught["race"]


def test_a_swapped_fragment(judge):
    def swapped(n):
        return judge.replaced(n, re.sub(r"\}, \{\s*(%\w+),\s*(%\w+),", r"}, {\2, \1,", judge.lines[n], count=1))

    caught = judge.tally([swapped(n) for n in judge.at(r"mma(_async)?\.sync.*\}, \{")])
    assert caught["yardstick"]


def test_a_wrong_offset_in_shared_memory(judge):
    def moved(n):
        by = lambda m: f"[{m[1]}+{int((m[2] or '+0')[1:]) + 16}]"
        return judge.replaced(n, re.sub(r"\[\s*(%\w+)\s*(\+\s*\d+)?\s*\]", by, judge.lines[n]))

    stores = judge.at(r"st\.shared\.v4|stmatrix.*\.x4")
    caught = judge.tally([moved(n) for n in stores])
    assert caught["race"] + caught["yardstick"] + caught["fault"]


def test_a_weaker_order_between_programs(judge):
    waits = judge.at(r"ld\.global\.gpu\.acquire|atom\.global\.gpu\.release")
    caught = Counter(judge.of(judge.replaced(n, ORDER.sub(".relaxed", judge.lines[n]))) for n in waits)
    # where a program has acquired the same work by another counter, or has done it itself, nothing is lost
    assert set(caught) <= {"race", None} and caught["race"] > len(waits) / 2, caught


@pytest.mark.parametrize("judge", [90], indirect=True)
def test_copies_and_products_that_nobody_waits_for(judge):
    for pattern, how in ((r"cp\.async\.wait_group", {"race"}), (r"wgmma\.wait_group", {"race", "yardstick", "fault"}),
                         (r"fence\.proxy\.async", {"fault"}), (r"wgmma\.fence", {"fault"})):
        caught = judge.tally([judge.replaced(n) for n in judge.at(pattern)], sample=3)
        assert set(caught) <= how | {None}, pattern


@pytest.mark.parametrize("judge", CARRIED, indirect=True)
def test_a_weaker_order_between_programs_that_exchange(judge):
    orders = judge.at(r"ld\.global\.gpu\.acquire|atom\.global\.gpu\.release")
    assert len(orders) >= 7  # each member releases and acquires what is read, and the clock once
    caught = Counter(judge.of(judge.replaced(n, ORDER.sub(".relaxed", judge.lines[n]))) for n in orders)
    assert set(caught) <= {"race", None} and caught["race"] > len(orders) / 2, caught
