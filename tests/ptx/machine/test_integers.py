"""Integer instructions against Python's integers, which do not overflow, and the pseudocode of the PTX ISA."""

import numpy as np
import pytest
from ptx_kernels import evaluate, pairs, samples

KINDS = {"s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64}
WIDER = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}


def wrapped(values, kind):
    """Python's integers modulo the width of `kind`."""
    bits = 8 * np.dtype(kind).itemsize
    return np.array([int(v) & ((1 << bits) - 1) for v in values], f"u{bits // 8}").view(kind)


def check(code, kind, function, *inputs):
    expected = wrapped([function(*(int(x) for x in row)) for row in zip(*inputs)], kind)
    np.testing.assert_array_equal(evaluate(code, kind, *inputs), expected)


def truncated(a, b):
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
}


@pytest.mark.parametrize("t", KINDS)
@pytest.mark.parametrize("op", BINARY)
def test_binary(op, t):
    check(f"{op}.{t} d, a, b;", KINDS[t], BINARY[op], *pairs(KINDS[t]))


@pytest.mark.parametrize("t", KINDS)
def test_high_half_of_a_product(t):
    bits = 8 * np.dtype(KINDS[t]).itemsize
    check(f"mul.hi.{t} d, a, b;", KINDS[t], lambda a, b: a * b >> bits, *pairs(KINDS[t]))


@pytest.mark.parametrize("t", KINDS)
def test_quotients(t):
    """Toward zero; the remainder has the sign of the dividend. By zero PTX leaves the result open."""
    a, b = pairs(KINDS[t])
    b = np.where(b == 0, 3, b).astype(KINDS[t])
    check(f"div.{t} d, a, b;", KINDS[t], truncated, a, b)
    check(f"rem.{t} d, a, b;", KINDS[t], lambda a, b: a - b * truncated(a, b), a, b)


@pytest.mark.parametrize("t", KINDS)
def test_multiply_and_add(t):
    a, b = pairs(KINDS[t])
    check(f"mad.lo.{t} d, a, b, c;", KINDS[t], lambda a, b, c: a * b + c, a, b, samples(KINDS[t], len(a), 2))


@pytest.mark.parametrize("t", WIDER)
def test_wide_products(t):
    a, b = pairs(KINDS[t])
    check(f"mul.wide.{t} d, a, b;", WIDER[t], lambda a, b: a * b, a, b)
    check(f"mad.wide.{t} d, a, b, c;", WIDER[t], lambda a, b, c: a * b + c, a, b, samples(WIDER[t], len(a), 2))


@pytest.mark.parametrize("t", ["s16", "s32", "s64"])
def test_negative_and_absolute(t):
    a = samples(KINDS[t], 256)
    check(f"neg.{t} d, a;", KINDS[t], lambda a: -a, a)
    check(f"abs.{t} d, a;", KINDS[t], abs, a)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bitwise(bits):
    a, b = pairs(f"u{bits // 8}")
    kind = a.dtype
    np.testing.assert_array_equal(evaluate(f"and.b{bits} d, a, b;", kind, a, b), a & b)
    np.testing.assert_array_equal(evaluate(f"or.b{bits} d, a, b;", kind, a, b), a | b)
    np.testing.assert_array_equal(evaluate(f"xor.b{bits} d, a, b;", kind, a, b), a ^ b)
    np.testing.assert_array_equal(evaluate(f"not.b{bits} d, a;", kind, a), ~a)
    np.testing.assert_array_equal(evaluate(f"mov.b{bits} d, a;", kind, a), a)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    """Amounts above the width are the width."""
    a = samples(f"u{bits // 8}", 512)
    n = np.concatenate([np.arange(128), [bits - 1, bits, bits + 1, 0x80000000, 0xffffffff],
                        samples(np.uint32, 379) % 70]).astype(np.uint32)
    signed = f"i{bits // 8}"
    left = wrapped([int(x) << min(int(k), 200) for x, k in zip(a, n)], a.dtype)
    right = wrapped([int(x) >> min(int(k), 200) for x, k in zip(a, n)], a.dtype)
    arithmetic = wrapped([int(x) >> min(int(k), 200) for x, k in zip(a.view(signed), n)], signed)
    np.testing.assert_array_equal(evaluate(f"shl.b{bits} d, a, b;", a.dtype, a, n), left)
    np.testing.assert_array_equal(evaluate(f"shr.u{bits} d, a, b;", a.dtype, a, n), right)
    np.testing.assert_array_equal(evaluate(f"shr.b{bits} d, a, b;", a.dtype, a, n), right)
    np.testing.assert_array_equal(evaluate(f"shr.s{bits} d, a, b;", signed, a.view(signed), n), arithmetic)


def extracted(a, position, length, bits, signed):
    """bfe of the ISA, bit by bit."""
    position, length = position & 0xff, length & 0xff
    a &= (1 << bits) - 1
    sign = a >> min(position + length - 1, bits - 1) & 1 if signed and length else 0
    return sum((a >> (position + k) & 1 if k < length and position + k < bits else sign) << k for k in range(bits))


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64"])
def test_bit_fields_extracted(t):
    bits, signed = int(t[1:]), t[0] == "s"
    a = samples(KINDS[t], 512)
    random = np.random.default_rng(5)
    p, n = random.integers(0, 80, (2, 512), np.uint32)
    p[:8], n[:8] = [0, 0, 31, 32, 63, 255, 256, 5], [0, 1, 1, 8, 64, 255, 256, 0]
    check(f"bfe.{t} d, a, b, c;", KINDS[t], lambda a, p, n: extracted(a, p, n, bits, signed), a, p, n)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields_inserted(bits):
    def inserted(a, b, position, length):
        for k in range(length & 0xff):
            if (position & 0xff) + k < bits:
                b = b & ~(1 << (position & 0xff) + k) | (a >> k & 1) << (position & 0xff) + k
        return b

    a, b = samples(f"u{bits // 8}", 512), samples(f"u{bits // 8}", 512, 1)
    p, n = np.random.default_rng(5).integers(0, 80, (2, 512), np.uint32)
    p[:4], n[:4] = [0, 255, 256, 31], [0, 255, 257, 1]
    check(f"bfi.b{bits} d, a, b, c, e;", a.dtype, inserted, a, b, p, n)


def test_bytes_permuted():
    def permuted(a, b, selector):
        both = (a | b << 32).to_bytes(8, "little")
        found = []
        for k in range(4):
            s = selector >> 4 * k & 15
            byte = both[s & 7]
            found.append((0xff if byte & 0x80 else 0) if s & 8 else byte)
        return int.from_bytes(bytes(found), "little")

    a, b, s = (samples(np.uint32, 1024, k) for k in range(3))
    check("prmt.b32 d, a, b, c;", np.uint32, permuted, a, b, s)
    check("prmt.b32 d, a, b, 0x7531;", np.uint32, lambda a, b: permuted(a, b, 0x7531), a, b)


def test_every_function_of_three_bits():
    """The table's index: bit of a, then of b, then of c (0xF0, 0xCC and 0xAA are the operands themselves)."""
    a, b, c = (samples(np.uint32, 64, k) for k in range(3))
    for table in (0xF0, 0xCC, 0xAA, 0x80, 0xFE, 0x1A, 0x96, 0xD8, 0, 0xFF, *range(3, 250, 37)):
        expected = np.zeros_like(a)
        for bit in range(32):
            index = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
            expected |= (np.uint32(table) >> index & 1).astype(np.uint32) << np.uint32(bit)
        np.testing.assert_array_equal(evaluate(f"lop3.b32 d, a, b, c, {table};", np.uint32, a, b, c), expected)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode):
    a, b = samples(np.uint32, 512), samples(np.uint32, 512, 1)
    n = np.concatenate([np.arange(70), samples(np.uint32, 442, 2)]).astype(np.uint32)
    amount = (lambda n: n & 31) if mode == "wrap" else (lambda n: min(n, 32))
    check(f"shf.l.{mode}.b32 d, a, b, c;", np.uint32, lambda a, b, n: (b << 32 | a) << amount(n) >> 32, a, b, n)
    check(f"shf.r.{mode}.b32 d, a, b, c;", np.uint32, lambda a, b, n: (b << 32 | a) >> amount(n), a, b, n)


@pytest.mark.parametrize("bits", [32, 64])
def test_counts_and_reversal(bits):
    a = samples(f"u{bits // 8}", 256)
    check(f"popc.b{bits} d, a;", np.uint32, lambda a: bin(a).count("1"), a)
    check(f"clz.b{bits} d, a;", np.uint32, lambda a: bits - a.bit_length(), a)
    check(f"brev.b{bits} d, a;", a.dtype, lambda a: int(f"{a:0{bits}b}"[::-1], 2), a)


@pytest.mark.parametrize("t", ["s32", "u32"])
def test_products_of_24_bits(t):
    """mul24 takes the low 24 bits as a number; lo keeps bits 0 to 31."""
    def low(x):
        x &= 0xffffff
        return x - (1 << 24) if t == "s32" and x >> 23 else x

    a, b = pairs(KINDS[t])
    check(f"mul24.lo.{t} d, a, b;", KINDS[t], lambda a, b: low(a) * low(b), a, b)


def test_halves_and_wholes():
    lo, hi = samples(np.uint16, 64), samples(np.uint16, 64, 1)
    whole = lo.astype(np.uint32) | hi.astype(np.uint32) << np.uint32(16)
    np.testing.assert_array_equal(evaluate("mov.b32 d, {a, b};", np.uint32, lo, hi), whole)
    for take, half in ((0, lo), (1, hi)):
        code = ["mov.b32 {d, x}, a;", "mov.b32 {x, d}, a;"][take]
        np.testing.assert_array_equal(evaluate(f".reg .b16 x;\n{code}", np.uint16, whole), half)
        code = ["mov.b32 {d, _}, a;", "mov.b32 {_, d}, a;"][take]
        np.testing.assert_array_equal(evaluate(code, np.uint16, whole), half)
    lo, hi = samples(np.uint32, 64), samples(np.uint32, 64, 1)
    whole = lo.astype(np.uint64) | hi.astype(np.uint64) << np.uint64(32)
    np.testing.assert_array_equal(evaluate("mov.b64 d, {a, b};", np.uint64, lo, hi), whole)
    code = ".reg .b32 x, y; mov.b64 {x, y}, a; sub.u32 d, y, x;"
    np.testing.assert_array_equal(evaluate(code, np.uint32, whole), hi - lo)
    np.testing.assert_array_equal(evaluate("mov.b64 {d, _}, a;", np.uint32, whole), lo)
    np.testing.assert_array_equal(evaluate("mov.b64 {_, d}, a;", np.uint32, whole), hi)


def test_four_quarters():
    parts = [samples(np.uint16, 64, k) for k in range(4)]
    whole = sum(p.astype(np.uint64) << np.uint64(16 * k) for k, p in enumerate(parts))
    np.testing.assert_array_equal(evaluate("mov.b64 d, {a, b, c, e};", np.uint64, *parts), whole)
    for k in range(4):
        names = ["x0", "x1", "x2", "x3"]
        names[k] = "d"
        code = f".reg .b16 x0, x1, x2, x3; mov.b64 {{{', '.join(names)}}}, a;"
        np.testing.assert_array_equal(evaluate(code, np.uint16, whole), parts[k])


def test_immediates():
    a = samples(np.uint32, 32)
    np.testing.assert_array_equal(evaluate("add.s32 d, a, -1;", np.uint32, a), a - np.uint32(1))
    np.testing.assert_array_equal(evaluate("add.s32 d, a, 0xffffffff;", np.uint32, a), a - np.uint32(1))
    np.testing.assert_array_equal(evaluate("xor.b32 d, a, 0b101;", np.uint32, a), a ^ np.uint32(5))
    np.testing.assert_array_equal(evaluate("and.b32 d, a, 255U;", np.uint32, a), a & np.uint32(255))
    np.testing.assert_array_equal(evaluate("mov.f32 d, 0f3FC00000;", np.float32, a), np.full(32, 1.5, np.float32))
    np.testing.assert_array_equal(evaluate("mov.b64 d, -2;", np.int64, a), np.full(32, -2))
    np.testing.assert_array_equal(evaluate("mov.b64 d, 0d3FF8000000000000;", np.float64, a), np.full(32, 1.5))
