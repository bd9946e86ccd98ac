"""mbarrier: counts, phases, bytes of bulk copies and arrivals of asynchronous ones, and what they order."""

import numpy as np
import pytest
from ptx_kernels import launch, samples

from tools.ptx.machine import Fault

HEAD = """mov.u32 %r0, %tid.x; mov.u32 %r1, sm; setp.eq.u32 %q0, %r0, 0; setp.lt.u32 %q1, %r0, 32;
  mad.lo.u32 %r2, %r0, 4, %r1; mad.wide.u32 %d0, %r0, 4, %p0; mad.wide.u32 %d1, %r0, 4, %p1;
"""
INIT = "@%q0 mbarrier.init.shared::cta.b64 [%r1+1024], {0}; bar.sync 0;\n"
WAIT = """{{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1+{1}], {0};
  @done bra.uni DONE; bra.uni AGAIN; DONE: }}
"""


def wait(parity, at=1024):
    return WAIT.format(parity, at)


def run(code, x=None, threads=64, seeds=range(6), **options):
    found = []
    for seed in seeds:
        given = np.zeros(256, np.uint32) if x is None else x.copy()
        out = np.zeros(256, np.uint32)
        launch(HEAD + code, given, out, threads=threads, shared=2048, seed=seed, **options)
        found.append(out)
    return found


def fault(message, code, *args, **options):
    with pytest.raises(Fault, match=message):
        run(code, *args, **options)


SWAP = "xor.b32 %r3, %r0, 32; mad.lo.u32 %r3, %r3, 4, %r1; ld.shared.b32 %r4, [%r3]; st.global.b32 [%d1], %r4;\n"


@pytest.mark.parametrize("count", ["", ", 1"])
def test_arrivals_release_and_waits_acquire(count):
    code = f"st.shared.b32 [%r2], %r0; mbarrier.arrive.shared::cta.b64 %d9, [%r1+1024]{count};\n"
    for found in run(INIT.format(64) + code + wait(0) + SWAP):
        np.testing.assert_array_equal(found[:64], np.arange(64) ^ 32)
    fault("race", INIT.format(64) + code + SWAP)
    fault("race", INIT.format(64) + code.replace("arrive", "arrive.relaxed.cta") + wait(0) + SWAP)
    fault("race", INIT.format(64) + code + wait(0).replace("parity", "parity.relaxed.cta") + SWAP)
    # what is written after the arrival is not released
    late = "mbarrier.arrive.shared::cta.b64 %d9, [%r1+1024]; st.shared.b32 [%r2], %r0;\n"
    fault("race", INIT.format(64) + late + wait(0) + SWAP)
    # nobody may use the object before it is made
    fault("race|no mbarrier", INIT.format(64).replace("bar.sync 0;", "") + code + wait(0))
    fault("race|no mbarrier", "st.shared.b64 [%r1+1024], 0; bar.sync 0;" + code)


def test_several_arrivals_at_once_and_by_state():
    code = """@%q0 mbarrier.arrive.shared.b64 %d9, [%r1+1024], 3; @!%q0 mbarrier.arrive.shared.b64 %d9, [%r1+1024];
      AGAIN: mbarrier.test_wait.shared.b64 %q5, [%r1+1024], %d9; @!%q5 bra AGAIN; st.global.b32 [%d1], 1;"""
    assert all((found[:64] == 1).all() for found in run(INIT.format(66) + code))
    fault("deadlock", INIT.format(67) + code, seeds=[0])
    fault("more arrivals", INIT.format(2) + "@%q0 mbarrier.arrive.shared.b64 %d9, [%r1+1024], 3;")


def test_phases():
    """A ring of two buffers: full and empty, a producer warp and a consumer warp, seven turns."""
    body = """@%q0 mbarrier.init.shared.b64 [%r1+1024], 32; @%q0 mbarrier.init.shared.b64 [%r1+1032], 32;
      @%q0 mbarrier.init.shared.b64 [%r1+1040], 32; @%q0 mbarrier.init.shared.b64 [%r1+1048], 32; bar.sync 0;
      mov.u32 %r5, 0; mov.u32 %r20, 0; and.b32 %r11, %r0, 31;
      LOOP: and.b32 %r6, %r5, 1; shr.u32 %r7, %r5, 1; and.b32 %r7, %r7, 1; xor.b32 %r8, %r7, 1;
      mad.lo.u32 %r9, %r6, 8, %r1; mad.lo.u32 %r10, %r6, 128, %r1;
      mad.lo.u32 %r10, %r11, 4, %r10; @!%q1 bra CONSUME;
      E: mbarrier.try_wait.parity.shared.b64 %q5, [%r9+1040], %r8; @!%q5 bra E;
      mad.lo.u32 %r12, %r5, 100, %r11; st.shared.b32 [%r10], %r12; mbarrier.arrive.shared.b64 _, [%r9+1024]; bra NEXT;
      CONSUME: mbarrier.try_wait.parity.shared.b64 %q5, [%r9+1024], %r7, 1000; @!%q5 bra CONSUME;
      xor.b32 %r13, %r10, 124; ld.shared.b32 %r12, [%r13]; mad.lo.u32 %r20, %r20, 3, %r12;
      mbarrier.arrive.shared.b64 _, [%r9+1040];
      NEXT: add.u32 %r5, %r5, 1; setp.lt.u32 %q6, %r5, 7; @%q6 bra LOOP; st.global.b32 [%d1], %r20;"""
    expected = np.zeros(32, np.uint32)
    for turn in range(7):
        expected = expected * 3 + (100 * turn + (31 - np.arange(32))).astype(np.uint32)
    for found in run(body):
        np.testing.assert_array_equal(found[32:64], expected)
    # a consumer that does not say that it has read
    fault("race|deadlock", body.replace("mbarrier.arrive.shared.b64 _, [%r9+1040];", ""), seeds=[1])
    # a producer that does not wait for the readers
    fault("race", body.replace("@!%q5 bra E;", ""))


BULK = """@!%q0 bra SKIP; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+1024], {expect};
  {cp}.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%p0], 512, [%r1+1024];
  {cp}.shared::cluster.global.mbarrier::complete_tx::bytes [%r1+512], [%p0+512], 256, [%r1+1024]; SKIP:
"""
READ = "ld.shared.b32 %r4, [%r2+256]; st.global.b32 [%d1], %r4;\n"


def test_bulk_copies():
    x = samples(np.uint32, 256)
    bulk = BULK.format(cp="cp.async.bulk", expect=768)
    for found in run(INIT.format(1) + bulk + wait(0) + READ, x, threads=128):
        np.testing.assert_array_equal(found[:128], x[64:192])
    fault("asynchronous copy", INIT.format(1) + bulk + "mov.u32 %r9, 0;" + READ, x, threads=128)
    # the thread that issued it has to wait, too
    fault("asynchronous copy", INIT.format(1) + bulk + "@%q0 ld.shared.b32 %r4, [%r1];" + wait(0), x)
    fault("deadlock", INIT.format(1) + BULK.format(cp="cp.async.bulk", expect=784) + wait(0), x, seeds=[0])
    fault("deadlock", INIT.format(2) + bulk + wait(0), x, seeds=[0])
    fault("while this copy", INIT.format(1) + bulk, x, seeds=range(20))
    # a phase is over when the bytes that it expects are there; without any it does not wait for them
    early = bulk.replace("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+1024], 768;",
                         "mbarrier.arrive.shared::cta.b64 _, [%r1+1024];")
    fault("asynchronous copy|while this copy", INIT.format(1) + early + wait(0) + READ, x, threads=128)


@pytest.mark.parametrize("copy,message", [
    ("[%r1], [%p0], 24, [%r1+1024]", "multiple of 16"), ("[%r1+8], [%p0], 16, [%r1+1024]", "misaligned"),
    ("[%r1], [%p0+8], 16, [%r1+1024]", "misaligned"), ("[%r1], [%p0+1024], 16, [%r1+1024]", "out of bounds"),
    ("[%r1+2048], [%p0], 16, [%r1+1024]", "out of bounds"), ("[%r1], [%p0], 16, [%r1+1032]", "no mbarrier"),
])
def test_bulk_copies_that_cannot_be(copy, message):
    code = f"@%q0 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes {copy};"
    fault(message, INIT.format(1) + code, seeds=[0])


def test_memory_under_a_bulk_copy():
    """Neither what it writes nor what it reads may be touched; earlier plain writes of its source want a fence."""
    x = samples(np.uint32, 256)
    bulk = BULK.format(cp="cp.async.bulk", expect=768)
    fault("asynchronous copy not waited for", INIT.format(1) + bulk + "@%q0 st.shared.b32 [%r1], 5;" + wait(0), x)
    fault("asynchronous read", INIT.format(1) + bulk + "@%q0 st.global.b32 [%p0], 5;" + wait(0), x)
    run(INIT.format(1) + bulk + wait(0) + "@%q0 st.global.b32 [%p0], 5; @%q0 st.shared.b32 [%r1], 5;", x)
    change = "st.global.b32 [%d0], %r0; {0} bar.sync 0;\n" + INIT.format(1)
    fault("no fence.proxy.async", change.replace("{0}", "") + bulk + wait(0), x)
    for fence in ("fence.proxy.async;", "fence.proxy.async.global;"):
        for found in run(change.replace("{0}", fence) + bulk + wait(0) + "ld.shared.b32 %r4, [%r2];"
                         "st.global.b32 [%d1], %r4;", x):
            np.testing.assert_array_equal(found[:64], np.arange(64))
    fault("no fence.proxy.async", change.replace("{0}", "fence.proxy.async.shared::cta;") + bulk + wait(0), x)
    # by the thread that copies, after the barrier
    run(change.replace("{0}", "") + "@%q0 fence.proxy.async;" + bulk + wait(0), x)


ARRIVE_LATE = """cp.async.ca.shared.global [%r2], [%d0], 4; cp.async.ca.shared.global [%r2+256], [%d0+256], 4;
  cp.async.mbarrier.arrive{noinc}.shared.b64 [%r1+1024]; {more}
"""


def test_copies_that_arrive_when_done():
    """With noinc the arrival is one of those counted; without, the thread arrives besides."""
    x = samples(np.uint32, 256)
    noinc = ARRIVE_LATE.format(noinc=".noinc", more="")
    inc = ARRIVE_LATE.format(noinc="", more="mbarrier.arrive.shared.b64 _, [%r1+1024];")
    for late in (noinc, inc):
        for found in run(INIT.format(64) + late + wait(0) + SWAP, x):
            np.testing.assert_array_equal(found[:64], x[np.arange(64) ^ 32])
        fault("asynchronous copy|race", INIT.format(64) + late + SWAP, x)
    fault("deadlock", INIT.format(65) + noinc + wait(0), x, seeds=[0])
    fault("deadlock|not waited", INIT.format(64) + noinc.replace(".noinc", "") + wait(0), x, seeds=[0])


def test_arrivals_at_other_blocks_of_a_cluster():
    """Every block arrives at its neighbour's, which waits; the default scope is the block's own and orders nothing."""
    cluster = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    code = f"""@%q0 mbarrier.init.shared.b64 [%r1+1024], 64; fence.mbarrier_init.release.cluster; {cluster}
      mov.u32 %r5, %cluster_ctarank; xor.b32 %r5, %r5, 1; mapa.shared::cluster.u32 %r6, %r2, %r5;
      mapa.shared::cluster.u32 %r7, %r1, %r5; mov.u32 %r8, %ctaid.x; mad.lo.u32 %r9, %r8, 64, %r0;
      st.shared::cluster.b32 [%r6], %r9; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7+1024];
      AGAIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %q5, [%r1+1024], 0; @!%q5 bra AGAIN;
      ld.shared.b32 %r4, [%r2]; mad.wide.u32 %d2, %r9, 4, %p1; st.global.b32 [%d2], %r4; {cluster}"""
    for found in run(code, grid=2, cluster=2):
        np.testing.assert_array_equal(found[:128], np.arange(128) ^ 64)
    fault("race", code.replace("arrive.release.cluster", "arrive"), grid=2, cluster=2)


def test_objects_end():
    code = INIT.format(1) + "@%q0 mbarrier.inval.shared.b64 [%r1+1024]; bar.sync 0;\n"
    run(code + "@%q0 st.shared.b64 [%r1+1024], 5;")
    fault("no mbarrier", code + "@%q0 mbarrier.arrive.shared.b64 _, [%r1+1024];", seeds=[0])
    fault("no mbarrier", "@%q0 mbarrier.inval.shared.b64 [%r1+1024];", seeds=[0])
    fault("no mbarrier", INIT.format(1) + "@%q0 st.shared.b64 [%r1+1024], 5; @%q0 mbarrier.arrive.shared.b64 _, [%r1+1024];",
          seeds=[0])
    fault("outside of shared", "@%q0 mbarrier.init.b64 [%p0], 1;", seeds=[0])
    fault("mbarrier of 0 arrivals", INIT.format(0), seeds=[0])


def test_bytes_are_counted():
    code = "@%q0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1+1024], 48; bar.sync 0;"
    code += "mbarrier.arrive.shared.b64 _, [%r1+1024]; {0} mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1+1024], 32;"
    code += "{0} mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1+1024], {1};\n"
    run(INIT.format(64) + code.format("@%q0", 16) + wait(0))
    fault("deadlock", INIT.format(64) + code.format("@%q0", 8) + wait(0), seeds=[0])
