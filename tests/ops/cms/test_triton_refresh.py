"""What updates a CMS level's matrices in Triton, by a kernel and by PyTorch's GEMM, and orthogonalises a gradient:
against the chunked functions in fp64, a row's bits in any company, and what an update leaves alone."""

import pytest
import torch
from cms_level import DEVICE, draw, poison_buffers
from numerics import within_yardstick

from hope_kernels import CMSConfig, ContinuumMemory
from hope_kernels.ops.cms import level as chunked
from hope_kernels.ops.cms.absorb import absorb
from hope_kernels.ops.cms.level import Adam

pytest.importorskip("triton")
from hope_kernels.ops.cms.triton import library  # noqa: E402
from hope_kernels.ops.cms.triton import operator as kernels  # noqa: E402

# the interpreter's, on a loop bound
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")

HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
DTYPES = [torch.float32, *HALVES]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    poison_buffers(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C, moment, total",
                                              [(1, False, False), (5, True, False), (70, False, True),
                                                  (17, True, True), (None, False, True),
                                              (None, True, False), (5, "adam", False), (70, "adam", True),
                                              (None, "adam", True)])
def test_refresh(C, moment, total, dtype):
    """Rows 0 and 2 of three: values, the copy, a total that becomes zero; row 1 and what only it holds keep
    their bits."""
    r, c, rows = 72, 133, [0, 2]
    left, right = (None, None) if C is None else (draw(3, C, r, dtype=dtype), draw(3, C, c, dtype=dtype, seed=1))
    weight, m, t, v = (draw(3, r, c, seed=s) for s in (2, 3, 4, 5))
    v = 0.1 + v.square() if moment == "adam" else None  # a small v multiplies the error of m
    copy, m, t = torch.zeros(3, r, c, dtype=dtype, device=DEVICE), m if moment else None, t if total else None
    weight[1], copy[1] = float("nan"), float("nan")
    if C is not None:
        left[1] = float("nan")

    def run(ops, kind):
        given = [None if a is None else a.to(kind, copy=True) for a in (weight, m, t, v)]
        factors = [None if a is None or kind == torch.float32 else a.double() for a in (left, right)]
        factors = [left, right] if kind == torch.float32 else factors
        mine = copy.clone()
        adam = None if v is None else Adam(given[3], (0.9, 0.99), 3, 70)
        ops.refresh_(given[0], mine, *factors, rows, 0.3, moment=given[1], mu=0.9, total=given[2], adam=adam)
        return [*given, mine]

    exact, peer, ours = run(chunked, torch.float64), run(chunked, torch.float32), run(kernels, torch.float32)
    for name, a, b, e in zip(("weight", "moment", "total", "square"), ours, peer, exact):
        if a is not None:
            within_yardstick(a[rows], b[rows], e[rows], name)
            assert torch.equal(
                a[1], {"weight": weight, "moment": m, "total": t, "square": v}[name][1]
            ) or name == "weight" and a[1].isnan().all()
    assert torch.equal(ours[4][rows], ours[0][rows].to(dtype)) and ours[4][1].isnan().all()
    assert not total or not ours[2][rows].any()


def sum_added(ours, target, left, right, rows, alpha, beta):
    """Adds to ``ours`` in its rows what PyTorch adds to ``target``; other rows stay."""
    peer, exact = target.clone(), target.double()
    kernels.outer_add_(ours, left, right, rows, alpha, beta)
    chunked.outer_add_(peer, left, right, rows, alpha, beta)
    chunked.outer_add_(exact, left.double(), right.double(), rows, alpha, beta)
    within_yardstick(ours, peer, exact, "target")
    others = [b for b in range(3) if b not in rows]
    assert torch.equal(ours[others], target[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_add(dtype):
    left, right, target = draw(3, 70, 40, dtype=dtype), draw(
        3, 70, 72, dtype=dtype, seed=1
    ), draw(3, 40, 72, seed=2)
    for rows, alpha, beta in ([0, 1, 2], 1.0, 1.0), ([1], -0.5, 0.25), ([0, 2], 2.0, 0.0):
        ours = target.clone()
        sum_added(ours, target, left, right, rows, alpha, beta)
        alone = target[rows[-1:]].clone()
        kernels.outer_add_(alone, left[rows[-1:]], right[rows[-1:]], [0], alpha, beta)
        assert torch.equal(alone[0], ours[rows[-1]])
    fresh = torch.full_like(target, float("nan"))
    kernels.outer_add_(fresh, left, right, [0, 2], beta=0.0)
    assert torch.isfinite(fresh[[0, 2]]).all() and fresh[1].isnan().all()
    kernels.outer_add_(target, left, right, [])


def test_a_refresh_does_not_see_masked_tokens_or_company():
    """Zeros after the last token, and other rows, leave the bits; so do two updates of one row each for one of
    both rows."""
    left, right, weight = draw(2, 21, 40), draw(2, 21, 72, seed=1), draw(2, 40, 72, seed=2)
    want = weight.clone()
    kernels.refresh_(want, None, left, right, [0, 1], 0.1)
    padded = [torch.cat([t, t.new_zeros(2, 30, t.shape[2])], 1) for t in (left, right)]
    one_by_one = weight.clone()
    kernels.refresh_(one_by_one, None, *padded, [1], 0.1)
    kernels.refresh_(one_by_one, None, *padded, [0], 0.1)
    assert torch.equal(one_by_one, want)


@pytest.fixture
def small_products(monkeypatch):
    """The library takes what would be far too small for it to pay."""
    monkeypatch.setattr(library, "LONG", 16)
    monkeypatch.setattr(library, "LARGE", 0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("moment, total", [
    (False, False), (False, True), (True, False), (True, True), ("adam", False), ("adam", True),
])
def test_a_refresh_by_the_library(moment, total, dtype, small_products, monkeypatch):
    """Rows 2 and 0 of three: against the kernel by the yardstick, each alone bit for bit; row 1 keeps its
    bits."""
    r, c, C, rows = 72, 136, 32, [2, 0]
    left, right = (draw(3, C, n, dtype=dtype, seed=n) for n in (r, c))
    weight, m, t, v = (draw(3, r, c, seed=s) for s in (2, 3, 4, 5))
    v, m, t = 0.1 + v.square() if moment == "adam" else None, m if moment else None, t if total else None
    left[1], weight[1] = float("nan"), float("nan")
    products = []
    product = library.add_product_
    monkeypatch.setattr(library, "add_product_", lambda *given: (products.append(given), product(*given)))

    def run(ops, kind=torch.float32, of=slice(None), rows=rows):
        given = [None if a is None else a[of].to(kind, copy=True) for a in (weight, m, t, v)]
        factors = [a[of] if kind == torch.float32 else a[of].double() for a in (left, right)]
        copy = torch.full(given[0].shape, -3.0, dtype=dtype, device=DEVICE)
        adam = None if v is None else Adam(given[3], (0.9, 0.99), 3, 70)
        ops.refresh_(given[0], copy, *factors, rows, 0.3, moment=given[1], mu=0.9, total=given[2], adam=adam)
        return dict(zip(("weight", "moment", "total", "square", "copy"), (*given, copy)))

    exact, ours = run(chunked, torch.float64), run(kernels)
    assert len(products) == 2
    alone = {b: run(kernels, of=slice(b, b + 1), rows=[0]) for b in rows}
    monkeypatch.setattr(library, "LARGE", 2**62)
    theirs = run(kernels)
    assert len(products) == 4
    for name, a in ours.items():
        if a is None:
            continue
        for b in rows:
            assert torch.equal(a[b], alone[b][name][0]), name
        if name != "copy":
            within_yardstick(a[rows], theirs[name][rows], exact[name][rows], name)
            before = {"weight": weight, "moment": m, "total": t, "square": v}[name][1]
            assert torch.equal(a[1].view(torch.int32), before.view(torch.int32)), name
    assert torch.equal(ours["copy"][rows], ours["weight"][rows].to(dtype)) and (ours["copy"][1] == -3).all()
    assert not total or not ours["total"][rows].any()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_sum_by_the_library(dtype, small_products):
    left, right, target = draw(3, 32, 40, dtype=dtype), draw(3, 32, 72, dtype=dtype, seed=1), draw(3, 40, 72)
    for rows, alpha, beta in ([0, 1, 2], 1.0, 1.0), ([1], -0.5, 0.25), ([0, 2], 2.0, 0.0):
        ours = target.clone()
        if not beta:
            ours[rows] = float("nan")
        sum_added(ours, target, left, right, rows, alpha, beta)


@pytest.mark.parametrize("optimizer, chunks", [("gd", (32,)), ("gd", (32, 64)), ("adam", (32,))])
def test_a_short_segment_is_filled_up_in_any_company(optimizer, chunks, small_products, monkeypatch):
    """16 tokens of a row beside 24 of another, and alone: products of 32 in any case."""
    config = CMSConfig(16, chunks, optimizer=optimizer, lr=0.1, intermediate_size=64)
    layer = ContinuumMemory(config).to(DEVICE, torch.float16)
    factors = {n: (draw(2, 24, r, dtype=torch.float16), draw(2, 24, c, dtype=torch.float16, seed=1))
               for n, r, c in (("up", 64, 16), ("down", 16, 64))}
    factors = {n: tuple(t.masked_fill(torch.arange(24, device=DEVICE)[:, None] >= torch.tensor(
        [16, 24], device=DEVICE).view(2, 1, 1), 0) for t in pair) for n, pair in factors.items()}

    lengths, product = [], library.add_product_
    monkeypatch.setattr(
        library, "add_product_", lambda w, left, *more: (lengths.append(len(left)), product(w, left, *more))
    )

    def learned(level, among, width):
        state = layer.init_state(len(among)).draft()
        mine = {n: tuple(t[among, :width] for t in pair) for n, pair in factors.items()}
        rows = list(range(len(among)))
        absorb(state, config, layer.start(level), level, mine, rows, [32] * len(among), ops=kernels,
               tokens=[(16, 24)[b] for b in among])
        held = state.weights[level] if level == 0 else state.grads[level]
        return {n: t[0] for n, t in held.items()}

    with torch.no_grad():
        for level in range(len(chunks)):
            together = learned(level, [0, 1], 24)
            for n, t in learned(level, [0], 16).items():
                assert torch.equal(t, together[n]), n
    assert set(lengths) == {32} and len(lengths) == 6 * len(chunks)
    assert not kernels.whole_segments(8) and kernels.whole_segments(32)


def test_which_updates_the_library_takes():
    """By types, widths and tokens, never by the number of rows; the call that a GPU gets is one that this
    PyTorch knows."""
    def factors(C, r, c, B=1, dtype=torch.bfloat16):
        return torch.empty(B, C, r, dtype=dtype, device="meta"), torch.empty(B, C, c, dtype=dtype, device="meta")

    for B in (1, 7):
        assert library.serves(*factors(1024, 1024, 2048, B), False)
        assert not library.serves(*factors(1024, 1024, 2048, B), True)
        assert library.serves(*factors(2048, 1024, 2048, B), True)
        for C, r, c in (1023, 4096, 4096), (1024, 1024, 2040), (1024, 4100, 4096), (1024, 4096, 4100):
            assert not library.serves(*factors(C, r, c, B), False), (C, r, c)
        assert not library.serves(*factors(4096, 4096, 4096, B, torch.float32), False)
    (left, right), target = factors(1024, 24, 40), torch.empty(24, 40, device="meta")
    library.add_product_(target, left[0], right[0], 1.0, -0.1)
    fresh = 64 if DEVICE == "cpu" else library.ALIGNMENT  # where an allocation starts
    shifted = draw(300, dtype=torch.float16)[8:]
    for t in (shifted, shifted[:256].view(16, 16).mT):
        placed = library.placed(t)
        assert placed.data_ptr() % fresh == 0 and placed.is_contiguous() and torch.equal(placed, t)


@pytest.mark.parametrize("shape", [(20, 33), (72, 20), (1, 1), (66, 80)])
def test_newton_schulz(shape):
    g = draw(*shape)
    ours, peer, exact = kernels.newton_schulz(g), chunked.newton_schulz(g), chunked.newton_schulz(g.double())
    within_yardstick(ours, peer, exact, "x")
    assert ours.is_contiguous()
    assert torch.linalg.svdvals(ours).min() > 0.5 and torch.linalg.svdvals(ours).max() < 1.3


def test_newton_schulz_takes_each_matrix_on_its_own():
    """Beside a NaN; a zero matrix stays zero, and a norm below 1e-7 counts as 1e-7."""
    g = draw(9, 20, seed=1)
    batch = torch.stack([g * float("nan"), g, g * 0, g * 1e-10]).reshape(2, 2, 9, 20)
    found = kernels.newton_schulz(batch).flatten(0, 1)
    assert found[0].isnan().all() and not found[2].any()
    assert torch.equal(found[1], kernels.newton_schulz(g))
    torch.testing.assert_close(found[3], chunked.newton_schulz(g * 1e-10), rtol=1e-4, atol=1e-6)
