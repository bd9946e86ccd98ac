"""Norm, gain and gate as PTX: values and gradients by the yardstick, a row's bits in any company."""

import pytest
import torch
from numerics import within_yardstick

from hope_kernels.ops.output_gate.forward import output_gate_chunked
from hope_kernels.ops.output_gate.triton.forward import output_gate_triton

# (dtype, heads, their width, norm, gate): each width is a tile of its own; 77 is no power of two
ROWS = [
    (torch.bfloat16, 3, 64, True, True), (torch.bfloat16, 3, 64, False, True), (torch.bfloat16, 3, 64, True, False),
    (torch.float16, 2, 128, True, True), (torch.float32, 3, 77, True, True), (torch.bfloat16, 1, 2048, True, True),
    (torch.float32, 1, 8192, True, True),
]


def inputs(B: int, T: int, H: int, D: int, dtype: torch.dtype, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in ((B, T, H, D), (H, D), (B, T, H * D)))


def gradients(output_gate, args, dy):
    """Of o, gain and gate, those that are not None."""
    args = [None if t is None else t.detach().requires_grad_() for t in args]
    return torch.autograd.grad(output_gate(*args), [t for t in args if t is not None], dy)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype, H, D, norm, gate", ROWS)
def test_values_gradients_and_bits(arch, dtype, H, D, norm, gate, device):
    device.arch = arch
    B, T = 2, 23 if D < 1000 else 3
    o, gain, opened = inputs(B, T, H, D, dtype)
    o[0, : T // 2] *= 1e-3  # eps counts here
    args, dy = (o, gain if norm else None, opened * 4 if gate else None), inputs(B, T, H, D, dtype, seed=1)[2]
    wide = [None if t is None else t.double() for t in args]
    y = output_gate_triton(*args)
    within_yardstick(y, output_gate_chunked(*args), output_gate_chunked(*wide), "y")
    found, peer, exact = (
        gradients(f, a, dy.to(a[0].dtype)) for f, a in
        ((output_gate_triton, args), (output_gate_chunked, args), (output_gate_chunked, wide))
    )
    for i, (a, b, c) in enumerate(zip(found, peer, exact)):
        within_yardstick(a, b, c, f"gradient {i}")
    row = lambda t: None if t is None else t[1:2, 1:2]
    assert torch.equal(output_gate_triton(row(o), args[1], row(args[2])), row(y))
    alone = gradients(output_gate_triton, (row(o), args[1], row(args[2])), row(dy))
    assert torch.equal(alone[0], row(found[0])) and (not gate or torch.equal(alone[-1], row(found[-1])))
