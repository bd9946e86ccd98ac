"""Branches, divergence, barriers, predicates, and instructions of all lanes."""

import numpy as np
import pytest
from ptx_kernels import launch, samples

from tools.ptx.machine import Fault

HEAD = "mov.u32 %r0, %tid.x; mad.wide.u32 %d0, %r0, 4, %p0;\n"


def run(body, threads=32, **options):
    out = np.zeros(threads, np.uint32)
    launch(HEAD + body + "\nst.global.b32 [%d0], %r1;", out, threads=threads, **options)
    return out


SEEDS = pytest.mark.parametrize("seed", [0, 1, 2, 3])


@SEEDS
def test_if_else(seed):
    out = run("""setp.lt.u32 %q0, %r0, 11; @%q0 bra A; add.u32 %r1, %r0, 100; bra B;
      A: mul.lo.u32 %r1, %r0, 3; B: add.u32 %r1, %r1, 1;""", seed=seed)
    t = np.arange(32)
    np.testing.assert_array_equal(out, np.where(t < 11, 3 * t, t + 100) + 1)


@SEEDS
def test_loops_of_different_length(seed):
    """Sum of squares below the lane's number, a branch in the loop, and lanes that leave at once."""
    out = run("""mov.u32 %r1, 0; mov.u32 %r2, 0;
      LOOP: setp.ge.u32 %q0, %r2, %r0; @%q0 bra END; and.b32 %r3, %r2, 1; setp.eq.u32 %q1, %r3, 0; @%q1 bra EVEN;
      mad.lo.u32 %r1, %r2, %r2, %r1; bra NEXT; EVEN: add.u32 %r1, %r1, %r2; NEXT: add.u32 %r2, %r2, 1; bra LOOP;
      END: add.u32 %r1, %r1, 7;""", seed=seed)
    assert out.tolist() == [sum(k * k if k % 2 else k for k in range(t)) + 7 for t in range(32)]


@SEEDS
def test_nested_branches_meet_before_an_instruction_of_all_lanes(seed):
    out = run("""setp.lt.u32 %q0, %r0, 20; setp.lt.u32 %q1, %r0, 5; mov.u32 %r1, 1;
      @!%q0 bra OUT; @%q1 bra IN; mov.u32 %r1, 2; bra MEET; IN: mov.u32 %r1, 3; MEET: add.u32 %r1, %r1, 10;
      OUT: redux.sync.add.u32 %r2, %r1, -1; shfl.sync.idx.b32 %r3, %r1, 4, 31, -1; mad.lo.u32 %r1, %r2, 1000, %r3;
    """, seed=seed)
    assert (out == 1000 * (12 * 1 + 15 * 12 + 5 * 13) + 13).all()


@SEEDS
def test_a_loop_that_all_lanes_meet_in(seed):
    """A butterfly inside a loop whose body diverges."""
    out = run("""mov.u32 %r1, %r0; mov.u32 %r2, 16;
      LOOP: and.b32 %r3, %r0, 1; setp.eq.u32 %q0, %r3, 0; @%q0 bra EVEN; add.u32 %r1, %r1, 0; EVEN:
      shfl.sync.bfly.b32 %r4, %r1, %r2, 31, -1; add.u32 %r1, %r1, %r4; shr.u32 %r2, %r2, 1;
      setp.ne.u32 %q1, %r2, 0; @%q1 bra LOOP;""", seed=seed)
    assert (out == sum(range(32))).all()


@SEEDS
def test_lanes_that_end_early(seed):
    out = np.zeros(64, np.uint32)
    launch(HEAD + "setp.ge.u32 %q0, %r0, 40; @%q0 ret; setp.lt.u32 %q1, %r0, 3; @%q1 exit; st.global.b32 [%d0], 1;",
           out, threads=64, seed=seed)
    np.testing.assert_array_equal(out, [0] * 3 + [1] * 37 + [0] * 24)


def test_a_warp_that_ends_early_is_not_waited_for():
    out = np.zeros(128, np.uint32)
    launch(HEAD + """setp.lt.u32 %q0, %r0, 32; @%q0 ret; shl.b32 %r2, %r0, 2; mov.u32 %r3, sm; add.u32 %r3, %r3, %r2;
      st.shared.b32 [%r3], %r0; bar.sync 0; xor.b32 %r2, %r2, 128; setp.lt.u32 %q1, %r0, 64; @%q1 bra END;
      mov.u32 %r4, sm; add.u32 %r4, %r4, %r2; ld.shared.b32 %r1, [%r4]; st.global.b32 [%d0], %r1; END:""",
           out, threads=128, shared=512)
    np.testing.assert_array_equal(out[64:], np.arange(64, 128) ^ 32)


@pytest.mark.parametrize("code,message", [
    ("setp.lt.u32 %q0, %r0, 5; @%q0 bar.sync 0;", "runs on 5"),
    ("setp.lt.u32 %q0, %r0, 5; @%q0 shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;", "runs on 5"),
    ("setp.lt.u32 %q0, %r0, 5; @%q0 bra A; bar.sync 0; bra B; A: bar.sync 0; B:", "lanes wait for each other"),
    ("setp.lt.u32 %q0, %r0, 5; @%q0 ret; bar.sync 0;", "5 lanes of the warp have ended"),
    ("shfl.sync.idx.b32 %r1, %r0, 0, 31, 0xffff;", "member mask"),
    ("bar.sync 16;", "ids are 0 to 15"),
    ("bar.sync 1, 48;", "whole warps"),
    ("bar.sync 1, 64;", "whole warps|deadlock"),
    ("bar.sync %r0;", "different barriers"),
    ("mov.u32 %r2, 0; LOOP: ld.relaxed.gpu.global.b32 %r2, [%p0]; setp.eq.u32 %q0, %r2, 0; @%q0 bra LOOP;", "deadlock"),
])
def test_faults(code, message):
    with pytest.raises(Fault, match=message):
        run(code)


def test_not_executed_by_any_lane():
    """A guard that is false everywhere: nothing happens, not even with instructions of all lanes."""
    out = run("""mov.u32 %r1, 7; setp.gt.u32 %q0, %r0, 99; @%q0 bar.sync 0; @%q0 shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;
      @%q0 redux.sync.add.s32 %r1, %r0, -1; @%q0 movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0; @%q0 bar.warp.sync -1;
      @%q0 barrier.cluster.arrive.aligned; @%q0 barrier.cluster.wait.aligned; @%q0 fence.proxy.async; @%q0 trap;
      @%q0 wgmma.fence.sync.aligned; @%q0 wgmma.commit_group.sync.aligned; @%q0 vote.sync.any.pred %q1, %q0, -1;
      @%q0 cp.async.wait_all; @%q0 ret; @%q0 bra END; add.u32 %r1, %r1, 1; END:""")
    assert (out == 8).all()


def test_guards_leave_what_they_do_not_write():
    x, y = samples(np.uint64, 32), np.zeros(64, np.uint64)
    launch("""mov.u32 %r0, %tid.x; mad.wide.u32 %d0, %r0, 8, %p0; mad.wide.u32 %d1, %r0, 16, %p1; mov.b64 %d5, -1;
      mov.b64 %d4, 5; setp.lt.u32 %q0, %r0, 9; setp.eq.u32 %q1, %r0, 9999; @%q0 ld.global.b64 %d5, [%d0];
      @!%q0 mov.b64 %d4, %d5; @%q0 setp.lt.u32 %q1, %r0, 4; @%q1 mov.b64 %d4, 6;
      st.global.v2.b64 [%d1], {%d5, %d4};""", x, y)
    t = np.arange(32)
    minus = np.uint64(0xffffffffffffffff)
    np.testing.assert_array_equal(y[::2], np.where(t < 9, x, minus))
    np.testing.assert_array_equal(y[1::2], np.where(t < 4, 6, np.where(t < 9, 5, minus)).astype(np.uint64))


def test_predicate_logic():
    out = run("""and.b32 %r2, %r0, 1; setp.eq.u32 %q0, %r2, 1; and.b32 %r2, %r0, 2; setp.eq.u32 %q1, %r2, 2;
      and.pred %q2, %q0, %q1; or.pred %q3, %q0, %q1; xor.pred %q4, %q0, %q1; not.pred %q5, %q0; mov.pred %q6, %q1;
      mov.pred %q7, -1; mov.pred %q8, 0; mov.u32 %r1, 0; selp.b32 %r3, 1, 0, %q2; or.b32 %r1, %r1, %r3;
      @%q3 or.b32 %r1, %r1, 2; @%q4 or.b32 %r1, %r1, 4; @%q5 or.b32 %r1, %r1, 8; @%q6 or.b32 %r1, %r1, 16;
      @%q7 or.b32 %r1, %r1, 32; @%q8 or.b32 %r1, %r1, 64; @!%q8 or.b32 %r1, %r1, 128;""")
    for t, found in enumerate(out):
        a, b = t & 1, t >> 1 & 1
        assert found == (a & b) | (a | b) << 1 | (a ^ b) << 2 | (1 - a) << 3 | b << 4 | 32 | 128


def test_barriers_with_ids_and_counts():
    """Two pairs of warps, each with a barrier of its own; every thread reads its partner's."""
    for seed in range(6):
        out = run("""shr.u32 %r2, %r0, 6; add.u32 %r3, %r2, 3; mov.u32 %r4, 64; shl.b32 %r5, %r0, 2; mov.u32 %r6, sm;
          add.u32 %r7, %r6, %r5; st.shared.b32 [%r7], %r0; bar.sync %r3, %r4; xor.b32 %r5, %r5, 128;
          add.u32 %r7, %r6, %r5; ld.shared.b32 %r1, [%r7];""", threads=128, shared=512, seed=seed)
        np.testing.assert_array_equal(out, np.arange(128) ^ 32)


PIPE = """setp.lt.u32 %q0, %r0, 32; shl.b32 %r5, %r0, 2; and.b32 %r5, %r5, 127; mov.u32 %r6, sm; add.u32 %r7, %r6, %r5;
  mov.u32 %r1, 0; mov.u32 %r9, 0; @!%q0 bra CONSUME;
  P: {before} add.u32 %r8, %r9, %r0; st.shared.b32 [%r7], %r8; {filled} add.u32 %r9, %r9, 1; setp.lt.u32 %q1, %r9, 5;
  @%q1 bra P; bra END;
  CONSUME: bar.arrive 2, 64; C: bar.sync 1, 64; ld.shared.b32 %r8, [%r7]; mad.lo.u32 %r1, %r1, 10, %r8;
  {read} add.u32 %r9, %r9, 1; setp.lt.u32 %q1, %r9, 5; @%q1 bra C; END:
"""


def test_arrive_hands_over():
    """A producer and a consumer, one buffer: full is barrier 1, empty barrier 2."""
    pipe = PIPE.format(before="bar.sync 2, 64;", filled="bar.arrive 1, 64;",
                       read="setp.lt.u32 %q2, %r9, 4; @%q2 bar.arrive 2, 64;")
    for seed in range(6):
        out = run(pipe, threads=64, shared=512, seed=seed)
        for lane in range(32):
            assert out[32 + lane] == int("".join(str(k) for k in range(5))) + 11111 * lane
    # without waiting for the reader
    with pytest.raises(Fault, match="race|barrier|deadlock"):
        for seed in range(8):
            run(PIPE.format(before="", filled="bar.arrive 1, 64;", read=""), threads=64, shared=512, seed=seed)


def test_a_barrier_that_not_all_reach():
    with pytest.raises(Fault, match="deadlock: no warp can run"):
        run("setp.lt.u32 %q0, %r0, 32; @%q0 bra A; bar.sync 1, 96; A:", threads=64 + 32)
    with pytest.raises(Fault, match="where others wait for"):
        run("setp.lt.u32 %q0, %r0, 32; @%q0 bra A; bar.sync 1, 64; A: bar.sync 1, 96;", threads=96)


def test_a_counted_barrier_is_not_over_when_a_warp_ends():
    """Warp 3 ends; barrier 0 of 96 threads still needs warps 0 to 2, also when two of them wait."""
    out = run("""setp.ge.u32 %q0, %r0, 96; @%q0 bra END; setp.lt.u32 %q1, %r0, 32; shl.b32 %r5, %r0, 2; mov.u32 %r6, sm;
      add.u32 %r7, %r6, %r5; mov.u32 %r9, 0; @!%q1 bra JOIN; WAIT: add.u32 %r9, %r9, 1; setp.lt.u32 %q2, %r9, 30000;
      @%q2 bra WAIT; JOIN: st.shared.b32 [%r7], %r0; bar.sync 0, 96; xor.b32 %r5, %r5, 124; and.b32 %r5, %r5, 127;
      add.u32 %r7, %r6, %r5; ld.shared.b32 %r1, [%r7]; END:""", threads=128, shared=512)
    np.testing.assert_array_equal(out[:96], np.tile(31 - np.arange(32), 3))


def test_all_schedules_agree():
    """Blocks that meet at barriers, exchange by shared memory and shuffles, and add up in global memory."""
    expected = None
    for seed in range(21):
        for resident in (1, 3, 8) if seed else range(1, 9):
            out, total = np.zeros(5 * 96, np.uint32), np.zeros(1, np.uint32)
            launch("""mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 96, %r0;
              mad.wide.u32 %d0, %r2, 4, %p0; mov.u32 %r6, sm; mad.lo.u32 %r7, %r0, 4, %r6; mov.u32 %r9, 0;
              mov.u32 %r3, %r2;
              LOOP: st.shared.b32 [%r7], %r3; bar.sync 0; add.u32 %r4, %r0, 33; rem.u32 %r4, %r4, 96;
              mad.lo.u32 %r5, %r4, 4, %r6; ld.shared.b32 %r8, [%r5]; shfl.sync.bfly.b32 %r10, %r8, 5, 31, -1;
              mad.lo.u32 %r3, %r3, 3, %r10; bar.sync 0; add.u32 %r9, %r9, 1; setp.lt.u32 %q0, %r9, 4; @%q0 bra LOOP;
              red.global.add.u32 [%p1], %r3; st.global.b32 [%d0], %r3;""", out, total, grid=5, threads=96, shared=512,
                   seed=seed, resident=resident)
            found = (out.tobytes(), total[0])
            expected = expected or found
            assert found == expected, (seed, resident)
    assert total[0] == out.sum(dtype=np.uint32)


def test_special_registers():
    names = ["%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid",
             "%warpid", "%nwarpid", "%lanemask_lt", "%lanemask_le", "%lanemask_eq", "%lanemask_gt", "%lanemask_ge",
             "%cluster_ctarank", "%cluster_nctarank", "%clusterid.x", "%nclusterid.x", "%clusterid.y",
             "%cluster_ctaid.x", "%cluster_nctaid.x", "%tid.y", "%ntid.y", "%tid.z", "%ntid.z"]
    out = np.zeros((2, 3, 4, 64, len(names)), np.uint32)
    code = """mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
      mad.lo.u32 %r4, %r3, 3, %r2; mad.lo.u32 %r4, %r4, 4, %r1; mad.lo.u32 %r4, %r4, 64, %r0;
    """ + f"mad.wide.u32 %d0, %r4, {4 * len(names)}, %p0;\n"
    code += "".join(f"mov.u32 %r5, {name}; st.global.b32 [%d0+{4 * k}], %r5;\n" for k, name in enumerate(names))
    launch(code, out, grid=(4, 3, 2), threads=64, cluster=2)
    for z, y, x, t in np.ndindex(2, 3, 4, 64):
        lane, whole = t % 32, 0xffffffff
        assert out[z, y, x, t].tolist() == [
            t, 64, x, y, z, 4, 3, 2, lane, t // 32, 2, (1 << lane) - 1, (2 << lane) - 1, 1 << lane,
            whole ^ ((2 << lane) - 1), whole ^ ((1 << lane) - 1), x % 2, 2, x // 2, 2, y, x % 2, 2, 0, 1, 0, 1]
