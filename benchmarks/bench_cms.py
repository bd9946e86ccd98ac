"""The Continuum Memory System on one device: reading, refreshing, whole models, bytes, and a long run.

    python -m benchmarks.bench_cms [--only NAME ...] [--quick] [--minutes 30] [--out benchmarks/results/cms.json]

    forward  a stack of levels beside a torch module of equal weights, eager and compiled; weights shared by all rows, or one set a row
    refresh  theta <- theta - lr f(left^T right) of both matrices of a level, from the factors of C tokens
    segment  a level through the layer's two calls: C tokens read, their errors delivered, the level refreshed
    pending  the same when refreshes are kept as factors of up to T tokens, then folded into the weights, beside folding at once
    prefill  tokens/s of a model with learning off and on
    state    bytes a row holds per level, by formula and as they are
    long     a long text read with learning: speed and peak memory of every tenth, a decoded token after 1000 tokens and after all

FLOPs and bytes are what nobody can avoid: a refresh reads and writes fp32 weights (8 bytes; 8 more for momentum, 2 for a 16-bit copy) and
reads the factors; muon's five steps are counted as products of the smaller Gram matrix. On a CPU, whose cores others may share, the
ceilings are measured again beside every case. Before a case is timed, its values are compared with fp64 (at most twice the error of plain
PyTorch in the same dtype, or 8 eps); one that fails is refused. Also part of benchmarks.gpu.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
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

from hope_kernels import CMSConfig, ContinuumMemory, HopeConfig, HopeForCausalLM, TitansConfig
from hope_kernels.generation import read
from hope_kernels.meter import PeakMemory
from hope_kernels.ops import cms_forward, cms_refresh_
from hope_kernels.ops.cms import pending as policy

from . import measure as m
from . import studies

RESULT = m.ROOT / "benchmarks" / "results" / "cms.json"
MU = 0.9
SPAN = 16384  # tokens between two looks at the clock


@dataclass(frozen=True)
class Case:
    """B rows of C tokens (T of a model's text) through K levels of width d with 4 d hidden units."""

    kind: str
    d: int = 256
    C: int = 64
    K: int = 1
    B: int = 1
    T: int = 0
    optimizer: str = "gd"
    rows: str = "shared"
    model: str = ""
    dtype: str = "fp32"
    backend: str | None = None

    @property
    def name(self) -> str:
        if self.model:
            return f"{self.kind} {self.model} B{self.B} T{self.T} {self.dtype} {self.backend or 'default'}"
        shape = f"{self.kind} d{self.d} C{self.C} B{self.B} {self.dtype}"
        ends = {"forward": f"K{self.K} {self.rows}", "pending": f"T{self.T}"}
        return f"{shape} {ends.get(self.kind, self.optimizer)}"

    @property
    def config(self) -> CMSConfig:
        """Level l has the period C 4^l."""
        return CMSConfig(self.d, tuple(self.C * 4**l for l in range(self.K)), optimizer=self.optimizer, momentum=MU, lr=self.rate)

    @property
    def rate(self) -> float:
        """With unit factors, a refresh changes a matrix about as much as it is large: no error of the step hides behind the weight."""
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
P, H = partial(Case, "prefill", model="kjv-byte"), partial(Case, "prefill", model="heavy")


def _grid(widths: tuple[int, ...], dtype: str) -> tuple[Case, ...]:
    """Refreshes: gd at every period, the others at two."""
    gd = [R(d, C, dtype=dtype) for d in widths for C in PERIODS]
    return (*gd, *(R(d, C, optimizer=o, dtype=dtype) for o in OPTIMIZERS[1:] for d in widths for C in (64, 1024)))


def _waiting(widths: tuple[int, ...], batches: tuple[int, ...], dtype: str) -> tuple[Case, ...]:
    return tuple(W(d, C, B=B, T=T, dtype=dtype) for d in widths for B in batches for C in (16, 64) for T in (32, 64, 128, 256) if T >= C)


GPU_CASES = tuple(dict.fromkeys((
    R(1024, 64, dtype="bf16"), R(4096, 64, dtype="bf16"), S(1024, 64, dtype="bf16"), P(T=8192), H(T=8192),
    F(1024, 512, K=3, B=8, dtype="bf16"), F(1024, 512, K=3, B=8, rows="own", dtype="bf16"), Case("state", model="heavy"),
    Case("long", model="kjv-byte", T=1_000_000),
    *_grid((1024, 2048, 4096), "bf16"),
    *(S(d, C, B=B, dtype="bf16") for d, B in ((1024, 1), (1024, 8), (4096, 1)) for C in (64, 1024)),
    R(1024, 64, B=32, dtype="bf16"), R(1024, 64), R(1024, 1024), P(T=8192, B=8), H(T=8192, B=8), P(T=8192, backend="triton"),
    F(4096, 512, B=8, dtype="bf16"), F(1024, 512, K=3, B=8), *_waiting((1024, 4096), (1, 8), "bf16"),
)))
QUICK_GPU = (
    R(256, 64, dtype="bf16"), S(256, 64, dtype="bf16"), W(256, 64, T=128, dtype="bf16"),
    F(256, 64, K=2, B=2, rows="own", dtype="bf16"), P(T=256), Case("state", model="kjv-byte"), Case("long", model="kjv-byte", T=2000),
)
CPU_CASES = (
    *(F(d, 512, K=2, B=4, rows=rows) for d in (128, 256, 512) for rows in ("shared", "own")),
    *(R(d, C, optimizer=o) for o in OPTIMIZERS for d in (128, 256, 512) for C in PERIODS),
    *(S(d, C, optimizer=o) for d in (128, 256, 512) for C in (16, 64, 1024) for o in OPTIMIZERS[: 3 if C == 64 else 1]),
    *_waiting((128, 256, 512), (1, 4), "fp32"), P(T=4096), H(T=4096), P(T=4096, B=4),
    Case("state", model="kjv-byte"), Case("state", model="heavy"), Case("long", model="kjv-byte", T=200_000),
)
QUICK_CPU = (
    F(32, 16, K=2, B=2), F(32, 16, K=2, B=2, rows="own"), R(32, 16), R(32, 16, optimizer="momentum"), R(32, 16, B=2, optimizer="muon"),
    S(32, 16, B=2), W(32, 16, T=32), P(T=192), Case("state", model="kjv-byte"), Case("long", model="kjv-byte", T=1280),
)


def refused(check: dict, what: str) -> dict:
    return {"status": "refused", "reason": f"{check.get('tensor', 'it')} differs from {what}", "check": check}


def judged(record: dict, ceilings: dict, case: Case, device: str, quick: bool, flops: float, nbytes: float) -> dict:
    """``measure.rates``, on a CPU against ceilings of this moment, which the record keeps."""
    if device == "cpu":
        record["ceilings"] = ceilings = beside(quick)
    return m.rates(record, ceilings, case.dtype, flops, nbytes)


def beside(quick: bool) -> dict[str, float]:
    """GB/s of a copy (read + written) and TFLOP/s of an fp32 product, medians of five, in turn."""
    n, size = (256, 2**20) if quick else (1024, 2**26)
    a, b, c, out = torch.ones(size), torch.ones(size), torch.randn(n, n), torch.empty(n, n)
    ms = turns({"copy": partial(a.copy_, b), "matmul": partial(torch.mm, c, c, out=out)}, "cpu", 0.0, least=5)
    return {"copy": 8 * size / ms["copy"]["median"] / 1e6, "matmul fp32": 2 * n**3 / ms["matmul"]["median"] / 1e9}


def turns(calls: dict[str, Callable], device: str, seconds: float, least: int = 3, most: int = 8) -> dict[str, dict]:
    """ms of each call, in turn: ``least`` rounds, and up to ``most`` while ``seconds`` last."""
    spent, began = {name: [] for name in calls}, time.perf_counter()
    while (n := len(next(iter(spent.values())))) < least or (n < most and time.perf_counter() - began < seconds):
        for name, call in calls.items():
            spent[name].append(m.host_ms(lambda call=call: (call(), m.sync(device))))
    return {name: m.stats(ms) for name, ms in spent.items()}


# -- forward ------------------------------------------------------------------------------------------------------------------


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
    return cms_forward(x, levels, case.config)


@torch.no_grad()
def forward(case: Case, device: str, ceilings: dict, seconds: float, quick: bool, op: Callable = read_levels) -> dict:
    """``C`` tokens a row. The torch module has one set of weights for all rows in either case: what a model that does not learn costs."""
    g, dtype = torch.Generator(device).manual_seed(1), m.DTYPES[case.dtype]
    x, levels = torch.randn(case.B, case.C, case.d, generator=g, device=device, dtype=dtype), levels_of(case, device)
    wide = [{n: t.double() for n, t in level.items()} for level in levels]
    check = m.compare({"y": op(case, x, levels)}, {"y": stacked(levels, x)}, {"y": stacked(wide, x.double())})
    if not check["ok"]:
        return refused(check, "fp64")
    sets = m.sets_for(case.K * case.weights * case.itemsize, device)
    problems = [levels_of(case, device, seed) for seed in range(sets)]
    flops = 2 * case.B * case.C * case.K * case.weights
    moved = (2 * case.B * case.C * case.d + case.K * case.weights * (case.B if case.rows == "own" else 1)) * case.itemsize
    record = m.time_calls([partial(op, case, x, levels) for levels in problems], device, seconds) | {"check": check, "sets": sets}
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
    return judged(record, ceilings, case, device, quick, flops, moved)


# -- refresh ------------------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """One matrix, B rows: weight, moment (momentum), total (muon: the gradient of earlier segments, here 0) [B, r, c] fp32; left [B, C, r],
    right [B, C, c] and copy (the weight, if they are not fp32) in the case's dtype."""

    weight: Tensor
    left: Tensor
    right: Tensor
    moment: Tensor | None
    total: Tensor | None
    copy: Tensor | None


def refresh_matrix_(case: Case, given: Given) -> None:
    """The call under test, in place."""
    cms_refresh_(case.config, 0, *given[:3], moment=given.moment, total=given.total, copy=given.copy)


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


def refresh_work(case: Case) -> tuple[float, float]:
    """(FLOPs, bytes) of the refresh of one level, all rows."""
    d, N = case.d, 4 * case.d
    flops = 2 * case.weights * case.C
    if case.optimizer == "muon":
        flops += 2 * 5 * (4 * d * d * N + 2 * d**3)
    per_weight = {"gd": 8, "momentum": 16, "muon": 8}[case.optimizer] + (2 if case.dtype != "fp32" else 0)
    return case.B * flops, case.B * (case.weights * per_weight + 2 * (d + N) * case.C * case.itemsize)


@torch.no_grad()
def refresh(case: Case, device: str, ceilings: dict, seconds: float, quick: bool, op: Callable = refresh_matrix_) -> dict:
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
    return judged(record, ceilings, case, device, quick, flops, nbytes)


def one_segment(layer: ContinuumMemory, state, x: Tensor, error: Tensor) -> tuple[Tensor, object]:
    """The calls under test: y [B, C, d] and the state that has learned from the segment, in place."""
    y, state = layer(x, state)
    return y, layer.refresh(state, error)


def learner(case: Case, device: str) -> tuple[ContinuumMemory, Tensor, Tensor]:
    """(layer, x, error): a level of period C at a small rate, one segment of it."""
    torch.manual_seed(0)
    kw = {"device": device, "dtype": m.DTYPES[case.dtype]}
    config = case.config.replace(lr=0.03 if case.optimizer == "muon" else 0.05 / case.C)
    return ContinuumMemory(config, **kw), torch.randn(case.B, case.C, case.d, **kw), torch.randn(case.B, case.C, case.d, **kw)


@torch.no_grad()
def segment(case: Case, device: str, ceilings: dict, seconds: float, quick: bool) -> dict:
    """Counted: two products forward, dL/dhidden, two gradients (10 d N a token; dL/dx is nobody's here), and the rest of the refresh."""
    layer, x, error = learner(case, device)

    def twice(layer: ContinuumMemory, x: Tensor, error: Tensor) -> dict[str, Tensor]:
        _, state = one_segment(layer, layer.init_state(case.B), x, error)
        return {"y": layer(x, state)[0]}

    exact = twice(copy.deepcopy(layer).double(), x.double(), error.double())
    check = m.compare(twice(layer, x, error), by_hand(layer, x, error), exact)
    if not check["ok"]:
        return refused(check, "fp64")
    flops, nbytes = refresh_work(case)
    flops += 2 * case.B * case.C * case.weights * 3 / 2
    states = [layer.init_state(case.B) for _ in range(m.sets_for(nbytes, device))]
    # errors of either sign in turn: else the weights would grow without end
    calls = [partial(one_segment, layer, state, x, sign * error) for sign in (1, -1) for state in states]
    record = m.time_calls(calls, device, seconds) | {"check": check, "sets": len(states)}
    record["tokens/s"] = 1e3 * case.B * case.C / record["ms"]["median"]
    return judged(record, ceilings, case, device, quick, flops, nbytes)


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
                y, state = one_segment(layer, state, x, (-1) ** i * error)
            return y, state

    def outputs(layer: ContinuumMemory, x: Tensor, error: Tensor, slots: int) -> dict[str, Tensor]:
        return {"y": through(layer, layer.init_state(case.B), x, error, slots)[0]}

    exact = outputs(copy.deepcopy(layer).double(), x.double(), error.double(), 0)
    check = m.compare(outputs(layer, x, error, case.T), outputs(layer, x, error, 0), exact)
    if not check["ok"]:
        return refused(check, "fp64")
    states = {slots: layer.init_state(case.B) for slots in (case.T, 0)}
    calls = {str(slots): partial(through, layer, state, x, error, slots) for slots, state in states.items()}
    turns(calls, device, 0)
    found = turns(calls, device, seconds, most=50)
    rate = {slots: 1e3 * segments * case.B * case.C / ms["median"] for slots, ms in found.items()}
    return {"check": check, "segments": segments, "ms": found[str(case.T)], "at_once_ms": found["0"], "tokens/s": rate[str(case.T)],
            "at_once_tokens/s": rate["0"], "of_at_once": rate[str(case.T)] / rate["0"]}


def by_hand(layer: ContinuumMemory, x: Tensor, error: Tensor) -> dict[str, Tensor]:
    """The peer of ``segment``: torch modules, autograd and the written equations, in the layer's dtype, row by row."""
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


# -- models -------------------------------------------------------------------------------------------------------------------


def model_of(case: Case, device: str) -> HopeForCausalLM:
    """"kjv-byte", or "heavy": two blocks of width 256 with three levels each and random weights."""
    if case.model != "heavy":
        return HopeForCausalLM.from_pretrained(case.model, device=device, dtype=m.DTYPES[case.dtype])
    torch.manual_seed(0)
    config = HopeConfig(256, 256, 2, titans=TitansConfig(256, 4), cms=CMSConfig(256, (64, 256, 1024)))
    return HopeForCausalLM(config, device=device, dtype=m.DTYPES[case.dtype]).eval()


def prose(case: Case, T: int, device: str) -> Tensor:
    """[B, T] bytes of the bundled text, from a different place in every row, repeated where it ends."""
    data = torch.tensor(list(studies.text(studies.KJV)), device=device)
    at = torch.arange(T, device=device) + len(data) // case.B * torch.arange(case.B, device=device)[:, None]
    return data[at % len(data)]


def checked(model: HopeForCausalLM, ids: Tensor, backend: str | None) -> dict:
    """Logits of two segments and a bit, read with learning, against the fp64 model; the peer is the chunked backend in the same dtype."""
    piece = ids[:2, : 2 * model.segment + 5]
    wide = copy.deepcopy(model).double()
    logits = lambda net, backend: {"logits": net(piece, learn="next_token", backend=backend)[0]}
    return m.compare(logits(model, backend), logits(model, "chunked"), logits(wide, "chunked"))


@torch.no_grad()
def prefill(case: Case, device: str, ceilings: dict, seconds: float, quick: bool) -> dict:
    model = model_of(case, device)
    ids = prose(case, case.T, device)
    check = checked(model, ids, case.backend)
    if not check["ok"]:
        return refused(check, "the fp64 model")
    calls = {learn: partial(read, model, ids, learn=learn, backend=case.backend, check_finite=False) for learn in ("off", "next_token")}
    for learn in calls:
        read(model, ids[:, : 4 * model.segment], learn=learn, backend=case.backend)
    found = turns(calls, device, 10 * seconds)
    rate = {learn: 1e3 * case.B * case.T / ms["median"] for learn, ms in found.items()}
    return {"check": check, "ms": found["next_token"], "off_ms": found["off"], "tokens/s": rate["next_token"],
            "off_tokens/s": rate["off"], "on_per_off": rate["next_token"] / rate["off"],
            "parameters": sum(p.numel() for p in model.parameters())}


def held_bytes(cms, level: int, K: int) -> int:
    """Bytes that a CMSState holds for one level, whatever its fields are called."""
    parts = [value[level] for _, value in cms._fields() if isinstance(value, list) and len(value) == K and isinstance(value[level], dict)]
    return sum(t.numel() * t.element_size() for part in parts for t in part.values())


def level_bytes(c: CMSConfig, level: int, itemsize: int = 4) -> dict[str, int]:
    """What one level of one row needs: fp32 weights, a copy where the model computes in 16 bits, the gradients of earlier segments above
    the first level (muon: at all levels, it needs the whole gradient), momentum."""
    n = (3 if c.mlp == "swiglu" else 2) * c.d_model * c.hidden
    waits = c.chunks[level] > c.chunks[0] or c.optimizer == "muon"
    needed = {"weights": 4 * n, "copy": itemsize * n if itemsize < 4 else 0, "gradients": 4 * n if waits else 0,
              "momentum": 4 * n if c.optimizer == "momentum" else 0}
    return needed | {"total": sum(needed.values())}


@torch.no_grad()
def state(case: Case, device: str, ceilings: dict, seconds: float, quick: bool) -> dict:
    """Read until every level has been refreshed and each one above the first has gradients waiting. Nothing is timed."""
    model = model_of(case, device)
    configs = model.config.block_cms
    tokens = max(c.chunks[-1] for c in configs) + model.segment + 1
    fresh = model.init_state(case.B).nbytes()
    found = read(model, prose(case, tokens, device), learn="next_token", check_finite=False).state
    levels = []
    for l in range(max(c.num_levels for c in configs)):
        blocks = [(c, s) for c, s in zip(configs, found.cms) if l < c.num_levels]
        levels.append({
            "level": l + 1, "period": blocks[0][0].chunks[l], "formula": sum(level_bytes(c, l, case.itemsize)["total"] for c, _ in blocks),
            "formula_parts": level_bytes(blocks[0][0], l, case.itemsize),
            "measured": sum(held_bytes(s, l, c.num_levels) for c, s in blocks) / case.B,
            "layer_says": sum(sum(b.cms.state_bytes(1)[l].values()) for b in model.blocks)})
    return {"tokens": tokens, "blocks": len(configs), "levels": levels, "state_bytes_per_row": found.nbytes() / case.B,
            "fresh_bytes_per_row": fresh / case.B, "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters())}


def decode(model: HopeForCausalLM, given, ids: Tensor, device: str, backend: str | None) -> dict:
    """ms of a token over two segments of ids [B, n], from a clone of a state, learning on."""
    state, ms = given.clone(), []

    def one(t: int) -> None:
        nonlocal state
        state = model(ids[:, t : t + 1], state, learn="next_token", backend=backend)[1]
        m.sync(device)

    for t in range(ids.shape[1]):
        ms.append(m.host_ms(partial(one, t)))
    return {"p50": m.quantile(ms, 0.5), "p99": m.quantile(ms, 0.99), "mean": statistics.fmean(ms), "n": len(ms)}


@torch.no_grad()
def long(case: Case, device: str, ceilings: dict, seconds: float, quick: bool, limit: float = math.inf) -> dict:
    """``T`` tokens a row in ten parts; it ends early where ``limit`` seconds are over, and says so."""
    model = model_of(case, device)
    after = 2 * model.segment
    ids = prose(case, case.T + after, device)
    check = checked(model, ids, case.backend)
    if not check["ok"]:
        return refused(check, "the fp64 model")
    state, last, parts, early, at = model.init_state(case.B), None, [], None, 0
    began = time.perf_counter()
    over = lambda: at > 0 and time.perf_counter() - began > limit
    with PeakMemory(device) as peak:
        for mark in (min(1000, case.T // 10), *(case.T * i // 10 for i in range(1, 11))):
            start, first, nats = time.perf_counter(), at, 0.0
            while at < mark and not over():
                span = ids[:, at : min(mark, at + SPAN)]
                got = read(model, span, state, learn="next_token", last=last, backend=case.backend, check_finite=False)
                state, last, at, nats = got.state, got.logits, at + span.shape[1], nats + float(got.nats.mean())
            m.sync(device)
            if at > first:
                parts.append({"tokens": at, "tokens/s": case.B * (at - first) / (time.perf_counter() - start),
                              "peak_mib": round(peak.take() / 2**20, 1), "state_mib": round(state.nbytes() / 2**20, 3),
                              "bits_per_byte": nats / math.log(2) / (at - max(first, 1))})
            if early is None:
                early = {"after": at} | decode(model, state, ids[:, at : at + after], device, case.backend)
                peak.take()
    late = {"after": at} | decode(model, state, ids[:, at : at + after], device, case.backend)
    whole = parts[1:] or parts  # the first one warms up
    return {"check": check, "tokens": at, "complete": at == case.T, "parts": parts, "decode_ms": [early, late],
            "decode_late_per_early": late["p50"] / early["p50"], "tokens/s": statistics.median(part["tokens/s"] for part in whole),
            "peak_mib_first": whole[0]["peak_mib"], "peak_mib_last": whole[-1]["peak_mib"]}


KINDS = {"forward": forward, "refresh": refresh, "segment": segment, "pending": pending, "prefill": prefill, "state": state, "long": long}
FIRST = 5  # of the GPU's cases, before everything else of its kind


def cases(device: str, quick: bool) -> tuple[Case, ...]:
    return (QUICK_GPU if quick else GPU_CASES) if device == "cuda" else QUICK_CPU if quick else CPU_CASES


def items(device: str, quick: bool, limit: float = math.inf) -> Iterator[tuple[str, dict, Callable]]:
    """(name, the case as data, call with (ceilings)), most important first. limit: seconds after which the long run stops."""
    for case in cases(device, quick):
        more = {"limit": limit} if case.kind == "long" else {}
        yield case.name, asdict(case), partial(KINDS[case.kind], case, device, seconds=0.05 if quick else 1.0, quick=quick, **more)


# -- alone --------------------------------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """Markdown of the cases of a result file."""
    found = {name: r for name, r in result["cases"].items() if r.get("status") == "ok" and r.get("case", {}).get("kind")}
    of = lambda kind: [(r["case"], r) for r in found.values() if r["case"]["kind"] == kind]
    share = lambda x: "" if x is None else f"{x:.0%}"
    rows: list[str] = []

    def section(title: str, head: str, lines: list[str]) -> None:
        if lines:
            rows.extend(["", f"**{title}**", "", f"| {head} |", "|---" * (head.count("|") + 1) + "|", *lines])

    section("Reading, against a torch module of equal weights", "d | levels | weights | tokens | ms | of the module's rate | compiled", [
        f"| {c['d']} | {c['K']} | {c['rows']} | {c['B']} x {c['C']} | {r['ms']['median']:.2f} | {r['of_module']:.2f} | "
        f"{f'{of_c:.2f}' if (of_c := r.get('of_compiled')) else ''} |" for c, r in of("forward")])
    for kind, title in (("refresh", "Refresh of one level"), ("segment", "A segment through one level: read, errors, refresh")):
        section(title, "optimizer | d | C | rows | ms | GB/s | of the copy rate | TFLOP/s | of the GEMM rate", [
            f"| {c['optimizer']} | {c['d']} | {c['C']} | {c['B']} | {r['ms']['median']:.3f} | {r['GB/s']:.1f} | {share(r['of_copy'])} | "
            f"{r['TFLOP/s']:.3f} | {share(r['of_matmul'])} |" for c, r in of(kind)])
    section("Refreshes kept as factors, then folded", "d | C | rows | slots | tokens/s | folded at once | ratio", [
        f"| {c['d']} | {c['C']} | {c['B']} | {c['T']} | {r['tokens/s']:.0f} | {r['at_once_tokens/s']:.0f} | {r['of_at_once']:.2f} |"
        for c, r in of("pending")])
    section("Models", "model | rows | tokens | learning off, tokens/s | on | on / off", [
        f"| {c['model']} | {c['B']} | {c['T']} | {r['off_tokens/s']:.0f} | {r['tokens/s']:.0f} | {r['on_per_off']:.2f} |"
        for c, r in of("prefill")])
    section("State of one row", "model | level | period | needed, KiB | held, KiB", [
        f"| {c['model']} | {v['level']} | {v['period']} | {v['formula'] / 1024:.0f} | {v['measured'] / 1024:.0f} |"
        for c, r in of("state") for v in r["levels"]])
    for c, r in of("long"):
        early, late = r["decode_ms"]
        rows += ["", f"{c['model']}, {r['tokens']} tokens with learning: {r['tokens/s']:.0f} tokens/s; peak memory "
                 f"{r['peak_mib_first']:.0f} MiB in the first tenth, {r['peak_mib_last']:.0f} in the last; a decoded token "
                 f"{early['p50']:.2f} ms after {early['after']} tokens, {late['p50']:.2f} ms after {late['after']} (medians)."]
    return "\n".join(rows).strip()


def main(argv: list[str] | None = None) -> int:
    from . import gpu

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
    store = gpu.Results(Path(args.out), gpu.stamp(args.quick))
    until = time.time() + 60 * args.minutes
    plan = [("env", "machine", {}, lambda _: gpu.describe(device))]
    for name in gpu.ceilings_of(device):
        plan.append(("env", name, {}, lambda _, name=name: m.ceiling(name, device, args.quick)))
    plan += [("cms", *item) for item in items(device, args.quick)]
    status = gpu.measure(device, {"env": store, "cms": store}, args, until, plan)
    print(table(store.data))
    return status


if __name__ == "__main__":
    sys.exit(main())
