"""What is written of a case: counts from PTX, the cross-check with SASS, bounds and a prediction."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from benchmarks.budget import sass, stages
from benchmarks.budget.bounds import MACHINES, Costs, Machine, Prediction, predict
from benchmarks.budget.cases import Case
from benchmarks.budget.classes import flops
from benchmarks.budget.tally import Stage, Text, groups, known_share, recording, short, tally, total
from benchmarks.sources import kernel_hash
from tools.ptx.machine import Counts

Found = dict[tuple[str, int], tuple[Text, Counts]]


@dataclass
class Counted:
    """Of a unit of work. executed: kernel -> PTX line -> warp instructions; launches: of Triton's kernels."""

    case: Case
    stages: dict[str, Stage]
    texts: list[Text]
    executed: dict[tuple[str, int], dict[int, float]]
    launches: float


def count(case: Case) -> Counted:
    """Raises BuildError where a compiler is missing, Fault where a kernel is wrong."""
    with case.with_tiles(), recording(case.arch, case.backend == "cuda", case.together) as gpu:
        launched = lambda: sum(gpu.device.launches.values())
        few, marks = {}, [launched()]
        if case.few:
            few = gpu.counted(case.run(case.few))
        marks.append(launched())
        call = case.run(case.more)
        between = launched()
        more = gpu.counted(call)
        marks.append(launched() - between + marks[1])
    executed = {}
    for key, (text, counts) in more.items():
        before = few[key][1].executed if key in few else 0
        delta = (counts.executed - before) / case.per
        executed[key] = {i.line: float(n) for i, n in zip(text.kernel.instructions, delta)}
    launches = (marks[2] - marks[1]) - (marks[1] - marks[0])
    texts = [text for text, _ in more.values()]
    return Counted(case, tally(more, few, case.per), texts, executed, launches / case.per)


def counts_record(c: Counted) -> dict:
    """The part that the gate compares: of a unit of work, exact and the same in every run."""
    whole = total(c.stages)
    return {
        "kernel_of": c.case.case, "kernel": kernel_hash(c.case.case), "arch": c.case.arch,
        "unit": c.case.unit, "lengths": [c.case.few, c.case.more],
        **{k: v for k, v in whole.record().items() if k != "classes"},
        "groups": {n: short(v) for n, v in groups(whole.classes).most_common()},
        "stage_known": round(known_share(c.stages), 4),
        "stages": {n: s.record() for n, s in sorted(c.stages.items(), key=lambda s: -s[1].instructions)},
    }


def check_sass(c: Counted) -> dict:
    """The same unit in SASS, the assembler's own instructions at PTX's trip counts."""
    whole: Counter = Counter()
    per_stage: dict[str, list[float]] = {}
    agreeing, size, walked = 0.0, 0, 0
    for text in c.texts:
        lines = c.executed[text.key]
        code = sass.code_of(text, c.case.arch)
        issued = sass.trips(code, lines)
        size += sass.BYTES * len(code)
        walked += sass.BYTES * sum(n > 0 for n in issued)
        whole.update(sass.by_group(code, issued))
        agreeing += sass.mapped_share(code, lines, issued) * sum(issued)
        instructions = text.kernel.instructions
        named = dict(zip((i.line for i in instructions),
                         stages.stages(text.ptx, [i.line for i in instructions], text.short)))
        for stage, (n, cycles) in sass.by_stage(code, issued, named).items():
            kept = per_stage.setdefault(stage, [0.0, 0.0])
            kept[0] += n
            kept[1] += cycles
    waited = per_stage.pop(stages.WAIT, [0.0, 0.0])[0]
    instructions, of_ptx = sum(n for n, _ in per_stage.values()), total(c.stages).instructions
    return {
        "instructions": short(instructions), "of_ptx": round(instructions / (of_ptx or 1), 3),
        "agreeing": round(agreeing / (sum(whole.values()) or 1), 3), "waiting": short(waited),
        "spills": short(whole["local"]), "code_bytes": size, "code_bytes_of_a_unit": walked,
        "warp_cycles": short(sum(cycles for _, cycles in per_stage.values())),
        "overhead": round(sum(whole[g] for g in sass.OVERHEAD) / (sum(whole.values()) or 1), 3),
        "groups": {n: short(v) for n, v in whole.most_common() if v},
        "stages": {n: [short(v) for v in of] for n, of in sorted(per_stage.items(), key=lambda s: -s[1][0])},
    }


def costs(c: Counted, of_sass: dict) -> Costs:
    whole, size = total(c.stages), c.case.goal
    products: Counter = Counter()
    for text in c.texts:
        for i in text.kernel.instructions:
            if n := c.executed[text.key].get(i.line):
                kind = i.opcode.split(".")[0]
                if kind in ("mma", "wgmma"):
                    products[kind] += n * flops(i.opcode)
    chain = 0.0
    if size is not None and size.tasks:
        by_stage = {n: cycles for n, (_, cycles) in of_sass["stages"].items()}
        chain = sum(by_stage.get(stage, 0.0) / (tasks * size.warps) for stage, tasks in size.tasks)
    host = c.launches if c.case.kind == "grad" else 0
    return Costs(
        of_sass["instructions"], products["mma"], products["wgmma"], whole.wavefronts, whole.l2_bytes,
        of_sass["warp_cycles"], chain, host
    )


def prediction_record(p: Prediction, case: Case, machine: Machine, sectors: float) -> dict:
    size, seconds = case.goal, p.ms / 1e3
    by_sectors = 1e3 * size.units * sectors * 32 / machine["L2"]
    shares = {"of_matmul": size.flops / seconds / machine["GEMM"] if size.flops else None,
              "of_copy": size.bytes / seconds / machine["memory"] if size.bytes else None}
    return {
        "measured_as": case.measured_as, "on": machine.name, "ms": float(f"{p.ms:.4g}"), "limit": p.limit,
        "bounds_ms": {n: float(f"{v:.4g}") for n, v in sorted(p.bounds.items(), key=lambda b: -b[1])},
        "l2_by_sectors_ms": float(f"{by_sectors:.4g}"),
        "added_ms": {n: float(f"{v:.4g}") for n, v in p.added.items()},
        **{n: round(v, 4) for n, v in shares.items() if v is not None},
    }


def record(case: Case) -> dict:
    """Everything about a case."""
    c = count(case)
    found = counts_record(c)
    found["launches"] = c.launches
    found["kernels"] = sorted({t.short for t in c.texts})
    found["sass"] = check_sass(c)
    if case.goal is not None:
        machine = MACHINES[case.arch]
        found["prediction"] = prediction_record(
            predict(costs(c, found["sass"]), case.goal, machine), case, machine, found["sectors"]
        )
    return found
