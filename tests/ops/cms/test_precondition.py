"""Steps that keep what was learned: P in closed form, what it leaves of a step, and its rounding over a long run."""

import ctypes

import pytest
import torch
from cms_stream import D, Stream, make
from numerics import within_yardstick

from hope_kernels.ops.cms import level as chunked
from hope_kernels.ops.cms.precondition import take_up_
from hope_kernels.ops.shared import cpu_library

F64 = torch.float64


def streamed(pending: int | None = None, **fields) -> Stream:
    """Two rows that have learned 16 tokens."""
    layer = make(1, **{"chunks": (2, 4), "lr": 0.05} | fields)
    layer.pending = pending
    stream = Stream(layer, 2, 16)
    with torch.no_grad():
        for _ in range(8):
            stream.read([2, 2])
            stream.deliver([2, 2])
    return stream


@pytest.mark.parametrize("tokens, width", [(3, 7), (7, 7), (20, 7), (1, 1)])
def test_taking_inputs_up_is_the_dense_inverse(tokens, width):
    """Also for more tokens than the matrix has inputs, and one after another or at once."""
    torch.manual_seed(0)
    P, total = torch.eye(width, dtype=F64), torch.eye(width, dtype=F64)
    for _ in range(3):
        X, before = torch.randn(tokens, width, dtype=F64), P.clone()
        alone = P.clone()
        torch.testing.assert_close(take_up_(P, X, 2.0), X @ before, rtol=1e-13, atol=1e-13)
        for x in X:
            take_up_(alone, x[None], 2.0)
        total += X.T @ X / 2.0
        torch.testing.assert_close(P, torch.linalg.inv(total), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(alone, P, rtol=1e-11, atol=1e-12)
        assert torch.equal(P, P.T)


@pytest.mark.parametrize("optimizer", ["gd", "momentum", "adam", "muon"])
def test_an_infinite_rho_is_the_plain_step(optimizer):
    plain, bound = streamed(optimizer=optimizer), streamed(optimizer=optimizer, precondition=1e14)
    for a, b in zip(plain.state.weights, bound.state.weights, strict=True):
        for name, w in a.items():
            torch.testing.assert_close(b[name], w, rtol=1e-9, atol=1e-10)


def test_outputs_for_inputs_that_were_learned_are_kept():
    """Documents whose inputs span different directions: the second leaves what the first made, the more the
    smaller rho."""
    torch.manual_seed(0)
    first, second = torch.randn(8, 4, dtype=F64) @ torch.randn(4, 16, dtype=F64), torch.randn(8, 16, dtype=F64)
    moved = []
    for rho in (None, 1.0, 0.01, 1e-4):
        P, w = torch.eye(16, dtype=F64), torch.zeros(1, 6, 16, dtype=F64)
        for X, E in ((first, torch.randn(8, 6, dtype=F64)), (second, torch.ones(8, 6, dtype=F64))):
            before = w[0] @ first.T
            XP = X if rho is None else take_up_(P, X, 8 * rho)
            chunked.refresh_(w, None, E[None], XP[None], [0], 0.1)
        moved.append(float((w[0] @ first.T - before).norm()))
    assert moved == sorted(moved, reverse=True) and moved[-1] < 1e-3 * moved[0]


@pytest.mark.parametrize("rho", [1.0, 100.0])
@pytest.mark.parametrize("rank", [2, 16])
def test_p_stays_positive_over_a_long_run_in_fp32(rho, rank):
    """2,000 steps on the same inputs, whose directions P then hardly has left: eigenvalues down to 1e-6."""
    torch.manual_seed(0)
    X = torch.randn(16, rank) @ torch.randn(rank, 48)
    P, A = torch.eye(48), torch.eye(48, dtype=F64)
    for step in range(2000):
        take_up_(P, X, 16 * rho)
        A += X.double().T @ X.double() / (16 * rho)
        if step % 100 == 99:
            assert torch.linalg.eigvalsh(P.double()).min() > 0, step
    assert torch.equal(P, P.T)
    torch.testing.assert_close(P.double(), torch.linalg.inv(A), rtol=0, atol=2e-4)


def test_a_frozen_level_has_no_preconditioner_and_gate_shares_that_of_up():
    stream = streamed(mlp="swiglu", lr=(0.05, 0.0), precondition=1.0)
    s = stream.state
    assert s.inverses[0].keys() == {"up", "down"} and s.inverses[1] is None and s.following == [None, None]
    assert s.inverses[0]["up"].shape == (2, D, D) and s.inverses[0]["down"].shape[1] == stream.layer.config.hidden
    stream.check()


def test_detaching_a_level_forgets_its_inputs():
    stream = streamed(precondition=0.5)
    other = stream.state.select([1])
    stream.state.detach_level(1)
    for part in ("inverses", "following"):
        for P in getattr(stream.state, part)[1].values():
            assert torch.equal(P[0], torch.eye(P.shape[1], dtype=F64)) and not torch.equal(P[1], P[0])
    assert all(torch.equal(a, b) for a, b in zip(stream.state.select([1]).tensors(), other.tensors()))


@pytest.mark.parametrize("pending", [None, 4])
def test_a_16_bit_model_keeps_p_in_fp32(pending):
    stream = streamed(pending, dtype=torch.bfloat16, precondition=1.0)
    assert {P.dtype for P in stream.state.inverses[0].values()} == {torch.float32}
    stream.check(tol=0.15)


@pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")
@pytest.mark.parametrize("ridge", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("n, c", [(1, 8), (13, 40), (64, 128), (100, 24), (130, 64)])
def test_in_cpp_p_takes_up_what_it_does_in_pytorch(n, c, ridge):
    torch.manual_seed(0)
    X = torch.randn(n, c, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, c, dtype=torch.float64))
    X[n // 2] = X[0]  # again
    eye = torch.eye(c, dtype=torch.float64)
    before, exact = eye.clone(), eye.clone()
    take_up_(before, X[: n // 2], ridge)
    take_up_(exact, X[: n // 2], ridge)
    take_up_(exact, X, ridge)
    narrow, found, take_up = before.float(), [], cpu_library.library().hope_take_up
    given = ctypes.c_float(ridge)
    for threads in (1, 3):
        P = narrow.clone()
        assert take_up(*map(ctypes.c_int64, (n, c, threads)), given, *map(pointer, (X.float(), P))) == 0
        found.append(P)
    theirs = narrow.clone()
    take_up_(theirs, X.float(), ridge)
    assert torch.equal(*found) and torch.equal(found[0], found[0].mT)
    within_yardstick(found[0], theirs, exact, "P")
    G = torch.randn(70, c)
    want = G.double() @ found[0].double()
    assert cpu_library.library().hope_precondition(*map(ctypes.c_int64, (70, c, 3)), *map(pointer, (found[0], G))) == 0
    torch.testing.assert_close(G.double(), want, rtol=1e-5, atol=1e-5)


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())
