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
