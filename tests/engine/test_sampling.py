"""Drawing a token: what temperature, top-k and top-p mean, to the token, in C++ and in PyTorch; that both draw the
same, from the distribution that the logits are, and each row what it draws alone."""

import ctypes
import math

import pytest
import torch

from hope_kernels.engine import sampling
from hope_kernels.engine.sampling import _drawn, _drawn_in_cpp, draw
from hope_kernels.ops.shared import cpu_library

cpp = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")
WAYS = [pytest.param("cpp", marks=cpp), "pytorch"]
POSITIONS = range(400)


@pytest.fixture
def way(request, monkeypatch):
    """Draws in C++, or as where there is no library."""
    if request.param == "pytorch":
        monkeypatch.setattr(cpu_library, "unavailable", lambda: "left out")


def drawn(logits, **options) -> list[int]:
    """Tokens drawn at many positions."""
    options = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0} | options
    logits = torch.as_tensor(logits).expand(1, -1)
    return [draw(logits, pos=[t], **options)[0] for t in POSITIONS]


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_top_k_keeps_exactly_k_of_equals_the_lowest_ids(way):
    assert set(drawn([0.0, 2.0, 2.0, 2.0], top_k=1)) == {1}
    assert set(drawn([0.0, 2.0, 2.0, 2.0], top_k=2)) == {1, 2}
    assert set(drawn([2.0, 5.0, 2.0, 2.0], top_k=3)) == {0, 1, 2}
    assert set(drawn([0.0] * 300, top_k=2)) == {0, 1}  # an unstable sort shows from 17 values on
    assert set(drawn([1.0, 1.0], top_k=99)) == {0, 1}


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_top_p_keeps_of_equals_the_lowest_ids(way):
    assert set(drawn([0.0] * 300, top_p=1.5 / 300)) == {0, 1}
    assert set(drawn([0.0, 1.0, 0.0, 1.0], top_p=0.3)) == {1}
    assert set(drawn([0.0, 9.0, 9.0], top_k=2, top_p=0.5)) == {1}
    assert set(drawn([0.0, 1.0, 0.5], top_p=1.0)) == {0, 1, 2}
    assert set(drawn([0.0, 1.0], top_p=5e-324)) == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_any_temperature(way, dtype):
    logits = torch.tensor([-3.0, 1.0, 4.0, 3.9, -torch.inf], dtype=dtype)
    for cold in (1e-308, 5e-324, 1e-12):
        assert set(drawn(logits, temperature=cold)) == {2}
    assert set(drawn(logits * 1e30, temperature=1e-308)) == {2}
    for hot in (1e308, math.inf):
        counts = torch.bincount(torch.tensor(drawn(logits, temperature=hot)), minlength=5).tolist()
        assert counts[4] == 0 and min(counts[:4]) > 70 and max(counts[:4]) < 130
    assert set(drawn([0.0, 7.0, 7.0, 1.0], temperature=1e-300)) == {1, 2}


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_infinite_logits_and_none(way):
    assert set(drawn([-torch.inf, 0.0, -torch.inf, 0.0])) == {1, 3}
    assert set(drawn([1e4, torch.inf, 3.0, torch.inf])) == {1, 3}
    assert set(drawn([1e4, torch.inf, 3.0, torch.inf], temperature=torch.inf)) == {1, 3}
    assert draw(torch.tensor([[-torch.inf, 0.0]]), 0.0, None, None, 0, [0]) == [1]
    for bad in ([0.0, torch.nan], [-torch.inf, -torch.inf]):
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match="the logits of row 1 are no distribution"):
                draw(torch.tensor([[0.0, 0.0], bad]), temperature, None, None, 0, [0, 0])


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_draw_has_a_mass_wherever_it_falls(way, monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.0, -1e30, 0.0, -torch.inf]])
    for u, token in ((0.0, 1), (0.49, 1), (0.51, 3), (1 - 2.0**-53, 3)):
        monkeypatch.setattr(sampling, "uniform", lambda *_, u=u: u)
        assert draw(logits, 1.0, None, None, 0, [0]) == [token]
        assert draw(logits.double() * 1e200, 1e200, 4, 1 - 1e-12, 0, [0]) == [token]


@pytest.mark.parametrize(("temperature", "k", "p"), [
    (0.8, None, None), (2.0, 7, None), (1.3, None, 0.9), (1.3, 6, 0.8),
])
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_frequencies_are_those_of_the_softmax(way, temperature, k, p):
    """Pearson's statistic of many draws, beside its mean of one less than there are tokens."""
    n, logits = 20000, torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0, 0.7, 1.5, -torch.inf, 0.2], dtype=torch.float64)
    want = (logits / temperature).softmax(-1)
    order = want.argsort(descending=True)
    want[order[k:] if k else []] = 0
    want /= want.sum()
    if p:
        want[order[(want[order].cumsum(0) - want[order]) >= p]] = 0
        want /= want.sum()
    drawn = draw(logits.expand(n, -1), temperature, k, p, 3, list(range(n)))
    counts, some = torch.bincount(torch.tensor(drawn), minlength=9).double(), want > 0
    assert counts[~some].sum() == 0
    distance = ((counts - n * want)[some] ** 2 / (n * want[some])).sum()
    degrees = int(some.sum()) - 1
    assert degrees >= 3 and distance < degrees + 4 * math.sqrt(2 * degrees)


# -- in C++ as in PyTorch ------------------------------------------------------------------------------------


def cases(V: int, rows: int, scale: float, dtype: torch.dtype):
    """Logits [rows, V] as float64, with ties and tokens at -inf, and numbers in [0, 1) for the rows."""
    g = torch.Generator().manual_seed(V)
    x = (torch.randn(rows, V, generator=g) * scale).to(dtype).double()
    x[torch.rand(rows, V, generator=g) < 0.1] = -torch.inf
    x[:, V // 2] = 0
    return x, torch.rand(rows, generator=g, dtype=torch.float64).tolist()


@cpp
@pytest.mark.parametrize("V", [1, 2, 63, 256, 1000, 20000])
@pytest.mark.parametrize(("scale", "dtype"), [
    (0.0, torch.float32), (0.1, torch.float32), (3.0, torch.float32), (3.0, torch.bfloat16), (30.0, torch.float64),
])
def test_both_draw_the_same(V, scale, dtype):
    x, numbers = cases(V, 8 if V < 1000 else 3, scale, dtype)
    for temperature in (0.3, 1.0, 7.0, math.inf, 1e-320):
        for k in {min(k, V) for k in (1, 7, 50, 100, 500, V)}:
            for p in (1e-300, 0.05, 0.5, 0.95, 1.0):
                how = temperature, k, p, numbers
                want = _drawn(x, *how)
                assert _drawn_in_cpp(x, *how) == want, how[:3]
                if dtype is not torch.float64:
                    assert _drawn_in_cpp(x.to(dtype), *how) == want, how[:3]


@cpp
def test_a_row_draws_in_company_what_it_draws_alone():
    x, numbers = cases(300, 12, 3.0, torch.float32)
    for k, p in ((300, 1.0), (300, 0.9), (80, 0.9), (80, 1.0)):
        alone = [_drawn_in_cpp(x[b : b + 1], 0.8, k, p, [u])[0] for b, u in enumerate(numbers)]
        assert _drawn_in_cpp(x, 0.8, k, p, numbers) == alone
        assert _drawn_in_cpp(x.flip(1)[:, ::2], 0.8, min(k, 150), p, numbers) == _drawn(
            x.flip(1)[:, ::2], 0.8, min(k, 150), p, numbers
        )  # not contiguous


@cpp
def test_the_library_refuses_what_does_not_fit():
    x, tokens = torch.zeros(2, 5, dtype=torch.float64), (ctypes.c_int64 * 2)(7, 7)
    u = (ctypes.c_double * 2)(0.1, 0.2)
    right = [2, 5, 1, x.data_ptr(), 1.0, 5, 1.0, u, tokens]
    call = sampling._in_cpp.bound()
    wrong = {
        0: (-1, 2**62), 1: (-1, 0, 2**62), 3: (None,), 4: (0.0, -1.0, math.nan), 5: (0, -1, 6),
        6: (0.0, -0.5, math.nan), 8: (None,),
        7: (None, *((ctypes.c_double * 2)(0.1, value) for value in (1.0, -0.1, math.nan))),
    }
    for at, values in wrong.items():
        for value in values:
            assert call(*right[:at], value, *right[at + 1 :]) == 2, (at, value)  # csrc/cpu/check.h: BAD_ARGUMENT
    assert list(tokens) == [7, 7]
    assert call(*right) == 0 and list(tokens) == [0, 1]


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_one_position_a_row(way):
    for pos in ([0], [0, 1, 2]):
        with pytest.raises(ValueError, match="generate: .* positions, expected one per row \\(2\\)"):
            draw(torch.zeros(2, 5), 1.0, None, None, 0, pos)
