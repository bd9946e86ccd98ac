"""The causal convolution: PyTorch against a token loop, the Triton kernels and their gradients against fp64,
bits under every split."""

import pytest
import torch
from numerics import within_yardstick

from hope_kernels.ops.conv.forward import causal_conv_chunked

pytest.importorskip("triton")
from hope_kernels.ops.conv.triton.forward import causal_conv_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def inputs(B: int, T: int, d: int, W: int, dtype=torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((B, T, d), (B, W - 1, d), (d, W)))


def token_loop(x, tail, weight, lengths):
    y, tails = torch.zeros_like(x), []
    for b, n in enumerate(lengths):
        window = list(tail[b])
        for t in range(n):
            window.append(x[b, t])
            y[b, t] = sum(w * u for w, u in zip(weight.T, window))
            window.pop(0)
        tails.append(torch.stack(window) if window else tail[b])
    return y, torch.stack(tails)


@pytest.fixture
def poison(monkeypatch):
    """Every buffer a kernel has to fill starts as NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: torch.full(shape, float("nan"), **kw))


@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 0, 2]])
def test_chunked_is_the_token_loop(W, lengths):
    args = (*(t.double() for t in inputs(3, 9, 5, W)), lengths)
    for ours, theirs in zip(causal_conv_chunked(*args), token_loop(*args)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "T, d, W", [(1, 5, 4), (3, 128, 4), (37, 130, 4), (16, 129, 8), (17, 64, 2), (20, 7, 1), (0, 5, 4)]
)
def test_values(T, d, W, dtype, poison):
    x, tail, weight = inputs(3, T, d, W, dtype)
    lengths = [T, T // 2, 0]
    exact = causal_conv_chunked(x.double(), tail.double(), weight.double(), lengths)
    plain = causal_conv_chunked(x, tail, weight, lengths)
    y, new_tail = causal_conv_triton(x, tail, weight, lengths)
    within_yardstick(y, plain[0], exact[0], "y")
    assert torch.equal(new_tail, plain[1])
    assert not y[1, T // 2 :].any() and not y[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1,) * 19, (16, 3), (2, 0, 1, 16), (17, 2)])
def test_any_split_has_the_same_bits(sizes, dtype, poison):
    x, tail, weight = inputs(2, 19, 33, 4, dtype)
    whole, last = causal_conv_triton(x, tail, weight, [19, 19])
    parts = []
    for part in x.split(sizes, 1):
        y, tail = causal_conv_triton(part, tail, weight, [part.shape[1]] * 2)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(tail, last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_its_company(dtype, poison):
    x, tail, weight = inputs(5, 40, 33, 4, dtype)
    lengths = torch.tensor([40, 17, 0, 2, 1], device=DEVICE)
    y, new_tail = causal_conv_triton(x, tail, weight, lengths)
    for b, n in enumerate(lengths.tolist()):
        alone, its_tail = causal_conv_triton(x[b : b + 1, :n], tail[b : b + 1], weight, [n])
        assert torch.equal(y[b, :n], alone[0])
        assert torch.equal(new_tail[b], its_tail[0])


def test_padding_is_never_read(poison):
    x, tail, weight = inputs(3, 20, 9, 4)
    lengths = [20, 5, 0]
    want = causal_conv_triton(x, tail, weight, lengths)
    x[1, 5:], x[2] = float("nan"), float("inf")
    got = causal_conv_triton(x, tail, weight, lengths)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_a_row_that_reads_nothing_keeps_the_bits_of_its_tail():
    x, tail, weight = inputs(2, 4, 5, 4)
    tail[0, 0] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, 1.0])
    _, new_tail = causal_conv_triton(x, tail, weight, [0, 4])
    assert torch.equal(new_tail[0].view(torch.int32), tail[0].view(torch.int32))


def test_lengths_out_of_range_stay_inside_the_row():
    x, tail, weight = inputs(2, 4, 5, 4)
    got = causal_conv_triton(x, tail, weight, torch.tensor([9, -3], device=DEVICE))
    want = causal_conv_triton(x, tail, weight, [4, 0])
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_no_lengths_are_full_rows():
    x, tail, weight = inputs(2, 5, 6, 4)
    for conv in (causal_conv_chunked, causal_conv_triton):
        assert all(torch.equal(a, b) for a, b in zip(conv(x, tail, weight, None), conv(x, tail, weight, [5, 5])))
    ragged = causal_conv_chunked(x, tail, weight, torch.tensor([5, 2], device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(ragged, causal_conv_chunked(x, tail, weight, [5, 2])))


def gradients(conv, args, lengths, into):
    """Of x, tail and weight, for the gradients ``into`` y and the new tail."""
    args = [t.detach().requires_grad_() for t in args]
    return torch.autograd.grad(conv(*args, lengths), args, into)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "T, d, W", [(1, 5, 4), (37, 66, 4), (63, 5, 8), (70, 33, 2), (20, 7, 1), (0, 5, 4), (0, 5, 1)]
)
def test_gradients(T, d, W, dtype, poison):
    args, (dy, dnew, _) = inputs(3, T, d, W, dtype), inputs(3, T, d, W, dtype, seed=1)
    lengths = [T, T // 2, 0]
    exact = gradients(causal_conv_chunked, [t.double() for t in args], lengths, (dy.double(), dnew.double()))
    plain = gradients(causal_conv_chunked, args, lengths, (dy, dnew))
    args[0][1, T // 2 :], args[0][2], dy[1, T // 2 :], dy[2] = (float("nan"),) * 4
    ours = gradients(causal_conv_triton, args, lengths, (dy, dnew))
    for name, a, b, c in zip(("x", "tail", "weight"), ours, plain, exact):
        within_yardstick(a, b, c, name)
    assert not ours[0][1, T // 2 :].any() and not ours[0][2].any() and torch.equal(ours[1][2], dnew[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_row_do_not_see_its_company(dtype, poison):
    args, (dy, dnew, _) = inputs(4, 70, 33, 4, dtype), inputs(4, 70, 33, 4, dtype, seed=1)
    lengths = [70, 17, 0, 2]
    dx, dtail, _ = gradients(causal_conv_triton, args, lengths, (dy, dnew))
    for b, n in enumerate(lengths):
        row = slice(b, b + 1)
        alone = gradients(
            causal_conv_triton, (args[0][row, :n], args[1][row], args[2]), [n], (dy[row, :n], dnew[row])
        )
        assert torch.equal(dx[row, :n], alone[0]) and torch.equal(dtail[row], alone[1])


@pytest.mark.parametrize("sizes", [(1, 1, 2, 12, 3), (2, 0, 1, 16)])
def test_gradients_have_the_same_bits_under_any_split(sizes, poison):
    args, (dy, dnew, _) = inputs(2, 19, 33, 4), inputs(2, 19, 33, 4, seed=1)

    def in_parts(x, tail, weight, _):
        parts = []
        for part in x.split(sizes, 1):
            y, tail = causal_conv_triton(part, tail, weight, None)
            parts.append(y)
        return torch.cat(parts, 1), tail

    cut, whole = (gradients(conv, args, None, (dy, dnew)) for conv in (in_parts, causal_conv_triton))
    assert torch.equal(cut[0], whole[0]) and torch.equal(cut[1], whole[1])
    torch.testing.assert_close(cut[2], whole[2])


def test_a_row_that_reads_nothing_gives_the_weight_no_gradient():
    (x, tail, weight), (dy, dnew, _) = inputs(2, 9, 5, 4), inputs(2, 9, 5, 4, seed=1)
    want = gradients(causal_conv_triton, (x, tail, weight), [9, 0], (dy, dnew))
    tail[1] = float("nan")
    got = gradients(causal_conv_triton, (x, tail, weight), [9, 0], (dy, dnew))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_compiles_into_one_graph():
    args, lengths = inputs(2, 9, 5, 4), torch.tensor([9, 4], device=DEVICE)
    into = inputs(2, 9, 5, 4, seed=1)[:2]
    compiled = torch.compile(causal_conv_triton, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*args, lengths), causal_conv_triton(*args, lengths)))
    ours, eager = (gradients(conv, args, lengths, into) for conv in (compiled, causal_conv_triton))
    assert all(torch.equal(a, b) for a, b in zip(ours, eager))


def test_refuses_a_second_derivative():
    x, tail, weight = (t.requires_grad_() for t in inputs(1, 3, 5, 4))
    (dx,) = torch.autograd.grad(causal_conv_triton(x, tail, weight, None)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("W", [1, 4])
def test_opcheck(W):
    x, tail, weight = inputs(2, 5, 6, W)
    lengths = torch.tensor([5, 2], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.hope_kernels.causal_conv, (x, tail, weight, lengths))
    torch.library.opcheck(torch.ops.hope_kernels.causal_conv_backward, (x, tail, x, tail, weight, lengths))
    torch.library.opcheck(
        torch.ops.hope_kernels.causal_conv, (*(t.requires_grad_() for t in (x, tail, weight)), lengths)
    )


def test_bad_input():
    x, tail, weight = inputs(2, 5, 6, 4)
    with pytest.raises(ValueError, match=r"argument tail has shape \[2, 2, 6\], expected \[2, 3, 6\]"):
        causal_conv_triton(x, tail[:, 1:], weight, [5, 5])
    with pytest.raises(ValueError, match="a window of 9, expected 1 to 8"):
        causal_conv_triton(x, tail, torch.ones(6, 9, device=DEVICE), [5, 5])
    with pytest.raises(ValueError, match="dtype torch.float64, expected one of"):
        causal_conv_triton(x.double(), tail.double(), weight.double(), [5, 5])
    with pytest.raises(ValueError, match=r"argument lengths has shape \[3\], expected \[2\]"):
        causal_conv_triton(x, tail, weight, [5, 5, 5])
