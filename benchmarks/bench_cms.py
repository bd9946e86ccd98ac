"""The Continuum Memory System on one device: reading, refreshing, orthogonalising.

    python -m benchmarks.bench_cms [--only NAME ...] [--quick] [--minutes 30] [--out benchmarks/results/cms.json]

    forward  a stack of levels beside a torch module of equal weights, eager and compiled; weights shared by
             all rows, or one set a row
    refresh  theta <- theta - lr f(left^T right) of both matrices of a level, from the factors of C tokens
    segment  a level through the layer's two calls: C tokens read, their errors delivered, the level refreshed
    pending  the same when refreshes are kept as factors of up to T tokens, then folded into the weights, beside
             folding at once
    newton   muon's five Newton-Schulz steps on the gradients of both matrices

FLOPs and bytes are those that no implementation can avoid: a refresh reads and writes fp32 weights (8 bytes; 8 more for
momentum, 2 for a 16-bit copy) and reads the factors; muon's five steps are counted as products of the smaller
Gram matrix. Before a case is timed, its values are compared with fp64 (at most twice the error of plain
PyTorch in the same dtype, or 8 eps); one that fails is refused. Also part of benchmarks.gpu; alone, the
command measures a wider grid, and the models of bench_model beside it.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import bench_model, studies
from benchmarks import measure as m
from benchmarks.cms_table import table
from benchmarks.device import ceilings_of, describe
from benchmarks.records import RESULTS, Results, stamp
from benchmarks.run import measure
from hope_kernels import CMSConfig, ContinuumMemory
from hope_kernels.ops import cms_forward, cms_refresh_
from hope_kernels.ops.cms import pending as policy
from hope_kernels.ops.cms.backends import resolve

RESULT = RESULTS / "cms.json"
MU = 0.9


@dataclass(frozen=True)
class Case:
    """B rows of C tokens (T slots for pending factors) through K levels of width d with 4 d hidden units.
    backend None: the default."""

    kind: str
    d: int = 256
    C: int = 64
    K: int = 1
    B: int = 1
    T: int = 0
    optimizer: str = "gd"
    rows: str = "shared"
    dtype: str = "fp32"
    backend: str | None = None

    @property
    def name(self) -> str:
        shape = f"{self.kind} d{self.d} C{self.C} B{self.B} {self.dtype}"
        ends = {"forward": f"K{self.K} {self.rows}", "pending": f"T{self.T}"}
        return f"{shape} {ends.get(self.kind, self.optimizer)}{f' {self.backend}' if self.backend else ''}"

    @property
    def config(self) -> CMSConfig:
        """Level l has the period C 4^l."""
        return CMSConfig(
            self.d, tuple(self.C * 4**l for l in range(self.K)), optimizer=self.optimizer, momentum=MU, lr=self.rate
        )

    @property
    def rate(self) -> float:
        """With unit factors, a refresh changes a matrix about as much as it is large, so that
        no error of the step is lost in the rounding of the weight."""
        return 5 * self.d**-0.5 if self.optimizer == "muon" else (self.d * self.C) ** -0.5

    @property
    def weights(self) -> int:
        """Numbers in the matrices of one level."""
        return 8 * self.d * self.d

    @property
    def itemsize(self) -> int:
        return m.DTYPES[self.dtype].itemsize


PERIODS = (16, 64, 256, 1024, 4096)
OPTIMIZERS = ("gd", "momentum", "muon")
F, R, S, W = (partial(Case, kind) for kind in ("forward", "refresh", "segment", "pending"))
NS = partial(Case, "newton", optimizer="muon")


def _grid(widths: tuple[int, ...], dtype: str) -> tuple[Case, ...]:
    """Refreshes: gd at every period, the others at two."""
    gd = [R(d, C, dtype=dtype) for d in widths for C in PERIODS]
    return (*gd, *(R(d, C, optimizer=o, dtype=dtype) for o in OPTIMIZERS[1:] for d in widths for C in (64, 1024)))


def _waiting(widths: tuple[int, ...], batches: tuple[int, ...], dtype: str) -> tuple[Case, ...]:
    return tuple(
        W(d, C, B=B, T=T, dtype=dtype) for d in widths for B in batches for C in (16, 64)
        for T in (32, 64, 128, 256) if T >= C
    )


X = {"dtype": "bf16", "backend": "triton"}
GPU_CASES = tuple(dict.fromkeys((
    R(4096, 64, **X), S(1024, 64, **X), R(4096, 4096, **X), F(1024, 512, K=3, B=8, **X),
    F(1024, 512, K=3, B=8, rows="own", **X), *(R(4096, 64, optimizer=o, **X) for o in OPTIMIZERS[1:]),
    W(1024, 16, T=128, **X),
    R(1024, 64, **X), S(4096, 64, **X), NS(4096, backend="triton"), R(1024, 64, B=32, **X),
    R(1024, 64, dtype="bf16"), R(4096, 64, dtype="bf16"), S(1024, 64, dtype="bf16"),
    F(1024, 512, K=3, B=8, dtype="bf16"), F(1024, 512, K=3, B=8, rows="own", dtype="bf16"), NS(1024), NS(4096),
    *_grid((1024, 2048, 4096), "bf16"),
    *(S(d, C, B=B, dtype="bf16") for d, B in ((1024, 1), (1024, 8), (4096, 1)) for C in (64, 1024)),
    R(1024, 64, B=32, dtype="bf16"), R(1024, 64), R(1024, 1024),
    F(4096, 512, B=8, dtype="bf16"), F(1024, 512, K=3, B=8), *_waiting((1024, 4096), (1, 8), "bf16"),
)))
QUICK_GPU = (
    R(256, 64, **X), S(256, 64, **X), F(256, 64, K=2, B=2, rows="own", **X),
    R(256, 64, dtype="bf16"), S(256, 64, dtype="bf16"), W(256, 64, T=128, dtype="bf16"),
    F(256, 64, K=2, B=2, rows="own", dtype="bf16"), NS(256),
)
BOTH = ("cpp", "chunked")
SUITE_CPU = (  # what benchmarks.gpu has time for
    *(F(256, 256, K=2, B=2, rows=rows, backend=b) for rows in ("shared", "own") for b in BOTH),
    *(R(256, 64, optimizer=o, backend=b) for o in OPTIMIZERS for b in BOTH),
    *(S(256, 64, backend=b) for b in BOTH), NS(256), W(256, 16, T=64),
)
CPU_CASES = (
    *(F(d, 512, K=2, B=4, rows=rows) for d in (128, 256, 512) for rows in ("shared", "own")),
    *(R(d, C, optimizer=o) for o in OPTIMIZERS for d in (128, 256, 512) for C in PERIODS),
    *(S(d, C, optimizer=o) for d in (128, 256, 512) for C in (16, 64,
            1024) for o in OPTIMIZERS[: 3 if C == 64 else 1]),
    *(NS(d) for d in (128, 256, 512)), *_waiting((128, 256, 512), (1, 4), "fp32"),
)
QUICK_CPU = (
    *(F(32, 16, K=2, B=2, backend=b) for b in BOTH), F(32, 16, K=2, B=2, rows="own"),
    *(R(32, 16, backend=b) for b in BOTH), NS(32, B=2),
    R(32, 16, optimizer="momentum"), R(32, 16, B=2, optimizer="muon"), S(32, 16, B=2), W(32, 16, T=32),
)


def refused(check: dict, what: str) -> dict:
    return {"status": "refused", "reason": f"{check.get('tensor', 'it')} differs from {what}", "check": check}


# -- forward -------------------------------------------------------------------------------------------------


class Level(nn.Module):
    """What a level is when nothing learns: x + down(gelu(up(norm(x))))."""

    def __init__(self, level: dict[str, Tensor]):
        super().__init__()
        self.gain, self.up, self.down = (nn.Parameter(level[n]) for n in ("norm_gain", "up", "down"))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(nn.functional.rms_norm(x, x.shape[-1:], self.gain, 1e-6), self.up)
        return x + nn.functional.linear(nn.functional.gelu(hidden, approximate="tanh"), self.down)


def levels_of(case: Case, device: str, seed: int = 0) -> list[dict[str, Tensor]]:
    """K levels in the case's dtype; with rows="own" every row has matrices of its own."""
    g, d, N = torch.Generator(device).manual_seed(seed), case.d, 4 * case.d
    own = (case.B,) if case.rows == "own" else ()
    kw = {"generator": g, "device": device, "dtype": m.DTYPES[case.dtype]}
    return [{"norm_gain": 1 + torch.randn(d, **kw) / 8, "up": torch.randn(*own, N, d, **kw) * d**-0.5,
             "down": torch.randn(*own, d, N, **kw) * N**-0.5} for _ in range(case.K)]


def stacked(levels: list[dict[str, Tensor]], x: Tensor) -> Tensor:
    """The same by torch modules; row by row where rows have weights of their own."""
    if levels[0]["up"].dim() == 2:
        return nn.Sequential(*map(Level, levels))(x)
    of = lambda level, b: {n: t[b] if t.dim() == 3 else t for n, t in level.items()}
    return torch.stack([stacked([of(level, b) for level in levels], x[b]) for b in range(x.shape[0])])


def read_levels(case: Case, x: Tensor, levels: list[dict[str, Tensor]]) -> Tensor:
    """The call under test."""
    return cms_forward(x, levels, case.config, ops=resolve(case.config, x.dtype, x.device, case.backend))


@torch.no_grad()
def forward(
    case: Case, device: str, ceilings: dict, seconds: float, quick: bool, op: Callable = read_levels
) -> dict:
    """``C`` tokens a row. The torch module has one set of weights for all rows in either case: what a model
    that does not learn costs."""
    g, dtype = torch.Generator(device).manual_seed(1), m.DTYPES[case.dtype]
    x, levels = torch.randn(
        case.B, case.C, case.d, generator=g, device=device, dtype=dtype
    ), levels_of(case, device)
    wide = [{n: t.double() for n, t in level.items()} for level in levels]
    check = m.compare({"y": op(case, x, levels)}, {"y": stacked(levels, x)}, {"y": stacked(wide, x.double())})
    if not check["ok"]:
        return refused(check, "fp64")
    sets = m.sets_for(case.K * case.weights * case.itemsize, device)
    problems = [levels_of(case, device, seed) for seed in range(sets)]
    flops = 2 * case.B * case.C * case.K * case.weights
    moved = (
        2 * case.B * case.C * case.d + case.K * case.weights * (case.B if case.rows == "own" else 1)
    ) * case.itemsize
    record = m.time_calls(
        [partial(op, case, x, levels) for levels in problems], device, seconds
    ) | {"check": check, "sets": sets}
    shared = [levels_of(Case(**asdict(case) | {"rows": "shared"}), device, seed) for seed in range(sets)]
    modules = [nn.Sequential(*map(Level, levels)).requires_grad_(False) for levels in shared]
    record["module_ms"] = m.time_calls([partial(module, x) for module in modules], device, seconds)["ms"]
    if not quick:
        try:
            compiled = [torch.compile(module) for module in modules]
            record["compiled_ms"] = m.time_calls([partial(f, x) for f in compiled], device, seconds)["ms"]
        except Exception as e:  # no compiler on this machine, or one that fails
            record |= {"compiled_ms": None, "compiled_reason": f"{type(e).__name__}: {e}".splitlines()[0][:200]}
    for key in ("module_ms", "compiled_ms"):
        if record.get(key):
            record[f"of_{key.removesuffix('_ms')}"] = record[key]["median"] / record["ms"]["median"]
    return m.rates(record, ceilings, case.dtype, flops, moved)


# -- refresh -------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """One matrix, B rows: weight, moment (momentum), total (muon: the gradient of earlier segments, here 0)
    [B, r, c] fp32; left [B, C, r], right [B, C, c] and copy (the weight, if they are not fp32) in the case's
    dtype."""

    weight: Tensor
    left: Tensor
    right: Tensor
    moment: Tensor | None
    total: Tensor | None
    copy: Tensor | None


def refresh_matrix_(case: Case, given: Given) -> None:
    """The call under test, in place."""
    cms_refresh_(
        case.config, 0, *given[:3], moment=given.moment, total=given.total, copy=given.copy, backend=case.backend
    )


def orthogonal(g: Tensor) -> Tensor:
    """Muon's quintic written out, to check against: five steps from g / |g|_F, on the wide side."""
    x = g if g.shape[-2] <= g.shape[-1] else g.mT
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt()
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x - 4.775 * s @ x + 2.0315 * s @ (s @ x)
    return x if g.shape[-2] <= g.shape[-1] else x.mT


def plain_(case: Case, given: Given) -> None:
    """The equations in the dtype of the weight: the peer in fp32, the truth in fp64."""
    weight = given.weight
    g = torch.einsum("bcr,bcs->brs", given.left.to(weight.dtype), given.right.to(weight.dtype))
    if case.optimizer == "momentum":
        g = given.moment.mul_(MU).add_(g)
    if case.optimizer == "muon":
        g = 0.2 * math.sqrt(max(g.shape[1:])) * orthogonal(g)
    weight.sub_(case.rate * g)
    if given.copy is not None:
        given.copy.copy_(weight)


def factors(case: Case, device: str, seed: int) -> list[Given]:
    """The two matrices of a level."""
    g, d, N, dtype = torch.Generator(device).manual_seed(seed), case.d, 4 * case.d, m.DTYPES[case.dtype]
    random = lambda *shape: torch.randn(case.B, *shape, generator=g, device=device)
    found = []
    for r, c in ((N, d), (d, N)):
        weight = random(r, c) * c**-0.5
        found.append(Given(
            weight, random(case.C, r).to(dtype), random(case.C, c).to(dtype),
            random(r, c) * case.C**0.5 if case.optimizer == "momentum" else None,
            torch.zeros_like(weight) if case.optimizer == "muon" else None,
            weight.to(dtype) if dtype != torch.float32 else None))
    return found


def newton_flops(case: Case) -> float:
    """Of both matrices of one row: five steps, each three products of the smaller Gram matrix."""
    d, N = case.d, 4 * case.d
    return 2 * 5 * (4 * d * d * N + 2 * d**3)


def refresh_work(case: Case) -> tuple[float, float]:
    """(FLOPs, bytes) of the refresh of one level, all rows."""
    d, N = case.d, 4 * case.d
    flops = 2 * case.weights * case.C
    if case.optimizer == "muon":
        flops += newton_flops(case)
    per_weight = {"gd": 8, "momentum": 16, "muon": 8}[case.optimizer] + (2 if case.dtype != "fp32" else 0)
    return case.B * flops, case.B * (case.weights * per_weight + 2 * (d + N) * case.C * case.itemsize)


@torch.no_grad()
def refresh(
    case: Case, device: str, ceilings: dict, seconds: float, quick: bool, op: Callable = refresh_matrix_
) -> dict:
    def after(step: Callable, wide: bool = False) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, given in zip(("up", "down"), factors(case, device, 0)):
            if wide:
                given = Given(*(None if t is None else t.double() for t in given))
            step(case, given)
            tensors = {"weight": given.weight, "momentum": given.moment, "copy": given.copy}
            found |= {f"{name} {part}": t for part, t in tensors.items() if t is not None}
        return found

    check = m.compare(after(op), after(plain_), after(plain_, wide=True))
    if not check["ok"]:
        return refused(check, "fp64")
    flops, nbytes = refresh_work(case)
    problems = [factors(case, device, seed) for seed in range(m.sets_for(nbytes, device))]
    calls = [lambda given=given: [op(case, matrix) for matrix in given] for given in problems]
    record = m.time_calls(calls, device, seconds) | {"check": check, "sets": len(problems)}
    record["bytes_per_weight"] = nbytes / (case.B * case.weights)
    return m.rates(record, ceilings, case.dtype, flops, nbytes)


def newton_schulz(case: Case, grad: Tensor) -> Tensor:
    """The call under test: five steps for every matrix of [B, r, c] fp32."""
    return resolve(case.config, grad.dtype, grad.device, case.backend, inner=True).newton_schulz(grad)


@torch.no_grad()
def newton(
    case: Case, device: str, ceilings: dict, seconds: float, quick: bool, op: Callable = newton_schulz
) -> dict:
    """Gradients of rank ``C`` at most, as a segment gives them; in and out are read and written once."""
    def gradients(seed: int) -> list[Tensor]:
        return [
            torch.einsum("bcr,bcs->brs", given.left.float(), given.right.float())
            for given in factors(case, device, seed)
        ]

    named = lambda found: dict(zip(("up", "down"), found))
    first = gradients(0)
    check = m.compare(
        *(named([f(g) for g in first]) for f in (partial(op, case), orthogonal, lambda g: orthogonal(g.double())))
    )
    if not check["ok"]:
        return refused(check, "fp64")
    nbytes = 8 * case.B * case.weights
    problems = [gradients(seed) for seed in range(m.sets_for(nbytes, device))]
    record = m.time_calls([lambda p=p: [op(case, g) for g in p] for p in problems], device, seconds)
    return m.rates(
        record | {"check": check, "sets": len(problems)}, ceilings, case.dtype, case.B * newton_flops(case), nbytes
    )


def one_segment(
    layer: ContinuumMemory, state, x: Tensor, error: Tensor, backend: str | None = None
) -> tuple[Tensor, object]:
    """The calls under test: y [B, C, d] and the state that has learned from the segment, in place."""
    y, state = layer(x, state, backend=backend)
    return y, layer.refresh(state, error, backend=backend)


def learner(case: Case, device: str) -> tuple[ContinuumMemory, Tensor, Tensor]:
    """(layer, x, error): a level of period C at a small rate, one segment of it."""
    torch.manual_seed(0)
    kw = {"device": device, "dtype": m.DTYPES[case.dtype]}
    config = case.config.replace(lr=0.03 if case.optimizer == "muon" else 0.05 / case.C)
    return ContinuumMemory(config, **kw), torch.randn(
        case.B, case.C, case.d, **kw
    ), torch.randn(case.B, case.C, case.d, **kw)


@torch.no_grad()
def segment(case: Case, device: str, ceilings: dict, seconds: float, quick: bool) -> dict:
    """Counted: two products forward, dL/dhidden, two gradients (10 d N a token; nothing asks for dL/dx here),
    and the rest of the refresh."""
    layer, x, error = learner(case, device)

    def twice(layer: ContinuumMemory, x: Tensor, error: Tensor, backend: str | None) -> dict[str, Tensor]:
        _, state = one_segment(layer, layer.init_state(case.B), x, error, backend)
        return {"y": layer(x, state, backend=backend)[0]}

    exact = twice(copy.deepcopy(layer).double(), x.double(), error.double(), "chunked")
    check = m.compare(twice(layer, x, error, case.backend), by_hand(layer, x, error), exact)
    if not check["ok"]:
        return refused(check, "fp64")
    flops, nbytes = refresh_work(case)
    flops += 2 * case.B * case.C * case.weights * 3 / 2
    states = [layer.init_state(case.B) for _ in range(m.sets_for(nbytes, device))]
    # errors of either sign in turn: else the weights would grow without end
    calls = [
        partial(one_segment, layer, state, x, sign * error, case.backend) for sign in (1, -1) for state in states
    ]
    record = m.time_calls(calls, device, seconds) | {"check": check, "sets": len(states)}
    record["tokens/s"] = 1e3 * case.B * case.C / record["ms"]["median"]
    return m.rates(record, ceilings, case.dtype, flops, nbytes)


@contextmanager
def kept(slots: int):
    """Levels keep the factors of up to ``slots`` tokens; 0: none."""
    before = policy.TABLE
    policy.TABLE = tuple((device, slots, slots) for device in ("cpu", "cuda")) if slots else ()
    try:
        yield
    finally:
        policy.TABLE = before


@torch.no_grad()
def pending(case: Case, device: str, ceilings: dict, seconds: float, quick: bool) -> dict:
    """Two folds' worth of segments a call, with T slots and with none in turn; ms and tokens/s of the former."""
    layer, x, error = learner(case, device)
    segments = 2 * max(1, case.T // case.C)

    def through(layer: ContinuumMemory, state, x: Tensor, error: Tensor, slots: int) -> tuple[Tensor, object]:
        with kept(slots):
            for i in range(segments):
                y, state = one_segment(layer, state, x, (-1) ** i * error, case.backend)
            return y, state

    def outputs(layer: ContinuumMemory, x: Tensor, error: Tensor, slots: int) -> dict[str, Tensor]:
        return {"y": through(layer, layer.init_state(case.B), x, error, slots)[0]}

    exact = outputs(copy.deepcopy(layer).double(), x.double(), error.double(), 0)
    check = m.compare(outputs(layer, x, error, case.T), outputs(layer, x, error, 0), exact)
    if not check["ok"]:
        return refused(check, "fp64")
    states = {slots: layer.init_state(case.B) for slots in (case.T, 0)}
    calls = {str(slots): partial(through, layer, state, x, error, slots) for slots, state in states.items()}
    m.turns(calls, device, 0)
    found = m.turns(calls, device, seconds, most=50)
    rate = {slots: 1e3 * segments * case.B * case.C / ms["median"] for slots, ms in found.items()}
    return {"check": check, "segments": segments, "ms": found[str(case.T)], "at_once_ms": found["0"],
            "tokens/s": rate[str(case.T)],
            "at_once_tokens/s": rate["0"], "of_at_once": rate[str(case.T)] / rate["0"]}


def by_hand(layer: ContinuumMemory, x: Tensor, error: Tensor) -> dict[str, Tensor]:
    """The peer of ``segment``: torch modules, autograd and the written equations, in the layer's dtype, row
    by row."""
    outputs, config = [], layer.config
    for b in range(x.shape[0]):
        level = {n: p.detach().clone() for n, p in layer.levels[0].items()}
        module = Level(level)
        with torch.enable_grad():
            grads = torch.autograd.grad(module(x[b]), [module.up, module.down], error[b])
        for p, g in zip((module.up, module.down), grads):
            g = g.float()
            f = 0.2 * math.sqrt(max(g.shape)) * orthogonal(g) if config.optimizer == "muon" else g
            p.data = (p.float() - config.learning_rates[0] * f).to(p.dtype)
        outputs.append(module(x[b]).detach())
    return {"y": torch.stack(outputs)}


KINDS = {"forward": forward, "refresh": refresh, "segment": segment, "pending": pending, "newton": newton}
FIRST = 4  # of the GPU's cases, before everything else of its kind


def measured(case: Case, device: str, ceilings: dict, **options) -> dict:
    """The case's record. Raises Unserved where its backend has no kernels for the levels here, which PyTorch
    would then serve."""
    dtype = torch.float32 if case.kind == "newton" else m.DTYPES[case.dtype]
    ops = resolve(case.config, dtype, torch.device(device), case.backend, inner=True)
    if case.backend not in (None, "chunked", ops.__name__.rpartition(".")[2]):
        raise m.Unserved(f"cms: backend {case.backend!r} does not serve d {case.d}, {case.dtype} on {device}")
    return KINDS[case.kind](case, device, ceilings, **options)


def cases(device: str, quick: bool, full: bool = False) -> tuple[Case, ...]:
    if device == "cuda":
        return QUICK_GPU if quick else GPU_CASES
    return QUICK_CPU if quick else CPU_CASES if full else SUITE_CPU


def items(device: str, quick: bool, full: bool = False) -> Iterator[tuple[str, dict, Callable]]:
    """(name, the case as data, call with (ceilings)), most important first. full: the whole grid, on a CPU too."""
    for case in cases(device, quick, full):
        yield case.name, asdict(case), partial(
            measured, case, device, seconds=m.seconds(device, quick), quick=quick
        )


# -- alone ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts of cases' names")
    p.add_argument("--quick", action="store_true", help="small sizes: does the command itself work")
    p.add_argument("--minutes", type=float, default=30)
    p.add_argument("--out", default=str(RESULT))
    p.add_argument("--table", action="store_true", help="only print what the file says, as Markdown")
    args = p.parse_args(argv)
    if args.table:
        print(table(studies.load(args.out)))
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = Results(Path(args.out), stamp(args.quick))
    until = time.time() + 60 * args.minutes
    plan = [("env", "machine", {}, lambda _: describe(device))]
    for name in ceilings_of(device):
        plan.append(("env", name, {}, lambda _, name=name: m.ceiling(name, device, args.quick)))
    plan += [
        ("cms", *item) for item in (*items(device, args.quick, full=True),
            *bench_model.items(device, args.quick, full=True))
    ]
    status = measure(device, {"env": store, "cms": store}, args, until, plan)
    print(table(store.data))
    return status


if __name__ == "__main__":
    sys.exit(main())
