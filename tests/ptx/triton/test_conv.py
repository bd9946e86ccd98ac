"""The convolution's kernels as PTX: values and gradients by the yardstick, a row's bits in any company and under
any split."""

import pytest
import torch
from numerics import within_yardstick

from hope_kernels.ops.conv.forward import causal_conv_chunked
from hope_kernels.ops.conv.triton.forward import causal_conv_triton

CASES = [
    (80, torch.bfloat16, 4), (80, torch.bfloat16, 8), (80, torch.float16, 4), (80, torch.float32, 2),
    (80, torch.float32, 1), (90, torch.bfloat16, 4), (90, torch.bfloat16, 8), (90, torch.float16, 4),
    (90, torch.float32, 2),
]
d = 130  # no tile is full


def inputs(B: int, T: int, W: int, dtype: torch.dtype, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in ((B, T, d), (B, W - 1, d), (d, W)))


def gradients(conv, args, lengths, into):
    """Of x, tail and weight, for the gradients ``into`` y and the new tail."""
    args = [t.detach().requires_grad_() for t in args]
    return torch.autograd.grad(conv(*args, lengths), args, into)


@pytest.mark.parametrize("arch, dtype, W", CASES)
def test_values_and_bits(arch, dtype, W, device):
    device.arch = arch
    T, lengths = 37, [37, 18, 0]
    x, tail, weight = inputs(3, T, W, dtype)
    exact = causal_conv_chunked(x.double(), tail.double(), weight.double(), lengths)
    plain = causal_conv_chunked(x, tail, weight, lengths)
    x[1, 18:], x[2] = float("nan"), float("inf")  # never read
    y, new_tail = causal_conv_triton(x, tail, weight, lengths)
    within_yardstick(y, plain[0], exact[0], "y")
    assert torch.equal(new_tail, plain[1]) and not y[1, 18:].any() and not y[2].any()
    parts, at = [], tail[:2]
    for a, b in ((0, 1), (1, 3), (3, 3), (3, 18)):
        part, at = causal_conv_triton(x[:2, a:b], at, weight, None)
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), y[:2, :18]) and torch.equal(at[1], new_tail[1])


@pytest.mark.parametrize("arch, dtype, W", CASES)
def test_gradients(arch, dtype, W, device):
    device.arch = arch
    T, lengths = 70, [70, 35, 0]
    args, (dy, dnew, _) = inputs(3, T, W, dtype), inputs(3, T, W, dtype, seed=1)
    exact = gradients(causal_conv_chunked, [t.double() for t in args], lengths, (dy.double(), dnew.double()))
    plain = gradients(causal_conv_chunked, args, lengths, (dy, dnew))
    args[0][1, 35:], args[0][2], dy[1, 35:], dy[2] = (float("nan"),) * 4
    ours = gradients(causal_conv_triton, args, lengths, (dy, dnew))
    for name, a, b, c in zip(("x", "tail", "weight"), ours, plain, exact):
        within_yardstick(a, b, c, name)
    assert not ours[0][1, 35:].any() and not ours[0][2].any() and torch.equal(ours[1][2], dnew[2])
    row = slice(1, 2)
    alone = gradients(causal_conv_triton, (args[0][row, :35], args[1][row], args[2]), [35], (dy[row, :35], dnew[row]))
    assert torch.equal(ours[0][row, :35], alone[0]) and torch.equal(ours[1][row], alone[1])
