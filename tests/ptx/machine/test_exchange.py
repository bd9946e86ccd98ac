"""What lanes give each other: shuffles, votes, reductions, 8 x 8 matrices, and mma's fragments."""

import itertools

import numpy as np
import pytest
import torch
from ptx_kernels import evaluate, launch, samples


def lanes_by_width(mode, lane, by, width):
    """Where __shfl_*_sync reads, by the CUDA programming guide: None, and the lane's own, outside its segment."""
    first = lane // width * width
    if mode == "idx":
        return first + by % width
    there = {"up": lane - by, "down": lane + by, "bfly": lane ^ by}[mode]
    if mode == "bfly":  # may reach into earlier segments, not into later ones
        return there if there < first + width else None
    return there if first <= there < first + width else None


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4, 2, 1])
def test_shuffles_of_segments(mode, width):
    """CUDA's width is a mask of segments and a clamp in the third operand."""
    x = samples(np.uint32, 32)
    control = (32 - width) << 8 | (0 if mode == "up" else 31)
    for by in (0, 1, 2, 5, 8, 16, 31):
        code = f".reg .pred p; .reg .b32 v; shfl.sync.{mode}.b32 v|p, a, {by}, {control}, 0xffffffff;"
        got = evaluate(code + "mov.b32 d, v;", np.uint32, x)
        inside = evaluate(code + "selp.b32 d, 1, 0, p;", np.uint32, x)
        there = [lanes_by_width(mode, lane, by, width) for lane in range(32)]
        np.testing.assert_array_equal(got, [x[lane if t is None else t] for lane, t in enumerate(there)])
        np.testing.assert_array_equal(inside, [t is not None for t in there])


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_with_any_clamp(mode):
    """The ISA's pseudocode, with segments and clamps that differ from lane to lane."""
    x, by, control = samples(np.uint32, 32), samples(np.uint32, 32, 1), samples(np.uint32, 32, 2)
    got = evaluate(f"shfl.sync.{mode}.b32 d, a, b, c, -1;", np.uint32, x, by, control)
    inside = evaluate(f".reg .pred p; .reg .b32 v; shfl.sync.{mode}.b32 v|p, a, b, c, -1; selp.b32 d, 1, 0, p;",
                      np.uint32, x, by, control)
    for lane in range(32):
        b, c, mask = int(by[lane]) & 31, int(control[lane]) & 31, int(control[lane]) >> 8 & 31
        most, least = lane & mask | c & ~mask, lane & mask
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | b & ~mask}[mode]
        valid = j >= most if mode == "up" else j <= most
        assert inside[lane] == valid and got[lane] == x[j if valid else lane], lane


def test_a_shuffle_may_write_what_it_reads():
    x = samples(np.uint32, 32)
    np.testing.assert_array_equal(
        evaluate("shfl.sync.bfly.b32 a, a, 3, 31, -1; mov.b32 d, a;", np.uint32, x), x[np.arange(32) ^ 3])


REDUCTIONS = {
    "add.s32": np.add, "add.u32": np.add, "min.s32": np.minimum, "max.s32": np.maximum, "min.u32": np.minimum,
    "max.u32": np.maximum, "and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor,
}


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions(op):
    kind = np.int32 if op.endswith("s32") else np.uint32
    x = samples(kind, 128)
    with np.errstate(over="ignore"):
        expected = [REDUCTIONS[op].reduce(x[w : w + 32]).astype(kind) for w in range(0, 128, 32)]
    found = evaluate(f"redux.sync.{op} d, a, -1;", kind, x)
    np.testing.assert_array_equal(found, np.repeat(expected, 32))


def test_votes():
    for bits in (0, 0xffffffff, 0x80000001, 0x7fffffff, 0x12345678):
        x = np.array([bits >> lane & 1 for lane in range(32)], np.uint32)
        head = ".reg .pred q, p; setp.ne.u32 q, a, 0;"
        ask = lambda op, q="q": evaluate(f"{head} vote.sync.{op}.pred p, {q}, -1; selp.b32 d, 1, 0, p;", np.uint32, x)
        assert (ask("all") == (bits == 0xffffffff)).all() and (ask("any") == (bits != 0)).all()
        assert (ask("uni") == (bits in (0, 0xffffffff))).all() and (ask("all", "!q") == (bits == 0)).all()
        assert (evaluate(f"{head} vote.sync.ballot.b32 d, q, -1;", np.uint32, x) == bits).all()
        assert (evaluate(f"{head} vote.sync.ballot.b32 d, !q, -1;", np.uint32, x) == bits ^ 0xffffffff).all()


def test_one_lane_is_elected():
    x = np.zeros(64, np.uint32)
    head = ".reg .pred p; .reg .b32 leader; elect.sync leader|p, -1;"
    np.testing.assert_array_equal(evaluate(f"{head} selp.b32 d, 1, 0, p;", np.uint32, x), [1, *[0] * 31] * 2)
    assert (evaluate(f"{head} mov.b32 d, leader;", np.uint32, x) == 0).all()
    found = evaluate(".reg .pred p; elect.sync _|p, -1; selp.b32 d, 1, 0, p;", np.uint32, x)
    assert found.sum() == 2


def test_active_lanes():
    x = np.arange(32, dtype=np.uint32)
    code = """.reg .pred p, q; setp.lt.u32 p, a, 5; setp.eq.u32 q, a, 9; mov.u32 d, 0; @p bra LOW; activemask.b32 d;
      @q activemask.b32 d; bra END; LOW: activemask.b32 d; END:"""
    found = evaluate(code, np.uint32, x)
    assert (found[:5] == 31).all() and found[9] == 1 << 9 and (np.delete(found[5:], 4) == 0xffffffff ^ 31).all()


# --- matrices of 8 x 8 numbers of 16 bits ----------------------------------------------------------------------
def fragments(matrices, transposed):
    """What each lane gets of a matrix: elements (lane / 4, 2 (lane % 4)) and the next, of it or its transpose."""
    found = []
    for m in matrices:
        m = m.T if transposed else m
        found.append(np.ascontiguousarray(m).reshape(32, 2).copy().view(np.uint32).reshape(32))
    return np.stack(found, 1)


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, transposed):
    """Row r of matrix m is where lane 8 m + r says; rows are anywhere, here in reverse."""
    x = samples(np.uint16, 32 * 8).reshape(32, 8)
    registers, stored = np.zeros((32, count), np.uint32), np.zeros((32, 8), np.uint16)
    names = ", ".join(f"%r{10 + k}" for k in range(count))
    vector = {1: ".b32", 2: ".v2.b32", 4: ".v4.b32"}[count]
    launch(f"""mov.u32 %r0, %tid.x; mov.u32 %r1, sm; mad.lo.u32 %r2, %r0, 16, %r1; mad.wide.u32 %d0, %r0, 16, %p0;
      ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d0]; st.shared.v4.b32 [%r2], {{%r4, %r5, %r6, %r7}}; bar.sync 0;
      sub.u32 %r3, 31, %r0; mad.lo.u32 %r3, %r3, 16, %r1;
      ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {{{names}}}, [%r3];
      mad.wide.u32 %d1, %r0, {4 * count}, %p1; st.global{vector} [%d1], {{{names}}}; bar.sync 0;
      stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [%r2+512], {{{names}}}; bar.sync 0;
      setp.ge.u32 %q0, %r0, {8 * count}; @%q0 bra END; mad.wide.u32 %d2, %r0, 16, %p2;
      ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2+512]; st.global.v4.b32 [%d2], {{%r4, %r5, %r6, %r7}}; END:
    """, x, registers, stored, shared=1024)
    rows = x[::-1][: 8 * count]
    np.testing.assert_array_equal(registers, fragments(rows.reshape(count, 8, 8), bool(transposed)))
    np.testing.assert_array_equal(stored[: 8 * count], rows)


def test_movmatrix():
    x = samples(np.uint16, 64).reshape(8, 8)
    given = fragments([x], False).reshape(32)
    found = evaluate("movmatrix.sync.aligned.m8n8.trans.b16 d, a;", np.uint32, given)
    np.testing.assert_array_equal(found, fragments([x], True).reshape(32))


def placed(shape, strides, thread, value):
    """A CuTe layout of (thread, value): the mixed-radix digits of both, each times its stride."""
    index = 0
    for radices, steps, n in zip(shape, strides, (thread, value)):
        for radix, step in zip(radices, steps):
            index, n = index + n % radix * step, n // radix
    return index


# CUTLASS, include/cute/atom/mma_traits_sm80.hpp, 16x8x16: m + 16 k of A, n + 8 k of B, m + 16 n of C
A = ((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))
B = ((4, 8), (2, 2)), ((16, 1), (8, 64))
C = ((4, 8), (2, 2)), ((32, 1), (16, 8))


@pytest.mark.parametrize("t", ["bf16", "f16"])
def test_mma(t):
    """On small whole numbers, whose sums are exact in any order, and on random ones."""
    kind = {"bf16": torch.bfloat16, "f16": torch.float16}[t]
    for whole in (True, False):
        torch.manual_seed(1)
        draw = (lambda *s: torch.randint(-8, 9, s).float()) if whole else torch.randn
        a, b, c = draw(16, 16).to(kind), draw(8, 16).to(kind), draw(16, 8)
        packed = lambda m, layout, count: torch.stack([
            torch.stack([m.T.reshape(-1)[placed(*layout, lane, v)] for v in range(count)]) for lane in range(32)])
        args = [packed(m, layout, n).view(torch.int16).numpy().copy() for m, layout, n in ((a, A, 8), (b, B, 4))]
        args.append(packed(c, C, 4).numpy().copy())
        out = np.zeros((32, 4), np.float32)
        launch(f"""mov.u32 %r0, %tid.x; mad.wide.u32 %d0, %r0, 16, %p0; mad.wide.u32 %d1, %r0, 8, %p1;
          mad.wide.u32 %d2, %r0, 16, %p2; mad.wide.u32 %d3, %r0, 16, %p3;
          ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d0]; ld.global.v2.b32 {{%r5, %r6}}, [%d1];
          ld.global.v4.b32 {{%r7, %r8, %r9, %r10}}, [%d2];
          mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32 {{%r7, %r8, %r9, %r10}}, {{%r1, %r2, %r3, %r4}},
            {{%r5, %r6}}, {{%r7, %r8, %r9, %r10}};
          st.global.v4.b32 [%d3], {{%r7, %r8, %r9, %r10}};""", *args, out)
        found = torch.zeros(128)
        for lane, v in itertools.product(range(32), range(4)):
            found[placed(*C, lane, v)] = out[lane, v].item()
        exact = a.double() @ b.double().T + c.double()
        error = (found.view(8, 16).T.double() - exact).abs().max()
        assert error == 0 if whole else error < 17 * 2.0 ** -24 * 64
