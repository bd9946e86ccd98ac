"""Races: what barriers, fences, releases and acquires order, and what they do not."""

import numpy as np
import pytest
from ptx_kernels import launch

from tools.ptx.machine import Fault

SEEDS = range(8)
HEAD = """mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, sm; setp.eq.u32 %q0, %r0, 0; setp.eq.u32 %q1, %r0, 1;
  setp.eq.u32 %q2, %r0, 32; setp.eq.u32 %q3, %r1, 0; setp.eq.u32 %q4, %r1, 1;
  mad.lo.u32 %r3, %r0, 4, %r2; mad.wide.u32 %d0, %r0, 4, %p0;
"""


def run(code, *more, seeds=SEEDS, **options):
    found = []
    for seed in seeds:
        out = np.zeros(256, np.uint32)
        launch(HEAD + code, out, *(m.copy() for m in more), shared=2048, seed=seed, **options)
        found.append(out)
    return found


def race(code, *more, message="race at byte", seeds=SEEDS, **options):
    with pytest.raises(Fault, match=message) as caught:
        run(code, *more, seeds=seeds, **options)
    return str(caught.value)


PLACES = {"shared": "[%r2]", "global": "[%p0]"}
PAIRS = {  # (before, after): two accesses of one place
    "read write": ("ld.{s}.b32 %r9, {at};", "st.{s}.b32 {at}, 5;"),
    "write read": ("st.{s}.b32 {at}, 5;", "ld.{s}.b32 %r9, {at};"),
    "write write": ("st.{s}.b32 {at}, 5;", "st.{s}.b32 {at}, 6;"),
    "write atomic": ("st.{s}.b32 {at}, 5;", "atom.{s}.add.u32 %r9, {at}, 6;"),
    "atomic read": ("atom.{s}.add.u32 %r9, {at}, 6;", "ld.{s}.b32 %r9, {at};"),
    "read atomic": ("ld.{s}.b32 %r9, {at};", "red.{s}.add.u32 {at}, 6;"),
    "parts": ("st.{s}.v2.b32 {at}, {{5, 5}};", "ld.{s}.b16 %h0, {at2};"),
}


@pytest.mark.parametrize("what", PAIRS)
@pytest.mark.parametrize("space", PLACES)
@pytest.mark.parametrize("other", ["lane", "warp", "block"])
def test_accesses_that_nothing_orders(space, what, other):
    if other == "block" and space == "shared":
        # every block has its own
        first, second = (x.format(s=space, at="[%r2]", at2="[%r2+6]") for x in PAIRS[what])
        run(f"@!%q0 bra END; @!%q3 bra B; {first} bra END; B: {second} END:", grid=2)
        return
    at2 = PLACES[space].replace("]", "+6]")
    first, second = (x.format(s=space, at=PLACES[space], at2=at2) for x in PAIRS[what])
    who = {"lane": ("%q0", "%q1", "bar.warp.sync -1;"), "warp": ("%q0", "%q2", "bar.sync 0;"), "block": ("%q3", "%q4", "")}
    one, two, sync = who[other]
    text = {"first": f"@!{one} bra A; {{only}} {first} A:", "second": f"@!{two} bra B; {{only}} {second} B:"}
    only = "@!%q0 bra END;" if other == "block" else ""
    code = lambda sync: f"{only} {text['first']} {sync} {text['second']} END:".replace("{only}", "")
    size = {"threads": 64, "grid": 2 if other == "block" else 1}
    if sync:
        run(code(sync), **size)
    message = race(code(""), **size)
    assert message.count("line ") >= 2 and "is not ordered before" in message


def test_neighbours_do_not_race():
    """Numbers of 16 bits side by side; of 8 bits, too, where a kernel has such accesses."""
    run("mad.lo.u32 %r4, %r0, 2, %r2; mov.u16 %h0, 7; st.shared.b16 [%r4], %h0;", threads=128)
    run("add.u32 %r4, %r0, %r2; st.shared.b8 [%r4], 7;", threads=128)
    run("cvt.u64.u32 %d1, %r0; add.s64 %d1, %p0, %d1; st.global.b8 [%d1], 7;", threads=128)


def test_atomics_do_not_race_with_each_other():
    for found in run("atom.shared.add.u32 %r9, [%r2], 1; red.global.add.u32 [%p0], 2; st.relaxed.gpu.global.b32 [%p0+4], 3;"
                     "ld.relaxed.gpu.global.b32 %r9, [%p0+4]; ld.volatile.global.b32 %r9, [%p0];", threads=64, grid=3):
        assert found[0] == 2 * 192 and found[1] == 3


def test_one_value_may_be_written_by_all_to_shared_memory():
    run("st.shared.b32 [%r2], 5; bar.sync 0; ld.shared.b32 %r9, [%r2];", threads=64)
    race("st.shared.b32 [%r2], %r0;", threads=64)


def test_lanes_of_one_store_do_not_race_but_those_of_two_do():
    """Where an instruction lets lanes store to one address of shared memory, one of them wins."""
    run("st.shared.b32 [%r2], %r0;")
    for found in run("st.shared.b32 [%r2], %r0; bar.warp.sync -1; ld.shared.b32 %r9, [%r2]; st.global.b32 [%d0], %r9;"):
        assert len(set(found[:32])) == 1 and found[0] < 32
    race("@%q0 st.shared.b32 [%r2], %r0; @%q1 st.shared.b32 [%r2], %r0;")
    race("st.global.b32 [%p0], %r0;")


def test_a_barrier_orders_only_what_is_before_it():
    race("@%q0 bra A; bar.sync 0; bra B; A: bar.sync 0; B: @%q0 st.shared.b32 [%r2], 1; @%q2 ld.shared.b32 %r9, [%r2];"
         .replace("@%q0 bra A; bar.sync 0; bra B; A: bar.sync 0; B:", "bar.sync 0;"), threads=64)
    race("@%q0 st.shared.b32 [%r2], 1; bar.warp.sync -1; @%q2 ld.shared.b32 %r9, [%r2];", threads=64)
    # a barrier of warps 0 and 1 says nothing to warp 2
    race("setp.ge.u32 %q5, %r0, 64; @%q0 st.shared.b32 [%r2], 1; @%q5 bra C; bar.sync 1, 64; bra D; C: D:"
         " @%q5 ld.shared.b32 %r9, [%r2];", threads=96)


def test_a_later_read_of_the_warp_does_not_hide_an_earlier_one():
    """Lane 1 has read; lane 0 reads later, and is ordered before the write; lane 1's read is not."""
    race("""@%q1 ld.shared.b32 %r9, [%r2]; @%q0 ld.shared.b32 %r9, [%r2];
      @%q0 st.release.gpu.global.b32 [%p0], 1; @!%q2 bra END;
      SPIN: ld.acquire.gpu.global.b32 %r8, [%p0]; setp.eq.u32 %q5, %r8, 0; @%q5 bra SPIN;
      st.shared.b32 [%r2], 5; END:""", threads=64)


MESSAGE = """@!%q0 bra END; @!%q3 bra B;
  st.global.b32 [%p0+64], 42; {write} bra END;
  B: {read} setp.eq.u32 %q5, %r8, 0; @%q5 bra B; {after} ld.global.b32 %r9, [%p0+64]; st.global.b32 [%p0+128], %r9; END:
"""
WRITES = {  # of a flag; the last word says whether it releases, and to whom
    "st.release.gpu.global.b32 [%p0], 1;": "gpu", "st.release.sys.global.b32 [%p0], 1;": "gpu",
    "st.release.cta.global.b32 [%p0], 1;": "cta", "st.release.cluster.global.b32 [%p0], 1;": "cluster",
    "st.relaxed.gpu.global.b32 [%p0], 1;": "", "st.volatile.global.b32 [%p0], 1;": "",
    "fence.acq_rel.gpu; st.relaxed.gpu.global.b32 [%p0], 1;": "gpu", "membar.gl; st.volatile.global.b32 [%p0], 1;": "gpu",
    "fence.sc.gpu; red.relaxed.gpu.global.add.u32 [%p0], 1;": "gpu",
    "fence.acq_rel.cta; st.relaxed.gpu.global.b32 [%p0], 1;": "cta",
    "st.relaxed.gpu.global.b32 [%p0], 1; fence.acq_rel.gpu;": "",
    "red.release.gpu.global.add.u32 [%p0], 1;": "gpu", "atom.acq_rel.gpu.global.add.u32 %r9, [%p0], 1;": "gpu",
    "atom.release.cta.global.exch.b32 %r9, [%p0], 1;": "cta", "atom.global.cas.b32 %r9, [%p0], 0, 1;": "",
    "st.release.gpu.global.b32 [%p0], 0; st.relaxed.gpu.global.b32 [%p0], 1;": "",
    "st.release.gpu.global.b32 [%p0], 0; red.relaxed.gpu.global.add.u32 [%p0], 1;": "gpu",
}
READS = {
    ("ld.acquire.gpu.global.b32 %r8, [%p0];", ""): "gpu", ("ld.acquire.cta.global.b32 %r8, [%p0];", ""): "cta",
    ("ld.acquire.cluster.global.b32 %r8, [%p0];", ""): "cluster", ("ld.relaxed.gpu.global.b32 %r8, [%p0];", ""): "",
    ("ld.relaxed.gpu.global.b32 %r8, [%p0];", "fence.acq_rel.gpu;"): "gpu",
    ("ld.volatile.global.b32 %r8, [%p0];", "membar.gl;"): "gpu",
    ("ld.relaxed.gpu.global.b32 %r8, [%p0];", "fence.acq_rel.cta;"): "cta",
    ("atom.acquire.gpu.global.add.u32 %r8, [%p0], 0;", ""): "gpu",
    ("atom.global.add.u32 %r8, [%p0], 0;", ""): "", ("atom.acq_rel.gpu.global.or.b32 %r8, [%p0], 0;", ""): "gpu",
}


def reaches(write, read, distance):
    """distance: gpu (another cluster), cluster (another block of it)."""
    wide = {"gpu": 2, "cluster": 1, "cta": 0, "": -1}
    return min(wide[write], wide[read]) >= wide[distance]


@pytest.mark.parametrize("read,after", list(READS))
@pytest.mark.parametrize("write", WRITES)
def test_messages_between_blocks(write, read, after):
    """A number, then a flag. Release and acquire, or fences around relaxed accesses, order them in their scope."""
    code = MESSAGE.format(write=write, read=read, after=after)
    reach = READS[read, after]
    if reaches(WRITES[write], reach, "gpu"):
        assert all(found[32] == 42 for found in run(code, grid=2, seeds=range(4)))
    else:
        race(code, grid=2, seeds=range(4))


@pytest.mark.parametrize("write", ["st.release.cluster.global.b32 [%p0], 1;", "st.release.cta.global.b32 [%p0], 1;",
                                   "st.release.gpu.global.b32 [%p0], 1;"])
def test_messages_in_a_cluster(write):
    code = MESSAGE.format(write=write, read="ld.acquire.cluster.global.b32 %r8, [%p0];", after="")
    if "cta" in write:
        race(code, grid=2, cluster=2)
    else:
        run(code, grid=2, cluster=2)


def test_messages_in_a_block():
    """Lane 0 of warp 0 to lane 0 of warp 1, at the block's scope."""
    code = """@!%q0 bra A; st.shared.b32 [%r2+64], 42; st.release.cta.global.b32 [%p0], 1; bra END; A: @!%q2 bra END;
      B: ld.acquire.cta.global.b32 %r8, [%p0]; setp.eq.u32 %q5, %r8, 0; @%q5 bra B; ld.shared.b32 %r9, [%r2+64]; END:"""
    run(code, threads=64)
    race(code.replace("release", "relaxed"), threads=64)
    race(code.replace("acquire", "relaxed"), threads=64)


def test_what_one_lane_acquires_others_know_after_they_meet():
    code = """@!%q3 bra B; @%q0 st.global.b32 [%p0+64], 42; @%q0 st.release.gpu.global.b32 [%p0], 1; bra END;
      B: @!%q0 bra MEET; SPIN: ld.acquire.gpu.global.b32 %r8, [%p0]; setp.eq.u32 %q5, %r8, 0; @%q5 bra SPIN;
      MEET: {0} ld.global.b32 %r9, [%p0+64]; END:"""
    run(code.replace("{0}", "bar.sync 0;"), grid=2, threads=64)
    run(code.replace("{0}", "bar.warp.sync -1;"), grid=2)
    race(code.replace("{0}", "bar.warp.sync -1;"), grid=2, threads=64)
    race(code.replace("{0}", ""), grid=2)


def test_what_the_block_wrote_is_released_by_one_lane_after_a_barrier():
    code = """@!%q3 bra B; st.global.b32 [%d0+256], 42; {0} @%q0 red.release.gpu.global.add.u32 [%p0], 1; bra END;
      B: SPIN: ld.acquire.gpu.global.b32 %r8, [%p0]; setp.eq.u32 %q5, %r8, 0; @%q5 bra SPIN;
      ld.global.b32 %r9, [%d0+256]; END:"""
    run(code.replace("{0}", "bar.sync 0;"), grid=2, threads=64)
    race(code.replace("{0}", ""), grid=2, threads=64)


def test_messages_pass_on():
    """Block 0 to 1 to 2: what the second has acquired it releases."""
    code = """@!%q0 bra END; setp.eq.u32 %q5, %r1, 2; @%q5 bra C; @%q4 bra B;
      st.global.b32 [%p0+64], 42; st.release.gpu.global.b32 [%p0], 1; bra END;
      B: ld.acquire.gpu.global.b32 %r8, [%p0]; setp.eq.u32 %q6, %r8, 0; @%q6 bra B;
      st.{0}.gpu.global.b32 [%p0+4], 1; bra END;
      C: ld.acquire.gpu.global.b32 %r8, [%p0+4]; setp.eq.u32 %q6, %r8, 0; @%q6 bra C; ld.global.b32 %r9, [%p0+64]; END:"""
    run(code.replace("{0}", "release"), grid=3)
    race(code.replace("{0}", "relaxed"), grid=3)


def test_memory_of_a_block_that_has_ended_is_forgotten():
    """Shared memory of later blocks may lie where a flag was: an acquire there learns nothing of earlier blocks."""
    code = """@!%q0 bra END; @!%q3 bra B; st.global.b32 [%p0+64], 42; st.release.gpu.shared.b32 [%r2], 1; bra END;
      B: ld.acquire.gpu.shared.b32 %r8, [%r2]; ld.global.b32 %r9, [%p0+64]; END:"""
    race(code, grid=2, resident=1, seeds=range(2))


CLUSTER = """mov.u32 %r4, %cluster_ctarank; xor.b32 %r5, %r4, 1; mapa.shared::cluster.u32 %r6, %r3, %r5; {start}
  {store} {sync} ld.shared.b32 %r9, [%r3]; mad.lo.u32 %r7, %r1, 64, %r0; mad.wide.u32 %d1, %r7, 4, %p0;
  st.global.b32 [%d1], %r9;
"""
ARRIVE, WAIT = "barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"
REMOTE = "add.u32 %r7, %r0, %r4; st.shared::cluster.b32 [%r6], %r7;"


def test_stores_to_other_blocks_of_a_cluster():
    both = f"{ARRIVE} {WAIT}"
    for found in run(CLUSTER.format(start=both, store=REMOTE, sync=both), grid=4, cluster=2, threads=64):
        np.testing.assert_array_equal(found.reshape(4, 64), [np.arange(64) + (1 - b % 2) for b in range(4)])
    race(CLUSTER.format(start=both, store=REMOTE, sync="bar.sync 0;"), grid=4, cluster=2, threads=64)
    race(CLUSTER.format(start="", store=REMOTE, sync=both), grid=4, cluster=2, message="may not have started")
    race(CLUSTER.format(start=both, store="", sync="ld.shared::cluster.b32 %r9, [%r6];"), grid=2, cluster=2,
         message="has ended|the block ends without a barrier")
    race(CLUSTER.format(start=both, store=REMOTE, sync="ret;"), grid=2, cluster=2,
         message="has ended|the block ends without a barrier")
    race("mapa.shared::cluster.u32 %r6, %r3, 2; " + both + " st.shared::cluster.b32 [%r6], 1;", grid=2, cluster=2,
         message="no block 2")
    race(ARRIVE, grid=2, cluster=2, message="ends between")
    race(ARRIVE + ARRIVE, grid=2, cluster=2, message="arrives twice")
    race(WAIT, grid=2, cluster=2, message="without having arrived")


def test_work_between_arriving_and_waiting():
    """Stores before the arrival are seen after the wait, stores in between are not."""
    both = f"{ARRIVE} {WAIT}"
    run(CLUSTER.format(start=both, store=REMOTE, sync=f"{ARRIVE} add.u32 %r7, %r7, 1; {WAIT}"), grid=2, cluster=2)
    race(CLUSTER.format(start=both + ARRIVE, store=REMOTE, sync=WAIT), grid=2, cluster=2)


def test_blocks_of_a_cluster_read_each_other_generically():
    both = f"{ARRIVE} {WAIT}"
    code = f"""mov.u32 %r4, %cluster_ctarank; xor.b32 %r5, %r4, 1; mapa.shared::cluster.u32 %r6, %r3, %r5;
      add.u32 %r7, %r0, %r1; st.shared.b32 [%r3], %r7; {both} cvt.u64.u32 %d2, %r6; cvta.shared.u64 %d2, %d2;
      ld.b32 %r9, [%d2]; {both} mad.lo.u32 %r7, %r1, 32, %r0; mad.wide.u32 %d1, %r7, 4, %p0; st.global.b32 [%d1], %r9;"""
    for found in run(code, grid=4, cluster=2):
        np.testing.assert_array_equal(found[:128].reshape(4, 32), [np.arange(32) + (b ^ 1) for b in range(4)])


def test_races_can_be_left_unwatched():
    run("st.shared.b32 [%r2], %r0; st.global.b32 [%p0], %r0;", threads=64, races=False)
