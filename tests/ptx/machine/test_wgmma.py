"""wgmma: layouts that descriptors name, fragments, scales, groups, and the fences that it wants.

The layouts are CUTLASS's (include/cute/atom/mma_traits_sm90_gmma.hpp, "canonical layout"): positions in units of
numbers, T = 8 numbers of 16 bits in 16 bytes, W = 1, 2, 4, 8 for no swizzle and those of 32, 64 and 128 bytes.
  K-major:   ((8,m),(T,2)) : ((W T, SBO),(1, T))                        no swizzle: (1, LBO)
  MN-major:  ((T,W,m),(8,k)) : ((1, T, LBO),(W T, SBO))                 no swizzle: ((1, -, SBO),(T, LBO))
Byte addresses are then swizzled by Swizzle<log2 W, 4, 3>. Fragments of D, and of A in registers, m + 64 n:
((4,8,4),(2,2,n/8)) : ((128,1,16),(64,8,512)).
"""

import numpy as np
import pytest
import torch
from ptx_kernels import kernel, launch

from tools.ptx.machine import Fault, Kernel, UnknownInstruction

WIDTH = {0: 1, 32: 2, 64: 4, 128: 8}
KIND = {0: 0, 32: 3, 64: 2, 128: 1}  # of a descriptor's bits 62 and 63: CUTLASS, include/cute/arch/mma_sm90_desc.hpp
START_B = 1 << 15


def position(swizzle, k_major, leading, stride, mn, k):
    """The byte of element (mn, k), before the swizzle, from the start address."""
    w, t = WIDTH[swizzle], 8
    lbo, sbo = leading // 2, stride // 2
    if k_major:
        at = mn % 8 * w * t + mn // 8 * sbo + k % t + k // t * (t if swizzle else lbo)
    elif swizzle:
        at = mn % t + mn // t % w * t + mn // t // w * lbo + k % 8 * w * t + k // 8 * sbo
    else:
        at = mn % t + mn // t * sbo + k % 8 * t + k // 8 * lbo
    return 2 * at


def swizzled(at, swizzle):
    bits = WIDTH[swizzle].bit_length() - 1
    return at ^ (at >> 7 & (1 << bits) - 1) << 4


class Operand:
    """A matrix [mn, 16 steps] in shared memory from `start`. Atoms lie one after another, with a gap."""

    def __init__(self, matrix, swizzle, k_major, start):
        self.matrix, self.swizzle, self.k_major, self.start = matrix, swizzle, k_major, start
        rows, columns = matrix.shape
        w = WIDTH[swizzle]
        atom = 128 * w
        if k_major:
            self.stride = atom + (0 if swizzle else 16 * 8)
            self.leading = rows // 8 * self.stride if not swizzle else 16
            # a step of 16 columns: within a swizzle's width by 32 bytes, else a block of its own
            self.step = [
                (32 * (s % (w // 2)) + s // (w // 2) * (rows // 8 * self.stride)) if swizzle else 2 * s * self.leading
                for s in range(columns // 16)
            ]
        elif swizzle:
            self.stride = atom
            self.leading = columns // 8 * atom
            self.step = [2 * s * atom for s in range(columns // 16)]
        else:
            self.stride, self.leading = columns // 8 * atom, atom
            self.step = [2 * s * atom for s in range(columns // 16)]

    def put(self, image):
        rows, columns = self.matrix.shape
        bits = self.matrix.view(torch.int16).numpy().view(np.uint16)
        for s in range(columns // 16):
            for mn in range(rows):
                for k in range(16):
                    at = position(self.swizzle, self.k_major, self.leading, self.stride, mn, k)
                    at = swizzled(self.start + self.step[s] + at, self.swizzle)
                    image[at // 2] = bits[mn, 16 * s + k]

    def descriptors(self):
        return [(self.start + step) >> 4 & 0x3fff | (self.leading >> 4) << 16 | (self.stride >> 4) << 32
                | KIND[self.swizzle] << 62 for step in self.step]


def spot(thread, value):
    """(row, column) of a fragment's number."""
    at = (thread % 4 * 128 + thread // 4 % 8 + thread // 32 * 16 + value % 2 * 64 + value // 2 % 2 * 8 + value // 4 * 512)
    return at % 64, at // 64


FILL = """mov.u32 %r0, %tid.x; mov.u32 %r1, sm; mov.u32 %r2, %r0;
  FILL: mul.lo.u32 %r3, %r2, 16; cvt.u64.u32 %d0, %r3; add.s64 %d0, %p0, %d0; add.u32 %r3, %r3, %r1;
  ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d0]; st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}}; add.u32 %r2, %r2, {threads};
  setp.lt.u32 %q0, %r2, {words}; @%q0 bra FILL;
"""
PROXY = "fence.proxy.async.shared::cta; bar.sync 0;\n"
FENCE, COMMIT = "wgmma.fence.sync.aligned;\n", "wgmma.commit_group.sync.aligned;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;\n"


def product(n, t, a, b, scales="1, 1", trans=", 0, 0", keep="1"):
    d = ", ".join(f"v{k}" for k in range(n // 2))
    return (f"setp.ne.b32 %q5, {keep}, 0; wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{t}.{t} {{{d}}}, {a}, {b}, %q5,"
            f" {scales}{trans};\n")


def store(n):
    return f"mad.wide.u32 %d9, %r0, {2 * n}, %p1;\n" + "".join(f"st.global.b32 [%d9+{4 * k}], v{k};\n" for k in range(n // 2))


def declare(n):
    return f".reg .b32 v<{n // 2}>;\n" + "".join(f"mov.b32 v{k}, 0f40000000;\n" for k in range(n // 2))


def run(body, image, n, threads=128, seed=0, fill=FILL):
    out = np.zeros((threads, n // 2), np.float32)
    size = image.nbytes
    launch(declare(n) + fill.format(threads=threads, words=size // 16) + body + store(n), image, out, threads=threads,
           shared=size, seed=seed)
    d = torch.zeros(threads // 2, n)
    for thread in range(threads):
        for v in range(n // 2):
            row, column = spot(thread % 128, v)
            d[thread // 128 * 64 + row, column] = out[thread, v].item()
    return d


def numbers(rows, columns, t, seed=0):
    torch.manual_seed(seed)
    return torch.randint(-4, 5, (rows, columns)).to({"bf16": torch.bfloat16, "f16": torch.float16}[t])


@pytest.mark.parametrize("b_major", ["k", "n"])
@pytest.mark.parametrize("a_major", ["k", "m", "registers"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_layouts(swizzle, a_major, b_major):
    """Four steps of k: the start address moves on by them. A and B with the same swizzle."""
    n, steps, t = 40 if b_major == "k" or not swizzle else 128, 4, "bf16"
    a, b = numbers(64, 16 * steps, t), numbers(n, 16 * steps, t, 1)
    image = np.full(32768, 0x7fc0, np.uint16)
    of_b = Operand(b, swizzle, b_major == "k", START_B)
    of_b.put(image)
    body = "".join(f"mov.b64 %d{20 + s}, {d};\n" for s, d in enumerate(of_b.descriptors()))
    if a_major == "registers":
        bits = a.view(torch.int16).numpy().view(np.uint16)
        for thread in range(128):
            for v in range(8 * steps):
                row, column = spot(thread, v)
                image[(thread * 8 * steps) + v] = bits[row, column]
        body += f"mad.lo.u32 %r9, %r0, {16 * steps}, %r1; bar.sync 0;\n"
        body += "".join(f"ld.shared.b32 %r{20 + k}, [%r9+{4 * k}];\n" for k in range(4 * steps))
        body += PROXY + FENCE + "".join(
            product(n, t, f"{{{', '.join(f'%r{20 + 4 * s + k}' for k in range(4))}}}", f"%d{20 + s}",
                    trans=f", {int(b_major == 'n')}", keep=str(int(s > 0))) for s in range(steps))
    else:
        of_a = Operand(a, swizzle, a_major == "k", 1024)
        of_a.put(image)
        body += "".join(f"mov.b64 %d{10 + s}, {d};\n" for s, d in enumerate(of_a.descriptors()))
        body += PROXY + FENCE + "".join(
            product(n, t, f"%d{10 + s}", f"%d{20 + s}", trans=f", {int(a_major == 'm')}, {int(b_major == 'n')}",
                    keep=str(int(s > 0))) for s in range(steps))
    found = run(body + COMMIT + WAIT, image, n)
    assert torch.equal(found, a.float() @ b.float().T)


def one_product(n=16, t="bf16"):
    a, b = numbers(64, 16, t), numbers(n, 16, t, 1)
    image = np.zeros(8192, np.uint16)
    of_a, of_b = Operand(a, 32, True, 0), Operand(b, 32, True, 4096)
    of_a.put(image), of_b.put(image)
    setup = f"mov.b64 %d10, {of_a.descriptors()[0]}; mov.b64 %d20, {of_b.descriptors()[0]};\n"
    return a.float() @ b.float().T, image, setup


@pytest.mark.parametrize("n", [8, 16, 24, 64, 104, 256])
@pytest.mark.parametrize("t", ["bf16", "f16"])
def test_widths_and_types(n, t):
    expected, image, setup = one_product(n, t)
    found = run(setup + PROXY + FENCE + product(n, t, "%d10", "%d20", keep="0") + COMMIT + WAIT, image, n)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("a,b", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_scales(a, b):
    """d starts as 2 and is kept; either operand may change its sign."""
    expected, image, setup = one_product()
    found = run(setup + PROXY + FENCE + product(16, "bf16", "%d10", "%d20", f"{a}, {b}") + COMMIT + WAIT, image, 16)
    assert torch.equal(found, 2 + a * b * expected)


def test_two_warpgroups():
    """Each multiplies its own rows: warp w of a group has rows 16 w to 16 w + 15."""
    expected, image, setup = one_product()
    other = "mov.u32 %r30, 64; setp.ge.u32 %q7, %r0, 128; selp.b64 %d10, %d20, %d10, %q7;\n"
    a2 = numbers(64, 16, "bf16", 3)
    Operand(a2, 32, True, 8192).put(image)
    setup += f"mov.b64 %d30, {Operand(a2, 32, True, 8192).descriptors()[0]};\n" + other.replace("%d20", "%d30")
    found = run(setup + PROXY + FENCE + product(16, "bf16", "%d10", "%d20", keep="0") + COMMIT + WAIT, image, 16, 256)
    b = numbers(16, 16, "bf16", 1)
    assert torch.equal(found, torch.cat([expected, a2.float() @ b.float().T]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups(seed):
    """wait_group 1 waits for the first of two products; what it has read may be written then."""
    expected, image, setup = one_product()
    first, again = (product(16, "bf16", "%d10", "%d20", keep=keep) for keep in "01")
    write = "mov.u32 %r40, sm; bar.sync 0; st.shared.b32 [%r40], 0;\n"
    two = (setup + PROXY + FENCE + first + COMMIT + again + COMMIT)
    assert torch.equal(run(two + WAIT, image, 16, seed=seed), 2 * expected)
    run(setup + PROXY + FENCE + first + COMMIT + WAIT + write, image, 16, seed=seed)
    # the second product still reads what the first one read
    with pytest.raises(Fault, match="race .*a product that nobody has waited for"):
        run(two + WAIT.replace("0", "1") + write + WAIT, image, 16, seed=seed)
    with pytest.raises(Fault, match="race .*a product that nobody has waited for"):
        run(two + write + WAIT, image, 16, seed=seed)


@pytest.mark.parametrize("leave_out,message", [
    ("fence", "no wgmma.fence"), ("proxy", "no fence.proxy.async"), ("late proxy", "no fence.proxy.async"),
    ("wait", "result of an asynchronous product"), ("wait 1", "result of an asynchronous product"),
    ("barrier", "race"), ("commit", "result of an asynchronous product"),
])
def test_what_is_left_out_is_noticed(leave_out, message):
    expected, image, setup = one_product()
    proxy = {"proxy": "bar.sync 0;\n", "barrier": "fence.proxy.async;\n",
             "late proxy": "bar.sync 0; setp.ge.u32 %q6, %r0, 32; @%q6 fence.proxy.async;\n"}.get(leave_out, PROXY)
    body = setup + proxy + ("" if leave_out == "fence" else FENCE) + product(16, "bf16", "%d10", "%d20", keep="0")
    body += "" if leave_out == "commit" else COMMIT
    body += "" if leave_out == "wait" else WAIT.replace("0", "1") if leave_out == "wait 1" else WAIT
    with pytest.raises(Fault, match=message):
        for seed in range(4):
            run(body, image, 16, seed=seed)


def test_a_reader_fences_for_all_that_it_knows():
    """After the barrier every warp fences: what others wrote before is visible to its products."""
    expected, image, setup = one_product()
    body = setup + "bar.sync 0; fence.proxy.async;\n" + FENCE + product(16, "bf16", "%d10", "%d20", keep="0")
    assert torch.equal(run(body + COMMIT + WAIT, image, 16, seed=3), expected)


@pytest.mark.parametrize("change,message", [
    (lambda s: s + "or.b64 %d20, %d20, 0x2000000000000;", "base offset"),
    (lambda s: s + "or.b64 %d20, %d20, 0x3fff;", "out of bounds"),
    (lambda s: s + "cvt.u64.u32 %d21, %r0; add.s64 %d20, %d20, %d21;", "different descriptors"),
    (lambda s: s + "setp.gt.u32 %q6, %r0, 95; @%q6 bra END;", "different products|ends before"),
])
def test_descriptors_that_cannot_be(change, message):
    _, image, setup = one_product()
    body = change(setup) + PROXY + FENCE
    body += product(16, "bf16", "%d10", "%d20", keep="0") + COMMIT + WAIT + "END:\n"
    with pytest.raises(Fault, match=message):
        run(body, image, 16)


@pytest.mark.parametrize("text", [
    "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {v0, v1, v2, v3}, %d0, %d1, %r0, 0, %q0, 1, 1, 0, 0;",
    "wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {v0, v1}, %d0, %d1, %q0, 1, 1, 0, 0;",
    "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {v0, v1, v2, v3}, %d0, %d1, %q0, 1, 1;",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {v0, v1, v2, v3}, %d0, %d1, %q0, 2, 1, 0, 0;",
])
def test_other_products_are_unknown(text):
    with pytest.raises(UnknownInstruction, match="wgmma"):
        Kernel(kernel(".reg .b32 v<4>;\n" + text))


def test_registers_are_set_by_whole_warpgroups():
    code = "mov.u32 %r0, %tid.x; setp.lt.u32 %q0, %r0, 128; @%q0 bra A; setmaxnreg.dec.sync.aligned.u32 40; bra B;\n"
    launch(code + "A: setmaxnreg.inc.sync.aligned.u32 232; B:", threads=256)
    with pytest.raises(Fault, match="set registers differently"):
        launch(code.replace("128", "96") + "A: setmaxnreg.inc.sync.aligned.u32 232; B:", threads=256)
