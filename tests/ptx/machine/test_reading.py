"""Reading PTX: names, scopes, labels, places in sources; and that what the machine does not have is an error."""

import numpy as np
import pytest
from ptx_kernels import kernel, launch

from tools.ptx.machine import Kernel, UnknownInstruction, entries

UNKNOWN = [  # instructions, or modifiers that would change what they do
    "frobnicate.b32 %r0, %r1;", "add.sat.s32 %r0, %r1, %r2;", "add.rm.f32 %r0, %r1, %r2;", "add.cc.u32 %r0, %r1, %r2;",
    "mad.hi.sat.s32 %r0, %r1, %r2, %r3;", "mul.hi.b32 %r0, %r1, %r2;", "mul24.hi.s32 %r0, %r1, %r2;",
    "min.relu.s32 %r0, %r1, %r2;", "max.xorsign.abs.f32 %r0, %r1, %r2;", "fma.rn.relu.bf16x2 %r0, %r1, %r2, %r3;",
    "fma.rz.f32 %r0, %r1, %r2, %r3;", "neg.bf16x2 %r0, %r1;", "add.f64 %d0, %d1, %d2;", "sqrt.rz.f32 %r0, %r1;",
    "rcp.approx.ftz.f64 %d0, %d1;", "cvt.rz.f32.s32 %r0, %r1;", "cvt.rn.satfinite.bf16.f32 %h0, %r1;",
    "cvt.rz.bf16x2.f32 %r0, %r1, %r2;", "cvt.rn.f32.f64 %r0, %d1;", "cvt.rzi.s32.f16 %r0, %h1;",
    "cvt.rn.satfinite.e4m3x2.f32 %h0, %r1, %r2;", "cvt.pack.sat.u8.s32.b32 %r0, %r1, %r2, %r3;",
    "prmt.b32.f4e %r0, %r1, %r2, %r3;", "shf.l.wrap.b64 %d0, %d1, %d2, %r3;", "lop3.or.b32 %r0|%q0, %r1, %r2, %r3, 1, %q1;",
    "setp.lt.and.s32 %q0, %r0, %r1, %q1;", "setp.lt.s32 %q0|%q1, %r0, %r1;", "set.lt.u32.s32 %r0, %r1, %r2;",
    "slct.u32.s32 %r0, %r1, %r2, %r3;", "selp.b32 %r0, %r1, %r2, !%q0;", "vote.all.pred %q0, %q1;",
    "match.any.sync.b32 %r0, %r1, -1;", "shfl.idx.b32 %r0, %r1, 0, 31;", "redux.sync.min.NaN.f32 %r0, %r1, -1;",
    "bar.red.popc.u32 %r0, 0, %q0;", "barrier.cluster.arrive.relaxed.aligned;", "bar.warp.sync 0xffff;",
    "fence.proxy.alias;", "fence.proxy.tensormap::generic.release.gpu;", "fence.acq_rel.warp;", "membar.proxy.fence;",
    "ld.weird.global.b32 %r0, [%d0];", "ld.global.v3.b32 {%r0, %r1, %r2}, [%d0];", "ld.const.b32 %r0, [%d0];",
    "ld.global.v2.b32 {%r0, %d1}, [%d0];", "ld.global.b64 %r0, [%d0];", "st.global.v2.b32 [%d0], {%r0};",
    "st.global.b64 [%d0], %r0;", "st.async.weak.shared::cluster.b32 [%r0], %r1, [%r2];", "ld.global.b32 %r0, [%d0], %d1;",
    "atom.global.add.noftz.f16x2 %r0, [%d0], %r1;", "atom.global.inc.u32 %r0, [%d0], %r1;", "red.global.xor.b32 [%d0], %r0;",
    "red.global.add.v2.f32 [%d0], {%r0, %r1};", "atom.global.cas.b128 %d0, [%d1], %d2, %d3;",
    "cp.async.cg.shared.global [%r0], [%d0], 8;", "cp.async.ca.shared.global [%r0], [%d0], 16, %q0;",
    "cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r0], 16;", "cp.async.bulk.commit_group;",
    "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r0], [%d0, {%r1}], [%r2];",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r0], [%d0], 16, [%r1], %h0;",
    "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0, %r1}, [%r2];", "ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r0}, [%r2];",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r0,%r1,%r2,%r3}, {%r4,%r5,%r6,%r7}, {%r8,%r9}, {%r0,%r1,%r2,%r3};",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r0,%r1}, {%r4,%r5,%r6,%r7}, {%r8,%r9}, {%r0,%r1};",
    "mbarrier.arrive_drop.shared.b64 %d0, [%r0];", "mbarrier.arrive.noComplete.shared.b64 %d0, [%r0], 1;",
    "mbarrier.pending_count.b64 %r0, %d0;", "setmaxnreg.inc.sync.u32 40;", "griddepcontrol.wait;", "brkpt;",
    "mov.u64 %d0, %globaltimer;", "mov.u32 %r0, %smid;", "mov.b32 %r0, {%h0, %h1, %h2, %h3};", "mov.b32 %r0, nowhere;",
    "add.s32 %d0, %r0, %r1;", "add.s32 %r0, %d0, %r1;", "add.s64 %d0, %r0, %d1;", "add.s16 %r0, %r1, %r2;",
    "cvt.f32.bf16 %d0, %h0;", "shl.b64 %d0, %d1, %d2;", "mov.b32 %r0, %q0;",
    "selp.b32 %r0, %r1, %r2, %r3;", "bra NOWHERE;", "call.uni f;", "brx.idx %r0, T;", "cvta.const.u64 %d0, %d1;",
    "isspacep.shared %q0, %d0;", "mapa.u64 %d0, %d1, %r0;", "getctarank.u64 %r0, %d1;", "shfl.sync.idx.b32 %d0, %r1, 0, 31, -1;",
    "createpolicy.fractional.L2::evict_first.b64 %d0;", "prefetch.global.L2 [%d0];", "mov.b64 {%r0, %r1, %r2}, %d0;",
    "wmma.load.a.sync.aligned.m16n16k16.row.f16 {%r0}, [%d0];", "tcgen05.fence::before_thread_sync;", "dp4a.u32.u32 %r0, %r1, %r2, %r3;",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_the_machine_does_not_have_names_itself(text):
    body = f"add.s32 %r0, %r0, 1;\n{text}"
    with pytest.raises((UnknownInstruction, ValueError)) as caught:
        Kernel(kernel(body))
    line = kernel(body).split("\n").index(text) + 1
    assert text.split()[0].rstrip(";") in str(caught.value) or text.split()[-1].rstrip(";") in str(caught.value)
    assert f"line {line}" in str(caught.value) or "%" in text


@pytest.mark.parametrize("body", [
    ".section x;", "add.s32 %r0, %r0, 1", "@%q0 bra END; END: @%q0 bra END; @%q0 ret;", ".reg .b32 x; { .reg .b128 y; }",
])
def test_text_that_is_not_understood(body):
    with pytest.raises(ValueError):
        Kernel(kernel(body).replace("  ret;\n}", "}"))


def test_kernels_of_a_file():
    both = kernel("", name="one") + kernel("", name="two").split("\n", 3)[3]
    assert entries(both) == ["one", "two"] and Kernel(both, "two").name == "two"
    for name in (None, "three"):
        with pytest.raises(ValueError, match="kernels"):
            Kernel(both, name)


def test_scopes():
    """Registers and labels of inline assembly are its own, also those of its neighbours and of what is around."""
    out = np.zeros(4, np.uint32)
    launch("""mov.u32 %r99, %tid.x; setp.ne.u32 %q9, %r99, 0; @%q9 ret;
      .reg .b32 x; mov.b32 x, 1; mov.u32 %r0, 0;
      { .reg .b32 x, f<2>; mov.b32 x, 10; mov.b32 f1, 7; { .reg .b32 x; mov.b32 x, 100; add.u32 %r0, %r0, x; }
        bra DONE; add.u32 %r0, %r0, 1000; DONE: add.u32 %r0, %r0, x; .reg .b32 y; mov.b32 y, f1; mov.b32 %r3, y; }
      { .reg .b32 x; .reg .pred p; mov.b32 x, 0; AGAIN: add.u32 x, x, 1; setp.lt.u32 p, x, 5; @p bra AGAIN;
        bra.uni DONE; trap; DONE: mov.b32 %r1, x; }
      bra DONE; trap;
      DONE: st.global.v4.b32 [%p0], {%r0, %r1, x, %r3};""", out)
    assert out.tolist() == [110, 5, 1, 7]


def test_instructions_over_several_lines_and_several_on_one():
    built = launch("mov.u32\n %r0,\n 5; // a comment; with a semicolon\n{ .reg .b32 z; add.u32 z, %r0, 1; } add.u32 %r1, %r0, 2;")
    texts = [i.text for i in built.instructions]
    assert texts == ["mov.u32 %r0, 5", "add.u32 z, %r0, 1", "add.u32 %r1, %r0, 2", "ret"]
    lines = [i.line for i in built.instructions]
    assert lines[1] == lines[0] + 3 and lines[2] == lines[1]


def test_places_in_the_source():
    text = kernel('.loc 1 7 3\nadd.u32 %r0, %r0, 1;\n.loc 1 9 1, function_name $L, inlined_at 1 7 3\nadd.u32 %r0, %r0, 2;')
    built = Kernel(text + '.file 1 "/a/b.py"\n')
    assert [i.location for i in built.instructions] == [(1, 7), (1, 9), (1, 9)]
    assert built.files == {1: "/a/b.py"} and "inlined_at" in built.instructions[1].stack


@pytest.mark.parametrize("text", [".pragma \"nounroll\";", "", "{ }", ".pragma \"used_bytes_mask 1\";", "nanosleep.u32 5;"])
def test_what_changes_nothing(text):
    out = np.zeros(32, np.uint32)
    launch(f"mov.u32 %r0, %tid.x;\n{text}\nmad.wide.u32 %d0, %r0, 4, %p0; st.global.b32 [%d0], %r0;", out)
    assert out.tolist() == list(range(32))


def test_hints_of_caches():
    x, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    launch("""mov.u32 %r0, %tid.x; mad.wide.u32 %d0, %r0, 4, %p0; mad.wide.u32 %d1, %r0, 4, %p1;
      ld.global.nc.L1::no_allocate.L2::128B.b32 %r1, [%d0]; ld.global.cg.b32 %r2, [%d0];
      ld.global.L1::evict_last.b32 %r3, [%d0]; add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r3; mov.u32 %r4, sm;
      mad.lo.u32 %r4, %r0, 4, %r4; cp.async.ca.shared.global.L2::128B [%r4], [%d0], 4; cp.async.wait_all;
      ld.shared.b32 %r5, [%r4]; add.u32 %r1, %r1, %r5; st.global.L1::evict_first.wt.b32 [%d1], %r1;""".replace(".wt", ""),
           x, out, shared=128)
    np.testing.assert_array_equal(out, 4 * x)
