"""Norm, gain and gate behind the memories: PyTorch against its equation, the Triton kernel against fp64, a row's bits in any company."""

import pytest
import torch
from numerics import within_yardstick

from hope_kernels.ops.output_gate.chunked import output_gate_chunked

pytest.importorskip("triton")
from hope_kernels.ops.output_gate.triton import output_gate_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def inputs(B: int, T: int, H: int, D: int, dtype=torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((B, T, H, D), (H, D), (B, T, H * D)))


@pytest.fixture
def poison(monkeypatch):
    """The buffer the kernel has to fill starts as NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, float("nan")))


def test_chunked_is_the_equation():
    o, gain, gate = (t.double() for t in inputs(2, 3, 2, 5))
    norm = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    want = norm.reshape(2, 3, 10) * gate / (1 + torch.exp(-gate))
    torch.testing.assert_close(output_gate_chunked(o, gain, gate), want, rtol=1e-14, atol=1e-14)
    assert torch.equal(output_gate_chunked(o, None, None), o.flatten(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, H, D", [(1, 1, 1), (5, 3, 64), (7, 2, 33), (40, 5, 7), (3, 1, 2050), (0, 2, 4)])
def test_values(T, H, D, dtype, poison):
    o, gain, gate = inputs(2, T, H, D, dtype)
    gate = gate * 4
    o[0, : T // 2] *= 1e-3  # eps counts here
    exact = output_gate_chunked(o.double(), gain.double(), gate.double())
    within_yardstick(output_gate_triton(o, gain, gate), output_gate_chunked(o, gain, gate), exact, "y")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's word on sigmoid(-1e4) = 0
def test_zero_rows_and_extreme_gates(poison):
    o, gain, gate = inputs(1, 4, 2, 8)
    o[0, 0], gate[0, 1], gate[0, 2] = 0, -1e4, 1e4
    y = output_gate_triton(o, gain, gate)
    assert torch.isfinite(y).all() and not y[0, :2].any()
    torch.testing.assert_close(y, output_gate_chunked(o, gain, gate))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_its_company(dtype, poison):
    o, gain, gate = inputs(3, 19, 3, 33, dtype)
    whole = output_gate_triton(o, gain, gate)
    for sizes in ((1,) * 19, (16, 3)):
        parts = [output_gate_triton(a, gain, b) for a, b in zip(o.split(sizes, 1), gate.split(sizes, 1))]
        assert torch.equal(torch.cat(parts, 1), whole)
    # a row at an address that is no multiple of 16 bytes, with a NaN for a neighbour
    o[0], gate[2] = float("nan"), float("nan")
    assert torch.equal(output_gate_triton(o, gain, gate)[1], whole[1])
    assert torch.equal(output_gate_triton(o[1:2, 1:], gain, gate[1:2, 1:])[0], whole[1, 1:])


def test_opcheck():
    torch.library.opcheck(torch.ops.hope_kernels.output_gate, inputs(2, 3, 2, 5))


def test_bad_input():
    o, gain, gate = inputs(2, 3, 2, 5)
    with pytest.raises(ValueError, match=r"argument gain has shape \[2, 4\], expected \[2, 5\]"):
        output_gate_triton(o, gain[:, :4], gate)
    with pytest.raises(ValueError, match="argument gate has dtype torch.float16, expected torch.float32"):
        output_gate_triton(o, gain, gate.half())
    with pytest.raises(ValueError, match="dtype torch.float64, expected one of"):
        output_gate_triton(o.double(), gain.double(), gate.double())
