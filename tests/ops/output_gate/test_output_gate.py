"""Norm, gain and gate after the memories: PyTorch against its equation, the Triton kernels and their
gradients against fp64, a row's bits in any company."""

import pytest
import torch
from numerics import within_yardstick

from hope_kernels.ops.output_gate.forward import output_gate_chunked

pytest.importorskip("triton")
from hope_kernels.ops.output_gate.triton.forward import output_gate_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SWITCHES = [(True, True), (False, True), (True, False), (False, False)]  # norm, gate
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def inputs(B: int, T: int, H: int, D: int, dtype=torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((B, T, H, D), (H, D), (B, T, H * D)))


@pytest.fixture
def poison(monkeypatch):
    """Every buffer a kernel has to fill starts as NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: torch.full(shape, float("nan"), **kw))


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


def switched(args, norm: bool, gate: bool):
    return args[0], args[1] if norm else None, args[2] if gate else None


def gradients(output_gate, args, dy):
    """Of o, gain and gate, those that are not None."""
    args = [None if t is None else t.detach().requires_grad_() for t in args]
    return torch.autograd.grad(output_gate(*args), [t for t in args if t is not None], dy)


@pytest.mark.parametrize("norm, gate", SWITCHES)
def test_norm_and_gate_are_switches(norm, gate, poison):
    args = switched(inputs(2, 7, 3, 33), norm, gate)
    exact = output_gate_chunked(*(None if t is None else t.double() for t in args))
    within_yardstick(output_gate_triton(*args), output_gate_chunked(*args), exact, "y")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, H, D, norm, gate", [
    (1, 1, 2, True, True), (35, 3, 64, True, True), (17, 1, 2050, True, True), (0, 2, 4, True, True),
    *((35, 2, 7, *s) for s in SWITCHES[1:]),
])
def test_gradients(T, H, D, norm, gate, dtype, poison):
    args, dy = inputs(2, T, H, D, dtype), inputs(2, T, H, D, dtype, seed=1)[2]
    args[0][0, : T // 2] *= 1e-3  # eps counts here
    args = switched((*args[:2], args[2] * 4), norm, gate)
    exact = gradients(output_gate_chunked, [None if t is None else t.double() for t in args], dy.double())
    for i, (a, b, c) in enumerate(
        zip(gradients(output_gate_triton, args, dy), gradients(output_gate_chunked, args, dy), exact)
    ):
        within_yardstick(a, b, c, f"gradient {i}")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gradients_of_zero_rows_and_extreme_gates(poison):
    o, gain, gate = inputs(1, 4, 2, 8)
    o[0, 0], gate[0, 1], gate[0, 2] = 0, -1e4, 1e4
    for ours, theirs in zip(
        *(gradients(f, (o, gain, gate), torch.ones_like(gate)) for f in (output_gate_triton, output_gate_chunked))
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_row_do_not_see_its_company(dtype, poison):
    o, gain, gate = inputs(3, 40, 2, 33, dtype)
    dy = inputs(3, 40, 2, 33, dtype, seed=1)[2]
    do, _, dgate = gradients(output_gate_triton, (o, gain, gate), dy)
    o[0], dy[2] = float("nan"), float("nan")
    for row in (slice(0, 40), slice(3, 9), slice(39, 40)):
        alone = gradients(output_gate_triton, (o[1:2, row], gain, gate[1:2, row]), dy[1:2, row])
        assert torch.equal(alone[0], do[1:2, row]) and torch.equal(alone[2], dgate[1:2, row])
    beside = gradients(output_gate_triton, (o, gain, gate), dy)
    assert torch.equal(beside[0][1], do[1]) and torch.equal(beside[2][1], dgate[1])


def test_compiles_into_one_graph():
    args, dy = inputs(2, 3, 2, 5), inputs(2, 3, 2, 5, seed=1)[2]
    compiled = torch.compile(output_gate_triton, fullgraph=True, backend="aot_eager")
    for norm, gate in SWITCHES:
        chosen = switched(args, norm, gate)
        assert torch.equal(compiled(*chosen), output_gate_triton(*chosen))
        ours, eager = (gradients(f, chosen, dy) for f in (compiled, output_gate_triton))
        assert all(torch.equal(a, b) for a, b in zip(ours, eager))


def test_refuses_a_second_derivative():
    o, gain, gate = (t.requires_grad_() for t in inputs(1, 3, 2, 5))
    (do,) = torch.autograd.grad(output_gate_triton(o, gain, gate).sum(), o, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        do.sum().backward()


@pytest.mark.parametrize("norm, gate", SWITCHES)
def test_opcheck(norm, gate):
    args, dy = switched(inputs(2, 3, 2, 5), norm, gate), inputs(2, 3, 2, 5, seed=1)[2]
    torch.library.opcheck(torch.ops.hope_kernels.output_gate, args)
    torch.library.opcheck(torch.ops.hope_kernels.output_gate_backward, (dy, *args))
    torch.library.opcheck(
        torch.ops.hope_kernels.output_gate, tuple(None if t is None else t.requires_grad_() for t in args)
    )


def test_bad_input():
    o, gain, gate = inputs(2, 3, 2, 5)
    with pytest.raises(ValueError, match=r"argument gain has shape \[2, 4\], expected \[2, 5\]"):
        output_gate_triton(o, gain[:, :4], gate)
    with pytest.raises(ValueError, match="argument gate has dtype torch.float16, expected torch.float32"):
        output_gate_triton(o, gain, gate.half())
    with pytest.raises(ValueError, match="dtype torch.float64, expected one of"):
        output_gate_triton(o.double(), gain.double(), gate.double())
