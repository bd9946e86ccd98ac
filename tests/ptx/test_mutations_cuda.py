"""Whether the PTX machine and the tests would notice a wrong kernel: nvcc's PTX with one instruction changed
is caught, by a fault of the machine or by a wrong result; which changes by which, CHANGES says."""

import re

import cuda_in_ptx
import pytest
import torch
from cuda_in_ptx import BF16, FP16, config_of
from numerics import within_yardstick
from problems import cast, part, problem, results, run

from hope_kernels.ops import titans_chunk
from tools.ptx import cuda as ptx
from tools.ptx.machine import Kernel

ENDING = "EEEvNS_12TitansParamsENS_4PlanE"
KERNELS = {  # (width, hidden_mult, type, capability), and the kernel that is changed
    "memory": (64, 4, BF16, 80, f"_ZN4hope14titans_prefillILi64ENS_4bf16ELi0ELi1ELb1ELb0{ENDING}"),
    "clusters": (64, 2, FP16, 90, f"_ZN4hope14titans_prefillILi64ENS_4fp16ELi0ELi0ELb1ELb0{ENDING}"),
}
gpu: ptx.Driver


@pytest.fixture(scope="module", autouse=True)
def driver():
    global gpu
    with cuda_in_ptx.driven() as gpu:
        yield


class Judge:
    """Runs a problem that goes every way through a kernel, and says how a changed kernel is caught: by a
    fault ("race", "deadlock", ..), by the "yardstick", or by "bits" that are not those of the source; None if
    it is not."""

    def __init__(self, way: str):
        width, mult, self.dtype, self.capability, self.name = KERNELS[way]
        self.config = config_of(width, mult).replace(grad_scale=8.0)  # the step clip holds: its sums weigh in
        w_init, inputs = problem(self.config, 2, 60)
        # steps are long and little is forgotten: what earlier chunks have written weighs in
        one = torch.ones_like(inputs.eta_bias)
        self.given = w_init, inputs._replace(eta_bias=one, alpha_bias=5 * one)
        self.exact, self.peer = (self.found("chunked", kind) for kind in (torch.float64, self.dtype))
        cuda_in_ptx.emulate(gpu, self.capability)
        with gpu.fibers():
            self.want = self.found("cuda", self.dtype)
        self.lines = ptx.text(self.name, gpu.arch).split("\n")
        kernel = Kernel("\n".join(self.lines), self.name)
        assert self.caught(kernel) is None
        self.executed = {i.line - 1 for i, n in zip(kernel.instructions, kernel.counts.executed) if n}

    def found(self, backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Results of 39 and 31 tokens, of one more, with which the second row commits, and of a pure read."""
        w_init, inputs = (cast(t, dtype) for t in self.given)
        o, state = run(self.config, w_init, part(inputs, 0, 39), backend, [39, 31])
        step, state = run(self.config, w_init, part(inputs, 39, 40), backend, state=state)
        with torch.no_grad():
            rest = part(inputs, 40, 60)
            read, state = titans_chunk(self.config, w_init, rest, state, update=False, backend=backend)
        found = results(o, state) | {"step": step, "read": read}
        found["delta2"] = found["delta2"].unflatten(2, (-1, self.config.hidden))
        memories = {f"{n} {m}": found[n].select(2, m) for n in ("delta2", "delta1", "delta1s")
                    for m in range(found[n].shape[2])}  # each by itself: they differ in size
        return {f"{n}, row {row}": t[row] for n, t in (found | memories).items() for row in range(2)}

    def caught(self, kernel: Kernel) -> str | None:
        gpu.kernel = lambda name, arch: kernel if name == self.name else ptx.kernel(name, arch)
        try:
            for seed in (1, 2, 3):
                cuda_in_ptx.emulate(gpu, self.capability, seed)
                found = self.found("cuda", self.dtype)
                for name, t in found.items():
                    within_yardstick(t, self.peer[name], self.exact[name], name)
        except AssertionError:
            return "yardstick"
        except RuntimeError as error:
            fault = re.search(r"Fault: \w+: (?:block \d+ warp \d+(?: lane \d+)?: )?(\w+)", str(error))
            return fault[1]
        finally:
            gpu.kernel = ptx.kernel
        return None if all(torch.equal(t, self.want[name]) for name, t in found.items()) else "bits"

    def at(self, pattern: str) -> list[int]:
        """The lines of such instructions that are executed."""
        found = [n for n, line in enumerate(self.lines) if n in self.executed and re.search(pattern, line)]
        assert found, pattern
        return found

    def changed(self, n: int, *lines: str, dropped: int | None = None) -> str | None:
        """What catches the kernel whose line ``n`` is replaced, and whose line ``dropped`` is left out."""
        text = list(self.lines)
        if dropped is not None:
            text[dropped] = ""
        text[n : n + 1] = lines
        return self.caught(Kernel("\n".join(text), self.name))

    def without(self, n: int, change) -> str | None:
        """What catches the kernel whose line ``n`` is changed. A wait looks again and again, first in one line and
        then in another, and which of them sees the end depends on the schedule: all of a wait are changed."""
        address = re.search(r"ld\.acquire.*(\[.*\])", self.lines[n])
        same = [i for i in self.at(r"ld\.acquire") if address[1] in self.lines[i]] if address else [n]
        text = list(self.lines)
        for i in same:
            text[i] = change(text[i])
        return self.caught(Kernel("\n".join(text), self.name))

    def hoisted(self, barrier: int) -> str | None:
        """The same of one whose first load of tokens or sums after a barrier is done before it, with what its
        address is made of. "none": there is no such load."""
        load = r"ldmatrix|ld\.shared\.(v4\.)?f32"
        after = [n for n in range(barrier + 1, barrier + 700) if n in self.executed]
        n = next((n for n in after if re.search(load, self.lines[n])), None)
        if n is None:
            return "none"
        needed, made = set(re.findall(r"%\w+", self.lines[n].split("[")[1])), []
        for line in reversed(self.lines[barrier + 1 : n]):
            if re.match(r"\s*([.$@/{}]|bra|st|bar|$)", line):
                continue
            written = line.split("}" if "{" in line else ",")[0]
            if needed & set(re.findall(r"%\w+", written)):
                made.append(line)
                needed |= set(re.findall(r"%\w+", line))
        return self.changed(barrier, *reversed(made), self.lines[n], self.lines[barrier], dropped=n)


@pytest.fixture(scope="module", params=KERNELS)
def judge(request, driver):
    return Judge(request.param)


WEAKER = {"acq_rel": "relaxed", "ld.acquire": "ld.relaxed", "arrive.release": "arrive.relaxed"}


def weakened(line: str) -> str:
    for order, less in WEAKER.items():
        line = line.replace(order, less)
    return line


def swapped(line: str) -> str:
    """Rows g and g + 8 of the first operand exchanged."""
    return re.sub(r"\}, \{(%\w+), (%\w+), ", r"}, {\2, \1, ", line, count=1)


def shifted(line: str) -> str:
    """16 bytes on."""
    return re.sub(r"\[(%\w+)(?:\+(-?\d+))?\]", lambda m: f"[{m[1]}+{int(m[2] or 0) + 16}]", line)


BARRIER, DATA = r"bar\.sync|barrier\.cluster", r"ldmatrix|(ld|st)\.shared\.v4\.f32"
CHANGES = {  # the instructions, what becomes of them, and by what that is caught
    "dropped barrier": (BARRIER, lambda line: "", {"race", "stores", "waits", "arrives"}),
    "dropped wait for copies": (r"cp\.async\.wait_all", lambda line: "", {"race"}),
    "weaker order": ("|".join(map(re.escape, WEAKER)), weakened, {"race"}),
    "swapped fragment": (r"mma\.sync", swapped, {"yardstick", "bits"}),
    "wrong offset": (DATA, shifted, {"yardstick", "bits", "race", "out"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_caught(judge, change):
    pattern, changed, by = CHANGES[change]
    lines = judge.at(pattern)
    n = lines[2 * len(lines) // 3]
    assert judge.without(n, changed) in by, judge.lines[n]


def test_a_load_moved_before_the_barrier_is_caught(judge):
    barriers = judge.at(r"bar\.sync")
    assert judge.hoisted(barriers[-3]) == "race"


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_caught(judge, change):
    """Of tensor-core products and offsets every eighth."""
    pattern, changed, by = CHANGES[change]
    lines = judge.at(pattern)
    if change == "weaker order":
        lines = lines[1:]  # the first tells who a block is, or that it has started; no data go with it
    if len(lines) > 60:
        lines = lines[::8]
    missed = [(n + 1, judge.lines[n].strip()) for n in lines
              if judge.without(n, changed) not in by]
    assert not missed


@pytest.mark.slow
def test_loads_moved_before_barriers_are_caught(judge):
    """Most of them: the first load after a barrier may be of what was there before it (in a commit: the tokens, a
    warp's own sums, the chunk's decay). A load out of a loop is done once, which the results show."""
    found = [judge.hoisted(n) for n in judge.at(r"bar\.sync")]
    assert found.count("race") >= 4 and found.count(None) <= 3, found
