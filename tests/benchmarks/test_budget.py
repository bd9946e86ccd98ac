"""Counts, bounds and the gate of benchmarks/budget, on kernels written here and on the committed file.

Counting itself runs in a process of its own: Triton decides when it is imported whether it interprets
kernels. """

import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.budget import gate, predicted
from benchmarks.budget.classes import GROUPS, UnknownOpcode, class_of, flops, group_of
from benchmarks.budget.stages import STAGES, WAIT, WAITS, _functions, stage_of, stages
from benchmarks.goals import GOALS
from benchmarks.records import RESULTS
from benchmarks.sources import ROOT
from tools import build_cuda

BUDGET = json.loads((RESULTS / "budget.json").read_text())
needs_compiler = pytest.mark.skipif(build_cuda.host_compiler() is None, reason="needs a C++ compiler")
needs_nvcc = pytest.mark.skipif(
    build_cuda.nvcc() is None or build_cuda.host_compiler() is None, reason="needs nvcc and a C++ compiler"
)
TEXT = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry copies(
	.param .u64 copies_param_0,
	.param .u32 copies_param_1
)
{
	.reg .pred %p<2>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<4>;
	.loc	1 7 1
	ld.param.b64 %rd1, [copies_param_0];
	ld.param.b32 %r1, [copies_param_1];
	mov.u32 %r2, %tid.x;
	mul.lo.s32 %r3, %r2, STRIDE;
	mov.u32 %r4, memory;
	add.s32 %r5, %r4, %r3;
$L_loop:
	st.shared.b32 [%r5], %r2;
	MORE
	sub.s32 %r1, %r1, 1;
	setp.gt.s32 %p1, %r1, 0;
	@%p1 bra $L_loop;
	mul.wide.s32 %rd2, %r2, SPREAD;
	add.s64 %rd3, %rd1, %rd2;
	st.global.b32 [%rd3], %r2;
	ret;
}
	.file	1 "schedule.py"
"""


def counted(stride=4, spread=4, turns=3, more=""):
    """Counts of one warp that stores to shared memory ``turns`` times, every lane ``stride`` bytes on, and
    once to global memory, ``spread`` bytes on."""
    from tools.ptx.machine import Kernel, Options, Region

    text = TEXT.replace("STRIDE", str(stride)).replace("SPREAD", str(spread)).replace("MORE", more)
    kernel, out = Kernel(text), torch.zeros(4096, dtype=torch.uint8)
    kernel.launch((1, 1, 1), 32, struct.pack("<QI", out.data_ptr(), turns),
                  [Region(out.data_ptr(), 4096, "out")], shared=4096,
                  options=Options(races=False, measure=True))
    return kernel, kernel.counts


def of(kernel, counts, opcode):
    k = next(k for k, i in enumerate(kernel.instructions) if i.opcode == opcode)
    return int(counts.executed[k]), int(counts.wavefronts[k]), int(counts.sectors[k])


# -- counts
# ----------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("stride, wavefronts", [(4, 1), (8, 2), (12, 1), (16, 4), (128, 32), (0, 1)])
def test_bank_conflicts(stride, wavefronts):
    """32 banks of 4 bytes: a lane 12 bytes on is in a bank of its own, one 128 bytes on in the same as
    all."""
    assert of(*counted(stride=stride), "st.shared.b32") == (3, 3 * wavefronts, 0)


@needs_compiler
@pytest.mark.parametrize("spread, sectors", [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_sectors(spread, sectors):
    assert of(*counted(spread=spread), "st.global.b32") == (1, 0, sectors)


@needs_compiler
@pytest.mark.parametrize("source, sectors", [(4, 3), (0, 0)])
def test_a_copy_that_only_fills_with_zeros_reads_nothing(source, sectors):
    copy = f"mov.u32 %r6, {source};\n\tcp.async.ca.shared.global [%r5], [%rd1], 4, %r6;"
    assert of(*counted(more=copy), "cp.async.ca.shared.global") == (3, 0, sectors)


@pytest.mark.parametrize("opcode, name", [
    ("fma.rn.f32", "float"), ("add.s64", "address"), ("mad.wide.u32", "address"), ("add.s32", "integer"),
    ("cvt.s64.s32", "address"), ("cvt.rn.bf16x2.f32", "convert"), ("setp.lt.f32", "float"),
    ("setp.lt.s32", "predicate"), ("and.pred", "predicate"), ("ld.shared.v4.b32", "shared load 16"),
    ("st.global.b16", "global store 2"), ("ld.v2.u32", "generic load 8"), ("ld.param.u64", "parameter"),
    ("ld.global.gpu.acquire.b64", "atomic"), ("cp.async.cg.shared.global", "copy"),
    ("cp.async.wait_group", "fence"),
    ("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "shared load 16"), ("div.full.f32", "special"),
    ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "tensor"), ("wgmma.fence.sync.aligned", "fence"),
    ("st.shared::cluster.u32", "shared store 4"), ("div.s32", "integer"), ("bar.sync", "barrier"),
])
def test_classes(opcode, name):
    assert class_of(opcode) == name and group_of(name) in {*GROUPS, "generic"}


def test_an_opcode_without_a_class_is_an_error():
    for opcode in ("tcgen05.mma.cta_group::1.kind::f16", "frobnicate.b32"):
        with pytest.raises(UnknownOpcode, match=re.escape(opcode)):
            class_of(opcode)


def test_flops_of_products():
    assert flops("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == 2 * 16 * 8 * 16
    # four warps execute it
    assert 4 * flops("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16") == 2 * 64 * 128 * 16
    assert flops("fma.rn.f32") == flops("wgmma.fence.sync.aligned") == 0


# -- stages
# ----------------------------------------------------------------------------------------------------


def test_the_stage_is_that_of_the_outermost_function_that_has_one():
    assert stage_of(["titans_prefill", "prefill", "run", "evaluate", "hidden_group"], "k") == "evaluate"
    assert stage_of(["scan_kernel", "_commit", "update_task", "_slots"], "k") == "update"
    assert stage_of(["scan_kernel", "_commit", "_wait"], "k") == WAIT
    assert stage_of(["carry_kernel", "full_member", "commit_full", "sigma"], "k") == "commit"
    assert stage_of(["carry_kernel", "full_member", "clock_block", "_product"], "k") == "clock"
    assert stage_of(["scan_kernel", "_commit"], "k") == "schedule" and stage_of(["add"], "k") == "k"


def test_stages_of_inlined_code():
    """nvcc names the line that a function was inlined at, and the .loc of that line the next; LLVM writes
    all."""
    commit = (ROOT / "csrc/cuda/titans/commit.cuh").read_text().split("\n")
    prefill = (ROOT / "csrc/cuda/titans/prefill.cuh").read_text().split("\n")
    at = lambda lines, text: next(k for k, line in enumerate(lines, 1) if text in line)
    site, call = at(commit, "evaluate(slope, panel);"), at(prefill, ".run(state)")
    body = at(commit, "store_norms(0, panel, norm, warp, lane);")
    text = "\n".join([
        '.file 1 "/x/csrc/cuda/titans/prefill.cuh"', '.file 2 "/x/csrc/cuda/titans/commit.cuh"',
        f".loc 1 {call} 7", f".loc 2 {site} 7, function_name $L__info_string1, inlined_at 1 {call} 7",
        f".loc 2 {body} 5, function_name $L__info_string2, inlined_at 2 {site} 7", "add.s32 a, b, c;",
        ".loc 2 0 5", "add.s32 a, b, c;",
        '.file 3 "/x/hope_kernels/ops/titans/triton/commit.py"',
        '.file 4 "/x/hope_kernels/ops/titans/triton/schedule.py"',
    ])
    assert stages(text, [6, 8], "k") == ["evaluate", "evaluate"]
    source = (ROOT / "hope_kernels/ops/titans/triton/commit.py").read_text().split("\n")
    line = at(source, "def update_task") + 3
    text += f"\n.loc 3 {line} 4 // commit.py:{line}:4 @[ schedule.py:1:1 ]\nadd.s32 a, b, c;"
    assert stages(text, [text.count("\n") + 1], "k") == ["update"]


def test_every_function_of_the_sources_is_found_and_every_stage_has_one():
    found = {n: [name for _, _, name in _functions(str(n.relative_to(ROOT)))] for n in (
        *ROOT.glob("csrc/cuda/titans/*.cuh"), *ROOT.glob("hope_kernels/ops/titans/triton/*.py"))}
    for path, names in found.items():
        defined = re.findall(r"^.*\bHOPE_(?:DEVICE|KERNEL\(\w+\)) .*\(.*$", path.read_text(), re.M)
        assert len(names) >= len(defined), path
    everywhere = {name for names in found.values() for name in names}
    assert set(STAGES) <= everywhere and set(WAITS) - {"pause"} <= everywhere


@pytest.mark.parametrize("name", BUDGET["cases"])
def test_nearly_every_instruction_has_a_stage(name):
    record = BUDGET["cases"][name]
    assert record["stage_known"] >= 0.95
    assert sum(s["instructions"] for n, s in record["stages"].items() if n != WAIT) == pytest.approx(
        record["instructions"], rel=1e-6
    )


# -- SASS
# ------------------------------------------------------------------------------------------------------


def listing(rows):
    """A disassembly: (PTX line, text, stall, scoreboard set, mask waited for), labels as strings."""
    lines = ["	.section	.text.k,"]
    for row in rows:
        if isinstance(row, str):
            lines.append(f"{row}:")
            continue
        ptx, text, stall, write, wait = row
        control = (stall | write << 5 | 7 << 8 | wait << 11) << 41
        lines += [f'	//## File ".nv_debug_ptx_txt", line {ptx}',
                  f"        /*0000*/    {text} ;   /* 0x{0:016x} */",
                  f"     /* 0x{control:016x} */"]
    return "\n".join(lines)


def test_trip_counts_reach_sass():
    from benchmarks.budget import sass

    code = sass.parsed(listing([
        (1, "MOV R1, R2", 1, 7, 0), ".L_x_1", (2, "LDS R3, [R1]", 2, 0, 0), (2, "LDS R4, [R1+0x4]", 2, 0, 0),
        (3, "FADD R4, R3, R4", 4, 7, 1), (4, "@P0 BRA `(.L_x_1)", 5, 7, 0), (5, "EXIT", 5, 7, 0),
    ]), "k")
    # the loop was unrolled once: two loads of one PTX line that ran ten times
    counts = sass.trips(code, {1: 1.0, 2: 10.0, 3: 10.0, 4: 5.0, 5: 1.0})
    assert counts == [1, 5, 5, 5, 5, 1]
    assert sass.by_group(code, counts) == {"move": 1, "shared": 10, "float": 5, "branch": 6}
    # 2 + 30 cycles until the second load is there, 4 for the sum, 5 for the jump
    (stage,) = sass.by_stage(code, counts, dict.fromkeys(range(1, 6), "s")).values()
    assert stage == (22, 1 + 5 * (2 + sass.LATENCY["shared"] + 4 + 5) + 5)


def test_a_wait_for_products_of_warpgroups_takes_as_long_as_they_do():
    from benchmarks.budget import sass

    code = sass.parsed(listing([
        (1, "HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR4], RZ, !UPT", 1, 7, 0),
        (1, "HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR8], R24, gsb0", 1, 7, 0),
        (2, "WARPGROUP.DEPBAR.LE gsb0, 0x0", 1, 7, 0), (3, "EXIT", 5, 7, 0),
    ]), "k")
    (stage,) = sass.by_stage(code, [1, 1, 1, 1], dict.fromkeys(range(1, 4), "s")).values()
    # 64 x 64 x 16 products and sums, 4096 FLOP a cycle: 32 cycles each; then the wait and the exit
    assert stage == (4, 2 * 32 + sass.GMMA_LATENCY + 1 + 5)


def test_copies_of_exchanges_for_lanes_apart_do_not_count():
    from benchmarks.budget import sass

    code = sass.parsed(listing([
        (1, "BRA.DIV UR4, `(.L_x_9)", 1, 7, 0), (2, "SHFL.BFLY PT, R1, R2, 0x1, 0x1f", 1, 0, 0), ".L_x_2",
        (3, "EXIT", 5, 7, 0), ".L_x_9", (2, "SHFL.BFLY PT, R1, R2, 0x1, 0x1f", 1, 0, 0),
        (2, "BRA `(.L_x_2)", 5, 7, 0),
    ]), "k")
    assert [i.opcode.split(".")[0] for i in code] == ["BRA", "SHFL", "EXIT"]


# -- bounds
# ----------------------------------------------------------------------------------------------------


def test_bounds_by_hand():
    from benchmarks.budget.bounds import Assumption, Costs, Machine, predict
    from benchmarks.budget.cases import Size

    values = {"multiprocessors": 4, "clock": 1e6, "issue": 4, "wgmma": 200, "mma": 100, "shared": 1,
              "L2": 1e6, "memory": 1e5, "GEMM": 1e9, "launch": 1e-3, "cluster": 10, "handoff": 20, "host": 0}
    machine = Machine("small", {n: Assumption(v, "", "here") for n, v in values.items()})
    # 6 chains of 10 units, two multiprocessors each: two at a time, so three waves
    size = Size(units=60, chains=6, blocks=2, warps=8, flops=0, bytes=1000, launches=2, barriers=3)
    costs = Costs(instructions=800, mma=1000, wgmma=2000, wavefronts=40, l2_bytes=50, warp=1600)
    p = predict(costs, size, machine)
    units = 10 * 3  # one after the other; a cycle is 1e-3 ms
    assert p.bounds == pytest.approx({
        "issue": units * 800 / 2 / 4 * 1e-3, "tensor": units * (10 + 10) / 2 * 1e-3,
        "shared": units * 40 / 2 * 1e-3, "warp": units * 1600 / 16 * 1e-3, "L2": 60 * 50 / 1e6 * 1e3,
        "memory": 10.0,
    })
    assert p.added == pytest.approx({"launches": 2.0, "barriers": 10 * 3 * 10 * 1e-3})
    assert p.limit == "memory" and p.ms == pytest.approx(10 + 2 + 0.3)
    spread = predict(costs, replace(size, persistent=True, resident=2), machine)
    assert spread.bounds["issue"] == pytest.approx(60 / 4 * 800 / 4 * 1e-3)
    assert spread.bounds["warp"] == pytest.approx(60 * 1600 / (4 * 2 * 8) * 1e-3)
    assert spread.bounds["chain"] == pytest.approx(10 * 3 * 20 * 1e-3) and "barriers" not in spread.added
    # two blocks a multiprocessor that hand to each other through L2: four chains at a time, two waves
    handing = predict(replace(costs, chain=5), replace(size, exchange=True, resident=2), machine)
    assert handing.bounds["issue"] == pytest.approx(10 * 2 * 2 / 2 * 800 / 4 * 1e-3)
    assert handing.bounds["warp"] == pytest.approx(10 * 2 * 1600 / 16 * 1e-3)
    assert handing.bounds["chain"] == pytest.approx(10 * 2 * (5 + 3 * 20) * 1e-3) and "barriers" not in handing.added
    # three launches a unit by the host, or from a graph, which makes room for nothing else between them
    machine.of["host"] = Assumption(2e-3, "", "here")
    for recorded in (False, True):
        launched = predict(replace(costs, launches=3), replace(size, recorded=recorded), machine)
        assert launched.bounds.get("host") == (None if recorded else pytest.approx(10 * 3 * 2.0))
        assert launched.added["launches"] == pytest.approx(10 * 3 * 1.0 if recorded else 2.0)
    nothing = Costs(0, 0, 0, 0, 0, 0)
    library = predict(nothing, Size(1, 1, 1, 4, 0, 1000, library=2e9, passes=300), machine)
    assert library.bounds == pytest.approx({"GEMM": 2000.0, "memory": 10.0}) and library.limit == "GEMM"
    assert library.ms == pytest.approx(2000 + 3 + 1)


def test_goals_see_predictions_and_results_do_not():
    goal = next(g for g in GOALS if g.what == "prefill, N = 256, C = 64: CUDA C++, of the GEMM rate")
    record = BUDGET["cases"]["prefill C64 D64 N256 cuda sm_90"]["prediction"]
    assert predicted.value(goal, BUDGET) == record["of_matmul"] and predicted.value(goal, None) is None
    other = next(g for g in GOALS if g.on == "cpu")
    assert predicted.value(other, BUDGET) is None
    assert all(set(r) & {"status", "ms", "host_ms"} == set() for r in BUDGET["cases"].values())


def test_a_backward_is_compared_with_a_forward_of_as_many_tokens():
    from benchmarks.budget.cases import cases

    sizes = {c.name: c.goal for c in cases()}
    reading, learning = "prefill C64 D64 N256 triton sm_90", "grad C64 D64 N256 triton sm_90"
    assert sizes[reading].units == 4 * sizes[learning].units and sizes[reading].chains == sizes[learning].chains
    goal = next(g for g in GOALS if g.what.startswith("gradient"))
    of = {name: BUDGET["cases"][name]["prediction"]["ms"] for name in (reading, learning)}
    found = predicted.value(goal, BUDGET)
    assert found == pytest.approx((of[learning] - of[reading] / 4) / (of[reading] / 4))


# -- the gate
# --------------------------------------------------------------------------------------------------


def test_two_per_cent_pass_and_more_fails_with_the_stage():
    before = {"instructions": 1000, "wavefronts": 0, "sectors": 50, "unit": "chunk", "stages": {
        "read": {"instructions": 400, "sectors": 50}, "update": {"instructions": 600}}}
    now = lambda read: {**before, "instructions": 600 + read, "stages": {
        "read": {"instructions": read, "wavefronts": 0, "sectors": 50},
        "update": {"instructions": 600, "wavefronts": 0, "sectors": 0}}}
    assert gate.dearer("k", before, now(420)) == []
    (said,) = gate.dearer("k", before, now(421))
    assert "instructions 1000 -> 1021 (+2.1%) a chunk: read +21" in said
    assert gate.cheaper("k", before, now(300)) == ["k: instructions 1000 -> 900"]
    (said,) = gate.dearer("k", before, {**now(400), "wavefronts": 3})
    assert "wavefronts 0 -> 3 (from none)" in said


def test_more_work_in_a_loop_is_more_expensive():
    """The same kernel text with two more instructions a turn, counted as the gate counts."""
    pytest.importorskip("triton")
    if build_cuda.host_compiler() is None:
        pytest.skip("needs a C++ compiler")
    from benchmarks.budget.tally import Text, tally, total

    def record(more):
        kernel, many = counted(turns=12, more=more)
        few = counted(turns=2, more=more)[1]
        text = Text(kernel, "copies", TEXT)
        found = tally({text.key: (text, many)}, {text.key: (text, few)}, 10)
        return {**total(found).record(), "unit": "turn", "stages": {n: s.record() for n, s in found.items()}}

    cheap, dear = record(""), record("add.s32 %r6, %r1, 1;\n\tst.shared.b32 [%r5], %r6;")
    assert cheap["instructions"] == 4 and dear["instructions"] == 6 and cheap["wavefronts"] == 1
    said = gate.dearer("copies", cheap, dear)
    assert len(said) == 2 and "copies: instructions 4 -> 6 (+50.0%) a turn" in said[0]
    assert gate.dearer("copies", cheap, record("")) == []


@needs_nvcc
def test_the_command_counts_the_same_twice_and_fails_for_less(tmp_path):
    name = "cms forward d256 C64 sm_90"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "HOPE_KERNELS_PTX")}
    path = tmp_path / "budget.json"

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.budget", *arguments, "--only", name, "--out", str(path)],
            cwd=ROOT, env=environment, capture_output=True, text=True
        )

    done = run()
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert list(written["cases"]) == [name]
    record = written["cases"][name]
    counts = {what: record[what] for what in gate.LIMITS}
    for what in gate.LIMITS:
        record[what] *= 0.97
    record["stages"]["up_kernel"]["instructions"] -= 1e4
    path.write_text(json.dumps(written))
    done = run("--check")
    assert done.returncode == 1
    for what, n in counts.items():
        assert f"{name}: {what} {0.97 * n:.0f} -> {n:.0f} (+3.1%)" in done.stderr
    assert "up_kernel +10000" in done.stderr
