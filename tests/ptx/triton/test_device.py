"""The emulated GPU that Triton launches on: how arguments reach a kernel, and what a faulty kernel is told."""

from collections import namedtuple

import pytest
import torch
import triton
import triton.language as tl

from tools.ptx.machine import Fault

Pair = namedtuple("Pair", "first second")


@triton.jit
def arguments_kernel(
    pair, out_p, absent_p, small: tl.int32, large: tl.int64, number: tl.float32, one, SIZES: tl.constexpr
):
    i = tl.arange(0, 16)
    x = tl.load(pair.first + i).to(tl.float32) + tl.load(pair.second + i)
    if absent_p is None:
        x += SIZES.second
    tl.store(out_p + i, x * small + (large // 4294967296).to(tl.float32) * number + one)


@triton.jit
def beyond_kernel(x_p, out_p, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_p + i, tl.load(x_p + i, mask=i < n))


@triton.jit
def race_kernel(x_p):
    """Programs add to one number without an atomic."""
    tl.store(x_p, tl.load(x_p) + 1.0)


def test_arguments_reach_the_kernel(device):
    first, second = torch.arange(16.0).bfloat16(), torch.arange(16.0)
    out = torch.full((16,), float("nan"))
    arguments_kernel[(1,)](Pair(first, second), out, None, -3, 7 * 2**32, 0.5, 1, SIZES=Pair(2, 4))
    assert torch.equal(out, (2 * torch.arange(16.0) + 4) * -3 + 3.5 + 1)
    launch = next(reversed(device.launches))
    assert launch.kernel == "arguments_kernel" and dict(launch.constants)["SIZES"] == Pair(2, 4)


@pytest.mark.parametrize("arch", [80, 90])
def test_one_process_has_several_architectures(arch, device):
    device.arch = arch
    x, out = torch.arange(64.0), torch.zeros(64)
    beyond_kernel[(2,)](x, out, 64, BLOCK=32)
    assert torch.equal(x, out) and next(reversed(device.launches)).arch in (80, 90)
    assert f"sm_{arch}" in next(reversed(device.kernels))


def test_a_store_outside_a_tensor_is_named_with_its_line():
    whole = torch.arange(64.0)
    with pytest.raises(Fault, match=r"st\.global") as fault:
        beyond_kernel[(2,)](torch.arange(64.0), whole[:48], 64, BLOCK=32)
    assert "beyond_kernel" in str(fault.value) or "line" in str(fault.value)


def test_a_race_between_programs_is_named():
    with pytest.raises(Fault, match="race"):
        race_kernel[(4,)](torch.zeros(16))
