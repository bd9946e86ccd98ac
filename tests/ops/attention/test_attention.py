"""Attention in C++: against a softmax of every query in fp64 and PyTorch, its bits in any company, and who serves."""

import ctypes
import math

import pytest
import torch
from attention_cases import CASES, READ, T, config, draw, text
from numerics import within_yardstick

from hope_kernels import HopeConfig
from hope_kernels.backend import BY_ALL, NO_GRADIENT, Request
from hope_kernels.ops.attention import cpp, forward
from hope_kernels.ops.attention.backends import resolve
from hope_kernels.ops.shared import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")

named = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def attend(c, q, k, v, far, a: int, b: int, **options):
    """Tokens [a, b) with all before in the cache."""
    B, far = q.shape[0], None if far is None else far[:, a:b]
    return cpp.attend(c, q[:, a:b], k[:, :b], v[:, :b], [a] * B, [b - a] * B, [0] * B, far, **options)


def softmax(c, q, k, v, far, place: int) -> torch.Tensor:
    """One query [H, D] against slots [S, Hkv, D], in fp64."""
    (window, sinks), (H, D), group = c.sight, q.shape, q.shape[0] // k.shape[1]
    seen = [s for s in range(place + 1) if window is None or s > place - window or s < sinks]
    scale = D**-0.5 if c.attention_scale is None else c.attention_scale
    y = torch.empty(H, D, dtype=torch.float64)
    for h in range(H):
        keys, values = k[seen, h // group].double(), v[seen, h // group].double()
        mine = torch.stack([(q if s >= sinks or far is None else far)[h].double() for s in seen])
        y[h] = torch.softmax(scale * (mine * keys).sum(-1), 0) @ values
    return y


@named
def test_it_is_as_exact_as_pytorchs(case):
    c, q, k, v, far = text(case)
    y = attend(c, q, k, v, far, 0, READ + T)
    theirs = forward.attend(c, q, k, v, [0], [READ + T], [0], far)
    places = [*range(40), 63, 64, 65, 127, 128, 200, READ + T - 1]
    exact = torch.stack([
        softmax(c, q[0, t], k[0], v[0], None if far is None else far[0, t], t) for t in places
    ])
    within_yardstick(y[0, places], theirs[0, places], exact, "y")


@named
def test_bits_do_not_depend_on_cuts_company_threads_or_vectors(case):
    c, q, k, v, far = text(case, B=2)
    whole = attend(c, q, k, v, far, 0, READ + T)
    for a, b in ((0, 1), (1, 3), (3, 20), (64, 65), (100, 227), (227, 243), (300, 301), (301, READ + T)):
        assert torch.equal(attend(c, q, k, v, far, a, b), whole[:, a:b]), (a, b)
    alone = attend(c, q[1:], k[1:], v[1:], None if far is None else far[1:], 17, 60)
    assert torch.equal(alone, whole[1:, 17:60])
    threads, width = torch.get_num_threads(), cpu_library.library().hope_cpu_width
    most = width(0)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(attend(c, q, k, v, far, 0, READ + T), whole)
            assert torch.equal(attend(c, q, k, v, far, 309, 310), whole[:, 309:310])
        for bits in (128, 256, 512):
            width(bits)
            assert torch.equal(attend(c, q, k, v, far, 0, READ + T), whole)
            assert torch.equal(attend(c, q, k, v, far, 310, 311), whole[:, 310:311])
    finally:
        torch.set_num_threads(threads)
        width(most)


@pytest.mark.parametrize("name", ["window", "window narrower than a panel", "sinks", "groups wider than a panel"])
def test_bits_do_not_depend_on_what_the_cache_has_dropped(name):
    c, q, k, v, far = text(CASES[name])
    (window, sinks), whole = c.sight, attend(c, q, k, v, far, 0, READ + T)
    for gone in (1, 63, 64, 100, READ - window - sinks):
        kept = [*range(sinks), *range(sinks + gone, READ + T), 0, 0, 0]  # and room that is not written yet
        ks, vs = k[:, kept], v[:, kept]
        ks[:, -3:] = vs[:, -3:] = float("nan")
        mine = None if far is None else far[:, READ:]
        y = cpp.attend(c, q[:, READ:], ks, vs, [READ - gone], [T], [gone], mine)
        assert torch.equal(y, whole[:, READ:]), gone


@pytest.mark.parametrize("name", ["grouped", "sinks"])
def test_rows_of_a_ragged_batch(name):
    c, q, k, v, far = text(CASES[name], B=4)
    used, lengths = [0, 200, 64, 33], [70, 25, 1, 0]
    queries, further = (t if t is None else torch.stack([t[b, u : u + 70] for b, u in enumerate(used)])
                        for t in (q, far))
    keys, values = k.clone(), v.clone()
    for b, (u, n) in enumerate(zip(used, lengths)):
        keys[b, u + n :] = values[b, u + n :] = queries[b, n:] = float("nan")
    y = cpp.attend(c, queries, keys, values, used, lengths, [0] * 4, further)
    for b, (u, n) in enumerate(zip(used, lengths)):
        one = [None if t is None else t[b : b + 1] for t in (q, k, v, far)]
        assert torch.equal(y[b, :n], attend(c, *one, u, u + n)[0]) if n else True
        assert not y[b, n:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@named
def test_what_is_not_finite_reaches_those_that_see_it_and_no_other(case, bad):
    c, q, k, v, far = text(case)
    clean, (window, sinks) = attend(c, q, k, v, far, 0, READ + T), c.sight
    for at in (2, 70, 107):
        values, keys = v.clone(), k.clone()
        values[:, at] = bad
        keys[:, at] = float("nan")
        sees = torch.tensor([
            t >= at and (window is None or t < at + window or at < sinks) for t in range(READ + T)
        ])
        for spoiled in (attend(c, q, k, values, far, 0, READ + T), attend(c, q, keys, v, far, 0, READ + T)):
            assert torch.equal(spoiled[:, ~sees], clean[:, ~sees])
            assert not spoiled[:, sees].isfinite().any()
        one = int(sees.nonzero()[-1])
        assert not attend(c, q, k, values, far, one, one + 1).isfinite().any()
    queries, others = q.clone(), torch.arange(READ + T) != 100
    queries[:, 100] = bad
    y = attend(c, queries, k, v, None if far is None else torch.where(others[:, None, None], far, bad), 0, READ + T)
    assert y[:, 100].isnan().all() and torch.equal(y[:, others], clean[:, others])


def test_scores_of_any_size():
    """One key far above all others, far below them, and all alike."""
    c, v = config((1, 1, 8, {"attention_scale": 1.0})), draw(1, 200, 1, 8)
    q, k = torch.zeros(1, 200, 1, 8), torch.zeros(1, 200, 1, 8)
    q[..., 0] = 1
    for scores in ([1e30 if s == 77 else 0.0 for s in range(200)], [-1e30] * 199 + [0.0], [0.0] * 200, [3e37] * 200,
                   [-3e37] * 200, [math.sin(s) * 50 for s in range(200)], [float(s) for s in range(200)]):
        k[0, :, 0, 0] = torch.tensor(scores)
        y = cpp.attend(c, q, k, v, [0], [200], [0])
        for t in (0, 63, 77, 150, 199):
            exact = softmax(c, q[0, t], k[0], v[0], None, t)
            assert (y[0, t].double() - exact).abs().max() < 3e-6, scores[:3]


def test_who_serves():
    attention, cpu = HopeConfig(8, 16, 1, num_heads=2, mixer="attention"), torch.device("cpu")
    request = Request(attention, torch.float32, cpu, NO_GRADIENT)
    assert resolve(request) is resolve(request, "cpp") is cpp and resolve(request, "chunked") is forward
    converted = request._replace(config=attention.replace(rope_dtype="float32"))
    assert resolve(converted) is forward and resolve(converted, "cpp") is cpp
    for other in (
        request._replace(gradient=BY_ALL), request._replace(dtype=torch.float64),
        request._replace(device=torch.device("meta")), request._replace(config=attention.replace(d_model=12)),
    ):
        assert resolve(other) is resolve(other, "cpp") is forward
    with torch.autocast("cpu"):
        assert resolve(request) is forward
    with pytest.raises(ValueError, match="attention: unknown backend 'fast'"):
        resolve(request, "fast")


def test_a_tensor_of_another_class_or_dtype_is_pytorchs():
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

    c, q, k, v, far = text(CASES["grouped"])
    want = forward.attend(c, q, k, v, [0], [READ + T], [0], far)
    assert torch.equal(cpp.attend(c, q.as_subclass(Doubled), k, v, [0], [READ + T], [0]), want)
    wide = [t.double() for t in (q, k, v)]
    assert torch.equal(cpp.attend(c, *wide, [0], [READ + T], [0]), forward.attend(c, *wide, [0], [READ + T], [0]))


def test_what_does_not_fit_is_refused():
    c, q, k, v, _ = text(CASES["grouped"])
    n = READ + T
    for wrong, message in (
        (lambda: cpp.attend(c, q, k, v[:, :5], [0], [n], [0]), "backend 'cpp': v has .*expected"),
        (lambda: cpp.attend(c, q, k[..., :60], v, [0], [n], [0]), "backend 'cpp': k has"),
        (lambda: cpp.attend(c, q, k, v, [0], [n], [0], q[:, :5]), "backend 'cpp': far has"),
        (lambda: cpp.attend(c, q, k, v, [0, 0], [n], [0]), r"expected one per row \(1\)"),
        (lambda: cpp.attend(c, q, k, v, [1], [n], [0]), "attention: backend 'cpp' was handed"),
        (lambda: cpp.attend(c, q, k, v, [0], [n + 1], [0]), "attention: backend 'cpp' was handed"),
        (lambda: cpp.attend(c, q, k, v, [0], [n], [-1]), "attention: backend 'cpp' was handed"),
        (lambda: cpp.attend(c, q[:, :, :8], k, v, [0], [n], [0]), "attention: backend 'cpp' was handed"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


FAR = 2**62


def test_the_library_refuses_a_call_before_it_writes(monkeypatch):
    c, q, k, v, far = text(CASES["sinks"])
    real, tried = cpp._attention, []

    def refusing(pointer):
        right = cpp.AttentionCall.from_address(pointer)
        changes = [(n, value) for n, values in {
            "B": (-1, FAR), "T": (-1, FAR), "H": (0, -1, 3, FAR), "Hkv": (0, -1, 3, FAR), "D": (0, -1, FAR),
            "slots": (-1, 7, FAR), "window": (-1, 0, FAR), "sinks": (-1, FAR), "threads": (0, -1, FAR),
            "scale": (math.nan, math.inf), **{n: (None,) for n in ("q", "k", "v", "used", "base", "len", "y")},
        }.items() for value in values]
        for name, value in changes:
            wrong = cpp.AttentionCall.from_buffer_copy(right)
            setattr(wrong, name, value)
            assert real.bound()(ctypes.addressof(wrong)) == 2, (name, value)  # csrc/cpu/check.h: BAD_ARGUMENT
            tried.append(name)
        assert real.bound()(None) == 2
        real(pointer)

    want = attend(c, q, k, v, far, 0, 50)
    monkeypatch.setattr(cpp, "_attention", refusing)
    assert torch.equal(attend(c, q, k, v, far, 0, 50), want) and len(tried) == 35
