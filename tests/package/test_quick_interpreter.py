"""Triton's interpreter as the tests speed it up: the same bits, and triton.language is left as it was found."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from hope_kernels.ops.titans.triton.operator import interpreted  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter (TRITON_INTERPRET=1)")


@triton.jit
def halved(x):
    return x / 2 + tl.sum(x, axis=0)


@triton.jit
def kernel(x, y, n: tl.constexpr):
    at = tl.arange(0, n)
    value = tl.load(x + at)
    for _ in range(3):
        value = halved(value)
    tl.store(y + at, value)


def launched():
    x = torch.linspace(-1, 2, 8)
    y = torch.empty_like(x)
    kernel[(1,)](x, y, 8)
    return x, y


def test_the_language_is_prepared_once_a_launch_and_put_back(monkeypatch):
    scanned, plain, names = [], interpreter._patch_builtin, ("load", "store", "arange", "reduce", "range")
    before = [getattr(tl, n) for n in names]
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda pkg, *rest: scanned.append(pkg) or plain(pkg, *rest))
    launched()
    scanned.clear()
    x, y = launched()
    for _ in range(3):
        x = x / 2 + x.sum()
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    once = len(scanned)
    assert 1 <= scanned.count(tl) <= 2  # of six calls of device functions
    assert [getattr(tl, n) for n in names] == before
    assert torch.equal(launched()[1], y) and len(scanned) == 2 * once  # nothing is remembered from launch to launch
    with pytest.raises(interpreter.InterpreterError):
        kernel[(1,)](y, y, 7)  # no power of two
    assert [getattr(tl, n) for n in names] == before and torch.equal(launched()[1], y)


@triton.jit
def shapes_kernel(x, sums, wrapped, N: tl.constexpr, C: tl.constexpr):
    row, column = tl.arange(0, N), tl.arange(0, C)
    tile = tl.load(x + row[:, None] * C + column[None, :])
    tl.store(sums + row[:, None] * C + column[None, :], tile + row[:, None] + 2 * column + 0.5)
    tl.store(wrapped + row, row + 2147483647)


def test_shapes_are_broadcast_and_integers_wrap_as_ever():
    """A column, a row, a scalar and a row without its first axis beside a tile; and 2^31 - 1 plus 1."""
    x, sums, wrapped = torch.randn(4, 8), torch.empty(4, 8), torch.empty(4, dtype=torch.int32)
    shapes_kernel[(1,)](x, sums, wrapped, 4, 8)
    torch.testing.assert_close(sums, x + torch.arange(4).unsqueeze(1) + 2 * torch.arange(8) + 0.5)
    assert wrapped.tolist() == [2**31 - 1, -(2**31), 1 - 2**31, 2 - 2**31]


def test_a_shape_is_made_once():
    a, b = (tl.block_type(kind, [4, tl.constexpr(8)]) for kind in (tl.float32, tl.int32))
    assert a.shape is b.shape and a.numel == 32 and a.name.endswith(", fp32>") and b.name.endswith(", int32>")
    x, y, z = (tl.tensor(None, kind) for kind in (a, b, tl.float32))
    assert x.shape is y.shape and [n.value for n in x.shape] == [4, 8] and (x.dtype, y.dtype) == (tl.float32, tl.int32)
    assert x.numel.value == 32 and len(z.shape) == 0 and z.numel.value == 1 and z.type is tl.float32
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [4, 3])
