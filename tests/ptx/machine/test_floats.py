"""fp32 instructions against NumPy, which rounds once as IEEE 754 says, and bits where NumPy's differ from PTX's.

A NaN that an instruction makes is 0x7fffffff. Approximate functions are held to the errors the PTX ISA states.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_kernels import evaluate, pairs, samples

F32 = np.float32
NAN = np.uint32(0x7fffffff)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def bits(x):
    return np.asarray(x, F32).view(np.uint32)


def flushed(x):
    return np.where(np.abs(x) < F32(2.0 ** -126), np.copysign(F32(0), x), x).astype(F32)


def canonical(x):
    return np.where(np.isnan(x), NAN, bits(x))


def check(code, expected, *inputs):
    np.testing.assert_array_equal(bits(evaluate(code, F32, *inputs)), canonical(expected))


BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("rounding", ["", ".rn"])
def test_sums_and_products(op, rounding):
    a, b = pairs(F32)
    check(f"{op}{rounding}.f32 d, a, b;", BINARY[op](a, b), a, b)
    check(f"{op}{rounding}.ftz.f32 d, a, b;", flushed(BINARY[op](flushed(a), flushed(b))), a, b)


def toward_zero(exact):
    """A finite Fraction to the fp32 next to it toward zero."""
    if exact == 0:
        return F32(0)
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    found = min(size // unit * unit, Fraction(float(np.finfo(F32).max)))
    return F32(math.copysign(float(found), exact))


def test_sums_toward_zero():
    a, b = pairs(F32)
    near = F32(1) + np.arange(-8, 8, dtype=F32) * F32(2.0 ** -23)
    a = np.concatenate([a, near, near, -near])
    b = np.concatenate([b, np.full(16, 1e-20, F32), np.full(16, -1e-20, F32), np.full(16, 3e-8, F32)])
    expected = a + b
    for k, (x, y) in enumerate(zip(a.tolist(), b.tolist())):
        if math.isfinite(x) and math.isfinite(y):
            exact = Fraction(x) + Fraction(y)
            expected[k] = toward_zero(exact) if exact else F32(x + y)
    check("add.rz.f32 d, a, b;", expected, a, b)


def test_fma_rounds_once():
    a, b = pairs(F32)
    c = samples(F32, len(a), 3)
    c[: len(a) // 2] = -(a * b)[: len(a) // 2]
    expected = np.empty_like(a)
    for k, (x, y, z) in enumerate(zip(a.tolist(), b.tolist(), c.tolist())):
        if not all(map(math.isfinite, (x, y, z))):
            expected[k] = F32(x) * F32(y) + F32(z)
            if math.isfinite(x) and math.isfinite(y):
                expected[k] = F32(z)
            continue
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        low = toward_zero(exact)
        high = np.nextafter(low, F32(math.copysign(math.inf, exact)))
        if abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103:
            expected[k] = math.copysign(math.inf, exact)
        elif exact == 0:
            product = x * y
            expected[k] = F32(product if product == z == 0 and math.copysign(1, product) == math.copysign(1, z) else 0)
            if product == z == 0:
                expected[k] = F32(product) + F32(z)
        elif not math.isfinite(high):
            expected[k] = low
        else:
            below, above = abs(exact - Fraction(float(low))), abs(Fraction(float(high)) - exact)
            even = bits(low) % 2 == 0
            expected[k] = low if below < above or (below == above and even) else high
            if expected[k] == 0:
                expected[k] = math.copysign(0.0, exact)
    check("fma.rn.f32 d, a, b, c;", expected, a, b, c)


def test_minimum_and_maximum():
    """-0 is less than +0; a NaN gives the other operand, or NaN with .NaN."""
    a, b = pairs(F32)
    less = (a < b) | ((a == b) & np.signbit(a))
    low, high = np.where(less, a, b), np.where(less, b, a)
    for op, number in (("min", low), ("max", high)):
        numbers = np.where(np.isnan(a), b, np.where(np.isnan(b), a, number))
        check(f"{op}.f32 d, a, b;", numbers, a, b)
        check(f"{op}.NaN.f32 d, a, b;", np.where(np.isnan(a) | np.isnan(b), np.nan, number), a, b)
        check(f"{op}.ftz.f32 d, a, b;", flushed(numbers), a, b)


def test_signs():
    a = samples(F32, 512)
    a = a[~np.isnan(a)]
    check("neg.f32 d, a;", -a, a)
    check("abs.f32 d, a;", np.abs(a), a)
    check("neg.ftz.f32 d, a;", -flushed(a), a)
    check("abs.ftz.f32 d, a;", np.abs(flushed(a)), a)


COMPARISONS = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("ftz", ["", ".ftz"])
@pytest.mark.parametrize("op", [*COMPARISONS, "ne", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
def test_comparisons(op, ftz):
    """Ordered ones are false of a NaN, those with a u true."""
    a, b = pairs(F32)
    x, y = (flushed(a), flushed(b)) if ftz else (a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if op in COMPARISONS:
        expected = COMPARISONS[op](x, y)
    elif op == "ne":
        expected = (x != y) & ~unordered
    elif op == "neu":
        expected = (x != y) | unordered
    elif op in ("num", "nan"):
        expected = unordered == (op == "nan")
    else:
        expected = COMPARISONS[op[:2]](x, y) | unordered
    found = evaluate(f".reg .pred p; setp.{op}{ftz}.f32 p, a, b; selp.b32 d, 1, 0, p;", np.uint32, a, b)
    np.testing.assert_array_equal(found, expected)


# name: (function in fp64, inputs, largest error relative to the result, largest absolute error)
APPROXIMATE = {
    "rcp.approx": (lambda x: 1 / x, (2.0 ** -120, 2.0 ** 120), 2 ** -23, 0),
    "rcp.rn": (lambda x: 1 / x, (2.0 ** -120, 2.0 ** 120), 2 ** -24, 0),
    "sqrt.approx": (np.sqrt, (2.0 ** -120, 2.0 ** 120), 2 ** -23, 0),
    "sqrt.rn": (np.sqrt, (2.0 ** -120, 2.0 ** 120), 2 ** -24, 0),
    "rsqrt.approx": (lambda x: 1 / np.sqrt(x), (2.0 ** -120, 2.0 ** 120), 2 ** -22.9, 0),
    "ex2.approx": (np.exp2, (-20, 20), 2 ** -22.5, 0),
    "lg2.approx": (np.log2, (2.0, 2.0 ** 100), 2 ** -22, 0),
    "sin.approx": (np.sin, (-math.pi, math.pi), 0, 2 ** -20.5),
    "cos.approx": (np.cos, (-math.pi, math.pi), 0, 2 ** -20.5),
    "tanh.approx": (np.tanh, (-8, 8), 2 ** -10.987, 0),
}


@pytest.mark.parametrize("op", APPROXIMATE)
def test_approximate_functions(op):
    function, (low, high), relative, absolute = APPROXIMATE[op]
    random = np.random.default_rng(0)
    if low > 0:
        x = np.exp2(random.uniform(math.log2(low), math.log2(high), 2048)).astype(F32)
    else:
        x = random.uniform(low, high, 2048).astype(F32)
    exact = function(x.astype(np.float64))
    for ftz in ([""] if op == "tanh.approx" else ["", ".ftz"]):
        error = np.abs(evaluate(f"{op}{ftz}.f32 d, a;", F32, x).astype(np.float64) - exact)
        assert (error <= relative * np.abs(exact) * (1 + 1e-6) + absolute).all(), error.max()


INF, NEGATIVE = np.inf, -np.inf
SPECIAL = {  # of -inf, -1, -0, +0, +inf, NaN, by the tables of the ISA
    "rcp.approx": [-0.0, -1, NEGATIVE, INF, 0.0, np.nan],
    "sqrt.approx": [np.nan, np.nan, -0.0, 0.0, INF, np.nan],
    "rsqrt.approx": [np.nan, np.nan, NEGATIVE, INF, 0.0, np.nan],
    "ex2.approx": [0.0, 0.5, 1, 1, INF, np.nan],
    "lg2.approx": [np.nan, np.nan, NEGATIVE, NEGATIVE, INF, np.nan],
    "sin.approx": [np.nan, None, -0.0, 0.0, np.nan, np.nan],
    "cos.approx": [np.nan, None, 1, 1, np.nan, np.nan],
    "tanh.approx": [-1, None, -0.0, 0.0, 1, np.nan],
}


@pytest.mark.parametrize("op", SPECIAL)
def test_special_values_of_functions(op):
    x = np.array([NEGATIVE, -1, -0.0, 0.0, INF, np.nan], F32)
    found = bits(evaluate(f"{op}.f32 d, a;", F32, x))
    for value, expected in zip(found, SPECIAL[op]):
        if expected is not None:
            assert value == canonical(F32(expected)), (op, x, found)


def test_subnormal_inputs_of_functions():
    x = np.array([2.0 ** -130, -(2.0 ** -130)], F32)
    np.testing.assert_array_equal(evaluate("rsqrt.approx.f32 d, a;", F32, x[:1]), F32(2.0 ** 65))
    np.testing.assert_array_equal(evaluate("rcp.approx.ftz.f32 d, a;", F32, x), [INF, NEGATIVE])
    np.testing.assert_array_equal(evaluate("rsqrt.approx.ftz.f32 d, a;", F32, x), [INF, NEGATIVE])
    np.testing.assert_array_equal(evaluate("lg2.approx.f32 d, a;", F32, x[:1]), F32(-130))
    np.testing.assert_array_equal(evaluate("lg2.approx.ftz.f32 d, a;", F32, x), [NEGATIVE, NEGATIVE])
    np.testing.assert_array_equal(evaluate("ex2.approx.f32 d, a;", F32, np.array([-130], F32)), F32(2.0 ** -130))
    np.testing.assert_array_equal(evaluate("ex2.approx.ftz.f32 d, a;", F32, np.array([-130], F32)), F32(0))


@pytest.mark.parametrize("op", ["div.rn", "div.full", "div.approx"])
def test_quotients(op):
    """2 ulp where the divisor is in 2^-126 ... 2^126; div.approx is 0, or NaN of inf, above."""
    a, b = pairs(F32, 1024)
    inside = (np.abs(b) >= 2.0 ** -126) & (np.abs(b) <= 2.0 ** 126)
    found, exact = evaluate(f"{op}.f32 d, a, b;", F32, a, b), a / b
    if op == "div.rn":
        np.testing.assert_array_equal(bits(found), canonical(exact))
    finite = inside & np.isfinite(exact) & (np.abs(exact) >= 2.0 ** -126)
    np.testing.assert_allclose(found[finite], exact[finite], rtol=2.0 ** -22)
    special = inside & ~np.isfinite(exact)
    np.testing.assert_array_equal(bits(found)[special], canonical(exact)[special])
    if op == "div.approx":
        above = (np.abs(b) > 2.0 ** 126) & ~np.isnan(a)
        assert (found[above & np.isfinite(a)] == 0).all() and np.isnan(found[above & np.isinf(a)]).all()


def half(x, kind):
    """To the nearest number of 16 bits, by PyTorch."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, kind))


@pytest.mark.parametrize("t", ["bf16", "f16"])
def test_pairs_of_16_bits(t):
    import torch

    kind = {"bf16": torch.bfloat16, "f16": torch.float16}[t]
    random = np.random.default_rng(1)
    a, b, c = (torch.from_numpy(random.standard_normal(256).astype(F32) * 4).to(kind) for _ in range(3))
    a[:4], b[:4] = torch.tensor([np.inf, -np.inf, 0., -0.]), torch.tensor([1., 2., -0., -0.])
    packed = [x.view(torch.int16).numpy().view(np.uint32) for x in (a, b, c)]

    def unpacked(code, *inputs):
        return torch.from_numpy(evaluate(code, np.uint32, *inputs).view(np.int16)).view(kind)

    assert torch.equal(unpacked(f"add.rn.{t}x2 d, a, b;", *packed[:2]), a + b)
    assert torch.equal(unpacked(f"sub.rn.{t}x2 d, a, b;", *packed[:2]), a - b)
    assert torch.equal(unpacked(f"mul.rn.{t}x2 d, a, b;", *packed[:2]), a * b)
    exact = (a.double() * b.double() + c.double()).to(torch.float64)
    finite = torch.isfinite(exact)
    found = unpacked(f"fma.rn.{t}x2 d, a, b, c;", *packed)
    # fp64 holds the sum exactly here, and rounds once on its way to 16 bits
    assert torch.equal(found[finite], exact.to(kind)[finite])
