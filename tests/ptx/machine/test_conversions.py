"""cvt against NumPy, PyTorch and Python's integers."""

import math

import numpy as np
import pytest
import torch
from ptx_kernels import EDGES, evaluate, samples

INTEGERS = {f"{s}{b}": np.dtype(f"{'i' if s == 's' else 'u'}{b // 8}") for s in "su" for b in (8, 16, 32, 64)}
F32 = np.float32
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def floats(count=512):
    return np.concatenate([EDGES[np.dtype(F32)], samples(F32, count), np.arange(-40, 40, dtype=F32) / 4])


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("of", INTEGERS)
def test_integers(of, to):
    """Widened by the source's sign, then cut. A result narrower than its register fills it by its own sign."""
    x = np.concatenate([EDGES[INTEGERS[of]], samples(INTEGERS[of], 96)])
    d, s = INTEGERS[to], INTEGERS[of]
    register = np.dtype(f"{d.kind}{max(2, d.itemsize)}")
    expected = x.astype(d).astype(register)
    given = x if s.itemsize > 1 else x.view(np.uint8).astype(np.uint16) | np.uint16(0x5a00)  # only the low byte counts
    np.testing.assert_array_equal(evaluate(f"cvt.{to}.{of} d, a;", register, given), expected)


@pytest.mark.parametrize("to", ["s8", "s16", "u8", "u16"])
def test_a_narrow_result_fills_a_wide_register(to):
    x = samples(np.int32, 128)
    for size in "48":
        expected = x.astype(INTEGERS[to]).astype(("i" if to[0] == "s" else "u") + size)
        np.testing.assert_array_equal(evaluate(f"cvt.{to}.s32 d, a;", expected.dtype, x), expected)


@pytest.mark.parametrize("of", ["s8", "u8", "s16", "u16", "s32", "u32"])
def test_the_low_bytes_of_a_wide_register(of):
    x = samples(np.int64, 128)
    np.testing.assert_array_equal(evaluate(f"cvt.s64.{of} d, a;", np.int64, x), x.astype(INTEGERS[of]).astype(np.int64))


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("of", ["s32", "u32", "s64"])
def test_saturated_integers(of, to):
    x = samples(INTEGERS[of], 256)
    info = np.iinfo(INTEGERS[to])
    expected = np.array([min(max(int(v), info.min), info.max) for v in x], INTEGERS[to])
    register = np.dtype(f"{expected.dtype.kind}{max(2, expected.itemsize)}")
    np.testing.assert_array_equal(evaluate(f"cvt.sat.{to}.{of} d, a;", register, x), expected.astype(register))


ROUNDINGS = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u16"])
def test_floats_to_integers(to, rounding):
    """What lies outside becomes the nearest integer inside."""
    x = floats()
    x = x[~np.isnan(x)]
    info = np.iinfo(INTEGERS[to])
    expected = np.array([
        (info.max if v > 0 else info.min) if math.isinf(v) else min(max(ROUNDINGS[rounding](v), info.min), info.max)
        for v in x.tolist()], INTEGERS[to])
    np.testing.assert_array_equal(evaluate(f"cvt.{rounding}.{to}.f32 d, a;", expected.dtype, x), expected)


def test_nan_to_integers():
    """0 by the ISA for integers of up to 32 bits, the most negative pattern for 64."""
    x = np.full(32, np.nan, F32)
    assert (evaluate("cvt.rzi.s32.f32 d, a;", np.int32, x) == 0).all()
    assert (evaluate("cvt.rzi.u32.f32 d, a;", np.uint32, x) == 0).all()
    assert (evaluate("cvt.rzi.s64.f32 d, a;", np.int64, x) == np.iinfo(np.int64).min).all()
    assert (evaluate("cvt.rzi.u64.f32 d, a;", np.uint64, x) == 1 << 63).all()


@pytest.mark.parametrize("of", [k for k in INTEGERS if k not in ("s8", "u8")])
def test_integers_to_floats(of):
    x = np.concatenate([EDGES[INTEGERS[of]], samples(INTEGERS[of], 512)])
    np.testing.assert_array_equal(evaluate(f"cvt.rn.f32.{of} d, a;", F32, x), x.astype(F32))


@pytest.mark.parametrize("rounding,function", [("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil), ("rzi", np.trunc)])
def test_floats_to_whole_floats(rounding, function):
    x = floats()
    x = x[~np.isnan(x)]
    found = evaluate(f"cvt.{rounding}.f32.f32 d, a;", F32, x)
    np.testing.assert_array_equal(found.view(np.uint32), function(x).view(np.uint32))


def rounded(x, kind):
    """Bits of 16-bit numbers as PyTorch rounds them; every NaN is 0x7fff."""
    found = torch.from_numpy(x.copy()).to(kind).view(torch.int16).numpy().view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7fff), found)


KINDS = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("t", KINDS)
def test_to_16_bits(t):
    half_way = (np.arange(0x3f80, 0x3fa0, dtype=np.uint32) << 16 | 0x8000).view(F32)
    x = np.concatenate([floats(), half_way, samples(F32, 64) * F32(2.0 ** -20), F32([65504, 65519.99, 65520, 2 ** -25])])
    np.testing.assert_array_equal(evaluate(f"cvt.rn.{t}.f32 d, a;", np.uint16, x), rounded(x, KINDS[t]))


@pytest.mark.parametrize("t", KINDS)
def test_to_pairs_of_16_bits(t):
    """The first source is the upper half."""
    a, b = floats(), floats()[::-1].copy()
    expected = rounded(a, KINDS[t]).astype(np.uint32) << np.uint32(16) | rounded(b, KINDS[t])
    np.testing.assert_array_equal(evaluate(f"cvt.rn.{t}x2.f32 d, a, b;", np.uint32, a, b), expected)


@pytest.mark.parametrize("t", KINDS)
def test_every_number_of_16_bits_to_fp32(t):
    x = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    expected = torch.from_numpy(x.view(np.int16)).view(KINDS[t]).float().numpy()
    found = evaluate(f"cvt.f32.{t} d, a;", F32, x)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(found[number].view(np.uint32), expected[number].view(np.uint32))
    assert np.isnan(found[~number]).all()


def test_tf32():
    """10 bits of mantissa, ties away from zero."""
    x = floats()
    x = x[np.isfinite(x)]
    down = x.view(np.uint32) & ~np.uint32(0x1fff)
    up = np.where(x.view(np.uint32) & np.uint32(0x1000), down + np.uint32(0x2000), down)
    np.testing.assert_array_equal(evaluate("cvt.rna.tf32.f32 d, a;", np.uint32, x), up)


def test_relu_and_saturation():
    x = floats()
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(evaluate("cvt.rn.relu.bf16.f32 d, a;", np.uint16, x),
                                  rounded(np.maximum(x, F32(0)) + F32(0), torch.bfloat16))
    for op, expected in (("add", x + F32(0.25)), ("mul", x * F32(0.25))):
        found = evaluate(f"{op}.sat.f32 d, a, 0f3E800000;", F32, x)
        np.testing.assert_array_equal(found, np.clip(expected, 0, 1))
