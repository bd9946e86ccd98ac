"""The gradient of attention in C++ (csrc/cpu/attention_backward.h): against autograd in fp64, in any company, and what
it refuses."""

import ctypes

import pytest
import torch
from attention_cases import CASES, draw, text
from numerics import within_yardstick

from hope_kernels.ops.attention.cpp import AttentionCall
from hope_kernels.ops.shared import cpu_library
from hope_kernels.ops.shared.cpu_library import POINTER

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"cpp: {cpu_library.unavailable()}")
named = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
READ, T = 150, 80


class Backward(ctypes.Structure):
    """``AttentionBackward``."""

    _fields_ = [("call", AttentionCall), *((n, POINTER) for n in ("dy", "rows", "dfar", "dq", "dk", "dv"))]


class Gradient:
    """Of y by the queries, far queries and own keys and values of rows of text, as PyTorch's graph has it."""

    def __init__(self, case, used, lengths, base=None, seed=0):
        self.c, *tensors = text(case, len(used))
        q, k, v, far = (t if t is None else t[:, : READ + T].contiguous() for t in tensors)
        rows = list(zip(used, lengths))
        at = lambda t: torch.stack([torch.nn.functional.pad(t[b, u : u + n], (0, 0, 0, 0, 0, T - n))
                                    for b, (u, n) in enumerate(rows)])
        self.q, self.far, self.k, self.v = at(q), None if far is None else at(far), k, v
        self.used, self.lengths, self.base = used, lengths, base or [0] * len(used)
        self.dy = draw(*self.q.shape, seed=9 + seed)

    def cpp(self, rows=None, threads=1) -> dict[str, torch.Tensor]:
        library, (window, sinks) = cpu_library.library(), self.c.sight
        (B, n, H, D), (_, slots, kv_heads, _) = self.q.shape, self.k.shape
        y, most, total = torch.empty_like(self.q), torch.empty(B, n, H), torch.empty(B, n, H)
        found = {"dq": torch.full_like(self.q, 7), "dk": torch.full((B, n, kv_heads, D), 7.0)}
        found["dv"] = found["dk"].clone()
        if sinks:
            found["dfar"] = found["dq"].clone()
        at = lambda t: None if t is None else t.data_ptr()
        counts = [(ctypes.c_int64 * B)(*of) for of in (self.used, self.base, self.lengths)]
        scale = D**-0.5 if self.c.attention_scale is None else self.c.attention_scale
        call = AttentionCall(B, n, H, kv_heads, D, slots, window or 0, sinks, threads, scale, at(self.q), at(self.far),
                             at(self.k), at(self.v), *map(ctypes.addressof, counts), at(y), at(most), at(total))
        assert library.hope_attention(ctypes.byref(call)) == 0
        marks = None if rows is None else (ctypes.c_int32 * B)(*rows)
        self.call = Backward(call=call, dy=at(self.dy), rows=None if marks is None else ctypes.addressof(marks),
                             **{name: at(t) for name, t in found.items()})
        self.kept = y, most, total, counts, found
        assert library.hope_attention_backward(ctypes.byref(self.call)) == 0
        return found

    def pytorch(self, dtype) -> dict[str, torch.Tensor]:
        """By autograd, with a cache of constants and own tokens behind them."""
        found = {n: [] for n in ("dq", "dk", "dv", "dfar")}
        for b, (u, n) in enumerate(zip(self.used, self.lengths)):
            q, far = (None if t is None else t[b : b + 1, :n].to(dtype).requires_grad_() for t in (self.q, self.far))
            k, v = (t[b : b + 1, u : u + n].to(dtype).requires_grad_() for t in (self.k, self.v))
            keys, values = (torch.cat([t[b : b + 1, :u].to(dtype), own], 1) for t, own in ((self.k, k), (self.v, v)))
            y = attend(self.c, q, q if far is None else far, keys, values, u)
            wanted = [t for t in (q, k, v, far) if t is not None]
            got = torch.autograd.grad(y, wanted, self.dy[b : b + 1, :n].to(dtype), allow_unused=True)
            for name, t, g in zip(found, wanted, got):
                whole = torch.zeros(1, T, *t.shape[2:], dtype=dtype)
                whole[:, :n] = 0 if g is None else g
                found[name].append(whole)
        return {n: torch.cat(parts) for n, parts in found.items() if parts}


def attend(c, q, far, k, v, used):
    """q [1, n, H, D], which is far as it sees the sinks, from slot ``used`` on, against slots [1, S, Hkv, D]."""
    (window, sinks), (n, H, D), S = c.sight, q.shape[1:], k.shape[1]
    k, v = (t.repeat_interleave(H // k.shape[2], 2) for t in (k, v))
    place, slot = torch.arange(used, used + n).view(-1, 1), torch.arange(S)
    scores = torch.where(slot < sinks, *(torch.einsum("bthd,bshd->bhts", t, k) for t in (far, q)))
    seen = (slot <= place) & ((slot > place - (window or S + 1)) | (slot < sinks))
    scores = (scores * (D**-0.5 if c.attention_scale is None else c.attention_scale)).masked_fill(~seen, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


ROWS = [(READ, T), (0, T), (64, 33), (5, 1), (0, 0)]


@named
def test_is_the_gradient(case):
    g = Gradient(case, *map(list, zip(*ROWS)))
    ours, theirs, exact = g.cpp(), g.pytorch(torch.float32), g.pytorch(torch.float64)
    assert ours.keys() == exact.keys()
    for name, t in ours.items():
        within_yardstick(t, theirs[name], exact[name], name)
        assert all(not t[b, n:].any() for b, n in enumerate(g.lengths)), name


@named
def test_bits_are_a_rows_own(case):
    """Alone or not, with any threads and vectors, with padding that is not a number, and beside a row that is not."""
    many = Gradient(case, *map(list, zip(*ROWS)))
    want = many.cpp()
    ask = cpu_library.library().hope_cpu_width
    most = ask(0)
    for bits, threads in ((most, 3), (256, 1)):
        assert ask(bits) in (bits, 128)
        try:
            assert all(torch.equal(t, want[n]) for n, t in many.cpp(threads=threads).items())
        finally:
            ask(most)
    for b, n in enumerate(many.lengths):
        for t in (many.q, many.far, many.dy):
            if t is not None:
                t[b, n:] = torch.nan
        many.k[b, many.used[b] + n :] = many.v[b, many.used[b] + n :] = torch.nan
    many.k[1, 3] = torch.nan
    some = many.cpp(rows=[1, 1, 1, 0, 1])
    for name, t in want.items():
        assert all(torch.equal(some[name][b], t[b]) for b in (0, 2, 4)) and (some[name][3] == 7).all(), name
    assert any(t[1].isnan().any() for t in some.values())


@pytest.mark.parametrize("case", [CASES["window"], CASES["sinks"], CASES["groups wider than a panel"]])
def test_bits_do_not_depend_on_what_the_cache_has_dropped(case):
    whole = Gradient(case, [READ], [T])
    want, (window, sinks) = whole.cpp(), whole.c.sight
    gone = READ - window - sinks
    whole.k, whole.v = (torch.cat([t[:, :sinks], t[:, sinks + gone :]], 1) for t in (whole.k, whole.v))
    whole.used, whole.base = [READ - gone], [gone]
    assert all(torch.equal(t, want[n]) for n, t in whole.cpp().items())


def test_queries_that_see_sinks_as_all_else_have_the_bits_of_those_that_are_told_so():
    """A row's do not depend on whether another row has come farther."""
    g = Gradient(CASES["sinks"], [0, 0], [T, 30])
    g.far = g.q.clone()
    told = g.cpp()
    g.far = None
    assert all(torch.equal(t, told[n]) for n, t in g.cpp().items())


def test_what_does_not_fit_is_refused():
    g = Gradient(CASES["sinks"], [0, 3], [T, 30])
    g.cpp()
    refused = lambda call: cpu_library.library().hope_attention_backward(ctypes.byref(call)) == 2
    for name in ("dy", "dq", "dk", "dv", "dfar"):
        wrong = Backward.from_buffer_copy(g.call)
        setattr(wrong, name, None)
        assert refused(wrong), name
    for name, values in {"most": [None], "sum": [None], "sinks": [0], "slots": [40], "Hkv": [0, 3], "threads": [0],
                         "T": [-1, 2**62], "B": [-1], "D": [0], "q": [None], "k": [None], "y": [None]}.items():
        for value in values:
            wrong = Backward.from_buffer_copy(g.call)
            setattr(wrong.call, name, value)
            assert refused(wrong), (name, value)
