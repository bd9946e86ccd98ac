"""Loads, stores, atomics and copies: values, widths, and addresses that are not allowed."""

import struct

import numpy as np
import pytest
from ptx_kernels import evaluate, kernel, launch, samples

from tools.ptx.machine import Fault, Kernel, Options, Region

INTEGERS = {f"{s}{b}": np.dtype(f"{'i' if s == 's' else 'u'}{b // 8}") for s in "su" for b in (8, 16, 32, 64)}
LANE = "mov.u32 %r0, %tid.x; mul.wide.u32 %d0, %r0, {size}; add.s64 %d1, %p0, %d0; add.s64 %d2, %p1, %d0;\n"


@pytest.mark.parametrize("space", ["global", "shared", "generic", "generic shared", "local", "generic local"])
@pytest.mark.parametrize("t", INTEGERS)
def test_widths_and_signs(t, space):
    """A load fills its register by its type's sign; a store keeps the low bytes."""
    size = INTEGERS[t].itemsize
    x, y = samples(INTEGERS[t], 32), np.zeros(32, INTEGERS[t])
    for register in (k for k in (2, 4, 8) if k >= size):
        name = {2: "%h", 4: "%r", 8: "%d"}[register]
        wide = np.zeros(32, f"{INTEGERS[t].kind}{register}")
        code = LANE.format(size=size) + f"""
          mul.lo.u32 %r9, %r0, {size}; mov.u32 %r8, sm; add.u32 %r8, %r8, %r9; cvt.u64.u32 %d8, %r8;
          cvta.shared.u64 %d9, %d8; mov.b64 %d7, depot; cvta.local.u64 %d6, %d7;
          ld.global.{t} {name}10, [%d1];
        """
        to = {"global": "[%d2]", "shared": "[%r8]", "generic": "[%d2]", "generic shared": "[%d9]", "local": "[%d7+8]",
              "generic local": "[%d6+8]"}[space]
        word = "" if space.startswith("generic") else "." + space
        code += f"st{word}.{t} {to}, {name}10; ld{word}.{t} {name}11, {to};\n"
        if "global" not in space and space != "generic":
            code += f"st.global.{t} [%d2], {name}11;\n"
        code += f"mad.wide.u32 %d3, %r0, {register}, %p2; st.global.b{8 * register} [%d3], {name}11;"
        launch(".local .align 8 .b8 depot[16];\n" + code, x, y, wide, shared=512)
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(wide, x.astype(wide.dtype))


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("bits,count", [(8, 2), (8, 4), (16, 2), (16, 4), (32, 2), (32, 4), (64, 2)])
def test_vectors(bits, count, space):
    size = bits // 8 * count
    x, y = samples(np.uint8, 32 * size), np.zeros(32 * size, np.uint8)
    name = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[bits]
    vector = ", ".join(f"{name}{10 + k}" for k in range(count))
    t = f"v{count}.b{bits}"
    code = LANE.format(size=size) + f"ld.global.{t} {{{vector}}}, [%d1];\n"
    if space == "shared":
        code += f"mov.u32 %r8, sm; mad.lo.u32 %r8, %r0, {size}, %r8; st.shared.{t} [%r8], {{{vector}}};\n"
        vector = ", ".join(f"{name}{30 + k}" for k in range(count))
        code += f"ld.shared.{t} {{{vector}}}, [%r8];\n"
    launch(code + f"st.global.{t} [%d2], {{{vector}}};", x, y, shared=1024)
    np.testing.assert_array_equal(y, x)


def test_a_vector_may_be_loaded_over_its_address():
    x, y = samples(np.uint64, 64), np.zeros(64, np.uint64)
    launch(LANE.format(size=16) + "ld.global.v2.b64 {%d1, %d3}, [%d1]; st.global.v2.b64 [%d2], {%d1, %d3};", x, y)
    np.testing.assert_array_equal(y, x)


def test_constants_are_stored():
    x = np.zeros(128, np.uint32)
    launch("mov.u32 %r0, %tid.x; mad.wide.u32 %d0, %r0, 16, %p0; st.global.v4.b32 [%d0], {1, %r0, -1, 0f3F800000};", x)
    rows = x.reshape(32, 4)
    np.testing.assert_array_equal(rows[:, 1], np.arange(32))
    assert (rows[:, [0, 2, 3]] == [1, 0xffffffff, 0x3f800000]).all()


def test_parameters():
    """At their alignment, of every width, through registers, with negative offsets, as vectors."""
    text = kernel("""
      ld.param.u8 %r1, [a]; ld.param.s16 %r2, [b]; ld.param.s32 %d1, [c]; ld.param.f32 %r3, [e+4];
      mov.b64 %d2, e; add.s64 %d2, %d2, 16; ld.param.u32 %r4, [%d2+-8]; ld.param.v2.u32 {%r5, %r6}, [e+8];
      mov.u32 %r0, %tid.x; setp.eq.u32 %q0, %r0, 0; @%q0 st.global.v4.b32 [%p0], {%r1, %r2, %r3, %r4};
      @%q0 st.global.v2.b32 [%p0+16], {%r5, %r6}; @%q0 st.global.b64 [%p0+24], %d1;
    """, [8]).replace("  .param .b64 p0", "  .param .b64 p0,\n  .param .u8 a,\n  .param .u16 b,\n  .param .s32 c,\n"
                      "  .param .align 8 .b8 e[16]")
    built = Kernel(text)
    assert [(p.name, p.offset, p.bytes) for p in built.parameters] == [
        ("p0", 0, 8), ("a", 8, 1), ("b", 10, 2), ("c", 12, 4), ("e", 16, 16)]
    out = np.zeros(8, np.int32)
    arguments = struct.pack("<QBxhiIfII", out.ctypes.data, 200, -3, -5, 0, 1.5, 7, 8)
    built.launch((1, 1, 1), 32, arguments, [Region(out.ctypes.data, 32, "out")])
    assert out.tolist() == [200, -3, 0x3fc00000, 7, 7, 8, -5, -1]
    with pytest.raises(ValueError, match="bytes of parameters"):
        built.launch((1, 1, 1), 32, arguments[:-1], [Region(out.ctypes.data, 32, "out")])
    with pytest.raises(Fault, match="out of bounds: byte 32 of 32 bytes of parameters"):
        Kernel(kernel("mov.b64 %d2, a; ld.param.u32 %r4, [%d2+24];", [8]).replace(
            ".param .b64 p0", ".param .b64 p0,\n.param .align 8 .b8 a[24]")
        ).launch((1, 1, 1), 32, arguments[:32], [Region(out.ctypes.data, 32, "out")])


@pytest.mark.parametrize("code,message", [
    ("add.s64 %d0, %p0, 128; ld.global.b32 %r0, [%d0];", "out of bounds: 4 bytes at byte 128 of p0, which has 128"),
    ("ld.global.v2.b32 {%r0, %r1}, [%p0+128];", "out of bounds: 8 bytes at byte 128"),
    ("ld.global.b32 %r0, [%p0+-4];", "out of bounds"),
    ("add.s64 %d0, %p0, 4; ld.global.v2.b32 {%r0, %r1}, [%d0];", "misaligned"),
    ("ld.global.b16 %h0, [%p0+1];", "misaligned"),
    ("mov.u32 %r0, sm; st.shared.b32 [%r0+256], 1;", "4 bytes at byte 256 of 256 bytes of shared memory"),
    ("mov.u32 %r0, sm; st.shared.b32 [%r0+-4], 1;", "out of bounds"),
    ("mov.u32 %r0, sm; st.shared.b32 [%r0+2], 1;", "misaligned"),
    ("mov.u64 %d0, depot; st.local.b32 [%d0+16], 1;", "4 bytes at byte 16 of 16 bytes of local memory"),
    ("mov.u64 %d0, 12345678; ld.b64 %d1, [%d0];", "misaligned|out of bounds"),
    ("cvta.shared.u64 %d0, 256; ld.b32 %r1, [%d0];", "out of bounds: 4 bytes at byte 256"),
    ("cp.async.ca.shared.global [sm], [%p0+126], 4;", "misaligned: source"),
    ("cp.async.ca.shared.global [sm], [%p0+128], 4;", "out of bounds"),
    ("cp.async.cg.shared.global [sm+8], [%p0], 16;", "misaligned"),
    ("mov.u32 %r0, 8; cp.async.ca.shared.global [sm], [%p0], 4, %r0;", "more source bytes"),
    ("trap;", "trap"),
])
def test_faults_name_what_happened(code, message):
    with pytest.raises(Fault, match=message) as caught:
        launch(".local .align 8 .b8 depot[16];\nmov.u32 %r99, %tid.x; setp.eq.u32 %q0, %r99, 0;\n@!%q0 ret;\n" + code,
               np.zeros(128, np.uint8), shared=256)
    assert "line " in str(caught.value) and "block 0 warp 0" in str(caught.value)


ATOMICS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op,t", [
    ("add", "u32"), ("add", "s32"), ("add", "u64"), ("add", "f32"), ("min", "s32"), ("max", "s32"), ("min", "u32"),
    ("max", "u32"), ("min", "s64"), ("max", "u64"), ("and", "b32"), ("or", "b32"), ("and", "b64"),
])
def test_atomics(op, t, space):
    """Every lane once, and what it finds is a value in between."""
    kind = np.dtype(np.float32) if t == "f32" else INTEGERS[t.replace("b", "u")]
    x = np.arange(-64, 64).astype(kind) if t == "f32" else samples(kind, 128)
    total, found, size = x[:1] * 0, np.zeros(128, kind), kind.itemsize
    name = "%r" if size == 4 else "%d"
    at = "[%p0]" if space == "global" else "[sm]"
    body = LANE.replace("%p0", "%p1", 1).replace("%p1, %d0;\n", "%p2, %d0;\n").format(size=size)
    code = f"""{body} ld.global.b{8 * size} {name}20, [%d1];
      setp.eq.u32 %q1, %r0, 0; @%q1 st.shared.b64 [sm], 0; bar.sync 0;
      atom.{space}.{op}.{t} {name}21, {at}, {name}20; st.global.b{8 * size} [%d2], {name}21; bar.sync 0;
    """
    if space == "shared":
        code += f"@%q1 ld.shared.b{8 * size} {name}22, [sm]; @%q1 st.global.b{8 * size} [%p0], {name}22;"
    launch(code, total, x, found, threads=128, shared=16)
    with np.errstate(over="ignore"):
        whole = ATOMICS[op].reduce(np.concatenate([x[:1] * 0, x]))
    assert total[0] == whole.astype(kind)
    assert found[0] == 0 or 0 in found


def test_exchange_and_compare():
    """A list of the lanes, linked by exchanges; one lane wins a comparison."""
    head, found, won = np.full(1, 99, np.uint32), np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    launch("""mov.u32 %r0, %tid.x; mul.wide.u32 %d0, %r0, 4; add.s64 %d1, %p1, %d0; add.s64 %d2, %p2, %d0;
      atom.global.exch.b32 %r1, [%p0], %r0; st.global.b32 [%d1], %r1; bar.warp.sync -1;
      atom.global.cas.b32 %r2, [%p0], %r0, 77; st.global.b32 [%d2], %r2;""", head, found, won, seed=3)
    assert sorted([*found, head[0] if head[0] != 77 else 31]) == sorted([*range(31), 31, 99]) or head[0] == 77
    assert head[0] == 77 and len(set(found)) == 32 and 99 in found


def test_reductions_return_nothing():
    total = np.zeros(1, np.int32)
    launch("red.global.add.s32 [%p0], 3; red.relaxed.gpu.global.add.s32 [%p0], 1;", total, threads=64)
    assert total[0] == 4 * 64


COPY = """mov.u32 %r0, %tid.x; mul.wide.u32 %d0, %r0, {size}; add.s64 %d1, %p0, %d0; add.s64 %d2, %p1, %d0;
  mov.u32 %r1, sm; mad.lo.u32 %r1, %r0, {size}, %r1;
"""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_fill_up_with_zeros(size, seed):
    """Of a copy whose source has fewer bytes the rest is zeros; none of it has to exist."""
    x, y = samples(np.uint8, 31 * size), np.zeros(32 * size, np.uint8)
    valid = np.arange(32) * 7 % (size + 1)
    valid[31] = 0
    names = {4: "%r10", 8: "%d10", 16: "{%d10, %d11}"}[size]
    t = {4: "b32", 8: "b64", 16: "v2.b64"}[size]
    launch(COPY.format(size=size) + f"""
      mul.lo.u32 %r2, %r0, 7; rem.u32 %r2, %r2, {size + 1}; setp.eq.u32 %q0, %r0, 31;
      selp.b32 %r2, 0, %r2, %q0;
      cp.async.ca.shared.global [%r1], [%d1], {size}, %r2; cp.async.commit_group; cp.async.wait_group 0;
      ld.shared.{t} {names}, [%r1]; st.global.{t} [%d2], {names};""", x, y, shared=512, seed=seed)
    expected = np.zeros((32, size), np.uint8)
    for lane, count in enumerate(valid):
        expected[lane, :count] = x[lane * size : lane * size + count]
    np.testing.assert_array_equal(y.reshape(32, size), expected)


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_copies(seed):
    """wait_group n leaves the last n groups under way; each lane counts its own."""
    x, y = samples(np.uint32, 96), np.zeros(96, np.uint32)
    copies = "".join(
        f"cp.async.ca.shared.global [%r1+{128 * k}], [%d1+{128 * k}], 4; cp.async.commit_group;\n" for k in range(3)
    )
    reads = [f"ld.shared.b32 %r5, [%r1+{128 * k}]; st.global.b32 [%d2+{128 * k}], %r5;\n" for k in range(3)]
    code = COPY.format(size=4) + copies
    for k in range(3):
        code += f"cp.async.wait_group {2 - k};\n" + reads[k]
    launch(code, x, y, shared=512, seed=seed)
    np.testing.assert_array_equal(y, x)
    with pytest.raises(Fault, match="asynchronous copy not waited for"):
        launch(COPY.format(size=4) + copies + "cp.async.wait_group 1;\n" + reads[2], x, y, shared=512, seed=seed)
    # half of the lanes copy, commit and wait: the others' copies are still under way
    half = "setp.lt.u32 %q0, %r0, 16; @!%q0 bra OTHERS;\n" + copies + "cp.async.wait_all;\n" + reads[0] + "bra END;\n"
    others = "OTHERS: cp.async.ca.shared.global [%r1], [%d1], 4; cp.async.wait_group 0;\n" + reads[0] + "END:"
    with pytest.raises(Fault, match="asynchronous copy not waited for by block 0 warp 0 lane (1[6-9]|[23])"):
        launch(COPY.format(size=4) + half + others, x, y, shared=512, seed=seed)


def test_copies_are_late():
    """With races off, a copy that is not waited for has not happened, with some schedule."""
    x, y = np.arange(1, 33, dtype=np.uint32), np.zeros(32, np.uint32)
    code = COPY.format(size=4) + """st.shared.b32 [%r1], 0; cp.async.ca.shared.global [%r1], [%d1], 4;
      ld.shared.b32 %r5, [%r1]; st.global.b32 [%d2], %r5;"""
    launch(code, x, y, shared=512, races=False)
    assert (y == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_what_a_copy_reads_may_not_change(seed):
    x, y = samples(np.uint32, 32), np.zeros(32, np.uint32)
    code = COPY.format(size=4) + "cp.async.ca.shared.global [%r1], [%d1], 4; {0} st.global.b32 [%d1], 5;"
    launch(code.replace("{0}", "cp.async.wait_all;"), x, y, shared=512, seed=seed)
    with pytest.raises(Fault, match="asynchronous read not waited for"):
        launch(code.replace("{0}", ""), x, y, shared=512, seed=seed)


def test_bits_of_the_result_do_not_depend_on_the_input_array():
    a = samples(np.uint32, 32)
    kept = a.copy()
    evaluate("add.u32 d, a, 1;", np.uint32, a)
    np.testing.assert_array_equal(a, kept)


def test_static_and_dynamic_shared_memory_do_not_overlap():
    """Arrays declared in the body too: dynamic memory lies behind all of them, at its alignment."""
    y = np.zeros(3, np.uint32)
    launch(""".shared .align 4 .b8 inside[12];
      mov.u32 %r0, sm; mov.u32 %r1, inside; mov.u32 %r2, before; mov.u32 %r3, %tid.x; setp.eq.u32 %q0, %r3, 0;
      @%q0 st.shared.b32 [%r1], 1; @%q0 st.shared.b32 [%r0], 2; @%q0 st.shared.b32 [%r2], 3; bar.sync 0;
      ld.shared.b32 %r4, [%r0]; ld.shared.b32 %r5, [%r1]; ld.shared.b32 %r6, [%r2];
      @%q0 st.global.b32 [%p0], %r4; @%q0 st.global.b32 [%p0+4], %r5; @%q0 st.global.b32 [%p0+8], %r6;
      @%q0 st.shared.b32 [%r0+28], 1;
    """, y, shared=32, before=".shared .align 8 .b8 before[20];")
    assert y.tolist() == [2, 1, 3]


def test_counts():
    """Lanes, bytes, sectors of 32 bytes, and passes of shared memory with 32 banks of 4 bytes."""
    room = np.zeros(32 * 32 + 8, np.uint32)
    x = room[-room.ctypes.data % 32 // 4 :][: 32 * 32]  # from the start of a sector
    for stride, sectors, passes in ((1, 4, 1), (2, 8, 2), (8, 32, 8), (32, 32, 32)):
        built = launch(f"""mov.u32 %r0, %tid.x; mul.lo.u32 %r0, %r0, {4 * stride}; cvt.u64.u32 %d0, %r0;
          add.s64 %d0, %p0, %d0; ld.global.b32 %r1, [%d0]; mov.u32 %r2, sm; add.u32 %r2, %r2, %r0;
          st.shared.b32 [%r2], %r1;
          @%q0 ld.global.b32 %r1, [%d0];""".replace("@%q0", "setp.lt.u32 %q0, %r0, 12; @%q0"),
                       x, shared=4096, measure=True)
        at = {i.opcode: k for k, i in enumerate(built.instructions)}
        counts = built.counts
        first = [k for k, i in enumerate(built.instructions) if i.opcode == "ld.global.b32"]
        assert counts.sectors[first[0]] == sectors and counts.wavefronts[at["st.shared.b32"]] == passes
        assert counts.lanes[first[0]] == 32 and counts.bytes[first[0]] == 128 and counts.executed[first[0]] == 1
        assert counts.lanes[first[1]] == -(-12 // (4 * stride))
        assert counts.bytes[first[1]] == 4 * counts.lanes[first[1]]
        built.reset_counts()
        assert not built.counts.executed.any()


def test_options_are_checked():
    text = Kernel(kernel("", []))
    bad = (33, 1, 1, 8), (0, 1, 1, 8), (2048, 1, 1, 8), (32, 3, 2, 8), (32, 2, 2, 1)
    for threads, grid, cluster, resident in bad:
        with pytest.raises(ValueError, match="launch"):
            text.launch((grid, 1, 1), threads, b"", [], 0, cluster, Options(resident=resident))
