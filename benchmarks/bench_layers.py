"""Layers on one device: SelfModifyingTitans, CausalAttention, and blocks of either mixer with a CMS. Run by
benchmarks.gpu.

    layer            T tokens through a Titans layer with convolution, projections and output gate
    layer step       one token at a time through it; commits (every C tokens) apart
    attention        T tokens through CausalAttention, beside torch's scaled_dot_product_attention alone on
                     tensors of the same shape
    attention step   one token more after T tokens
    block titans, block attention, block ... step
                     norm, mixer and two CMS levels, as models read them with learning off
    fla layer        GatedDeltaNet of flash-linear-attention at equal width and heads, another function: speed only

A ContinuumMemory layer, reading and refreshing, is "segment" of bench_cms. Checks are those of
``measure.verified``: a piece of each call against the fp64 layer, the whole call complete, repeatable and in
agreement with the piece. FLOPs are those of memories, projections, attention (causal pairs only) and levels;
bytes: parameters and x read, y written, fast weights read and written, keys and values written (or read,
decoding).
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import bench_titans
from benchmarks import measure as m
from benchmarks.peers import attended, installed, sdpa_backend
from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, SelfModifyingTitans
from hope_kernels.layers.attention import CausalAttention
from hope_kernels.ops.titans.backends import resolve

LEVELS = 2  # of a block's CMS: periods 512 and 4096, 4 d hidden units
SKIP = ("pos", "count")  # fields of a state that are not results


@dataclass(frozen=True)
class Case(bench_titans.Case):
    """B rows of T tokens; H heads of width D, N hidden units, chunks of C tokens. Attention has neither N nor
    C nor backends."""

    kind: str = "layer"
    backend: str | None = "triton"

    @property
    def name(self) -> str:
        memory = "" if "attention" in self.kind else f"C{self.C} "
        hidden = "" if "attention" in self.kind else f"N{self.N} "
        shape = f"{memory}D{self.D} {hidden}H{self.H} B{self.B} T{self.T}"
        return f"{self.kind} {shape} {self.dtype} {self.backend or self.theirs}"

    @property
    def theirs(self) -> str:
        """The library that computes a case for which there is no backend to choose."""
        return "fla" if self.kind.startswith("fla") else "torch"

    @property
    def width(self) -> int:
        return self.H * self.D

    @property
    def titans(self):
        return replace(self.config, conv_window=4)

    @property
    def model(self) -> HopeConfig:
        """A model of one block, for its block."""
        mixer = {"num_heads": self.H, "mixer": "attention"} if "attention" in self.kind else {"titans": self.titans}
        return HopeConfig(
            8, self.width, 1, cms=CMSConfig(self.width, (512, 4096)) if "block" in self.kind else None, **mixer
        )


L, A = partial(Case, "layer"), partial(Case, "attention", backend=None)
B = partial(Case, "block titans")
LX, BX = partial(L, backend="cuda"), partial(B, backend="cuda")
FIRST = 5  # of the GPU's cases, before the sweeps
GPU_CASES = (
    L(), LX(), Case("fla layer", backend=None), A(T=8192), Case("layer step", T=1),
    Case("layer step", T=1, backend="cuda"), Case("attention step", T=32768, backend=None), B(T=8192), BX(T=8192),
    Case("block attention", T=8192, backend=None), L(N=64, B=4, T=8192), LX(N=64, B=4, T=8192),
    L(C=16, N=64, B=4, T=8192),
    LX(C=16, N=64, B=4, T=8192), Case("fla layer", N=64, B=4, T=8192, backend=None), A(T=32768), A(B=4, T=8192),
    Case("attention step", T=1024, backend=None), Case("block titans step", T=1),
    Case("block attention step", T=8192, backend=None), L(T=2048), LX(T=2048), L(H=8), LX(H=8),
    L(T=8192, backend="chunked"), Case("layer step", B=32, T=1),
)
QUICK_GPU = (L(H=8, T=512), LX(H=8, T=512), A(H=8, T=512), Case("layer step", H=8, T=1), B(H=8, T=512))
SMALL = {"N": 64, "H": 4, "dtype": "fp32"}


def _on_cpu(T: int, size: dict) -> tuple[Case, ...]:
    def both(kind: str, T: int, **more) -> list[Case]:
        return [Case(kind, T=T, backend=b, **size | more) for b in ("cpp", "chunked")]

    torch_only = [
        Case(f"{mixer}{step}", T=T, backend=None, **size) for mixer in ("attention", "block attention")
        for step in ("", " step")
    ]
    return (*both("layer", T), *both("layer", T, C=16), *both("layer step", 1, C=16), *torch_only,
            *both("block titans", T),
            *both("block titans step", 1, C=16))


CPU_CASES = _on_cpu(256, SMALL)
QUICK_CPU = _on_cpu(40, SMALL | {"D": 16, "N": 16, "H": 2, "C": 32})


class Block(nn.Module):
    """The block of a model, called like its mixer: ``block(x, state, backend=...)`` returns (y, state). Its
    CMS does not learn."""

    def __init__(self, config: HopeConfig, **kw):
        super().__init__()
        self.net = HopeForCausalLM(config, **kw)
        self.mixer = self.net.blocks[0].mixer

    def init_state(self, batch: int):
        return self.mixer.init_state(batch)

    def forward(self, x: Tensor, state, backend: str | None = None):
        block = self.net.blocks[0]
        y, new = block(x, state, block.cms.init_state(x.shape[0]), [x.shape[1]] * x.shape[0], backend)
        return y, state.assign(new)


def module_of(case: Case, device: str) -> nn.Module:
    """With random weights, the same for every backend."""
    torch.manual_seed(0)
    kw = {"device": device, "dtype": m.DTYPES[case.dtype]}
    if "block" in case.kind:
        return Block(case.model, **kw).requires_grad_(False)
    layer = (
        CausalAttention(case.model, **kw) if "attention" in case.kind else SelfModifyingTitans(case.titans, **kw)
    )
    return layer.requires_grad_(False)


def inputs_of(case: Case, T: int, device: str, seed: int) -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(case.B, T, case.width, generator=g, device=device, dtype=m.DTYPES[case.dtype])


def read(module: nn.Module, x: Tensor, backend: str | None) -> dict[str, Tensor]:
    """The call under test: output and state of sequences that begin with x [B, T, d]."""
    y, state = module(x, module.init_state(x.shape[0]), backend=backend)
    return {"o": y} | tensors_of(state)


def stepwise(module: nn.Module, x: Tensor, backend: str | None) -> dict[str, Tensor]:
    """The same token by token."""
    state, outputs = module.init_state(x.shape[0]), []
    for t in range(x.shape[1]):
        y, state = module(x[:, t : t + 1], state, backend=backend)
        outputs.append(y)
    return {"o": torch.cat(outputs, 1)} | tensors_of(state)


def tensors_of(state) -> dict[str, Tensor]:
    """Floating tensors of a state by name; of a cache, the slots that count."""
    found = {
        n: t for n, t in vars(state.compact() if hasattr(state, "compact") else state).items()
        if isinstance(t, Tensor)
    }
    return {n: t for n, t in found.items() if t.is_floating_point() and n not in SKIP}


def verified(case: Case, module: nn.Module, x: Tensor, op: Callable) -> dict:
    rows, tokens = min(2, case.B), min(x.shape[1], 2 * case.C + case.C // 2 + 1)
    piece, wide = x[:rows, :tokens], copy.deepcopy(module).double()
    plain = None if case.backend is None else "chunked"
    return m.verified(lambda: op(module, piece, case.backend), lambda: op(module, x, case.backend),
                      lambda o: o[:rows, :tokens],
                      read(module, piece, plain), read(wide, piece.double(), plain))


def static_weights(case: Case) -> int:
    """Numbers in the projections and CMS levels of one layer or block."""
    d = case.width
    return (
        (4 if "attention" in case.kind or case.H > 1 else 3) * d * d
        + (LEVELS * 8 * d * d if "block" in case.kind else 0)
    )


def flops_of(case: Case, tokens: int, before: int = 0) -> float:
    """Of ``tokens`` more tokens of one row after ``before``."""
    d, found = case.width, 2 * tokens * static_weights(case)
    if "attention" in case.kind:
        return found + 4 * d * (tokens * before + tokens * (tokens + 1) // 2)
    return found + tokens * (m.flops_per_token(case.titans) + 8 * d + 8 * d)  # convolution of window 4, output gate


def bytes_of(case: Case, module: nn.Module, tokens: int, before: int = 0) -> int:
    """Of the same call, all rows. Decoding a chunk's last token also writes the fast weights; that is left out."""
    d, weights = case.width, sum(p.numel() for n, p in module.named_parameters() if "embed" not in n)
    moved = (weights + 2 * case.B * tokens * d) * case.itemsize
    if "attention" in case.kind:
        return moved + 2 * case.B * (before + tokens) * d * case.itemsize
    return moved + case.B * case.H * m.weights_per_head(case.titans) * 4 * (1 if tokens == 1 else 2)


@torch.no_grad()
def prefill(case: Case, device: str, ceilings: dict, seconds: float, quick: bool, op: Callable = read) -> dict:
    module, nbytes = module_of(case, device), 2 * case.B * case.T * case.width * case.itemsize
    xs = [inputs_of(case, case.T, device, seed) for seed in range(m.sets_for(nbytes, device))]
    check = verified(case, module, xs[0], op)
    if not check["ok"]:
        return bench_titans.refused(check)
    record = m.time_calls(
        [partial(op, module, x, case.backend) for x in xs], device, seconds
    ) | {"check": check, "sets": len(xs)}
    record["tokens/s"] = 1e3 * case.B * case.T / record["ms"]["median"]
    if case.kind == "attention":
        record["sdpa"] = sdpa(case, device, seconds)
        record["of_sdpa"] = record["sdpa"]["ms"]["median"] / record["ms"]["median"]
    return m.rates(record, ceilings, case.dtype, case.B * flops_of(case, case.T), bytes_of(case, module, case.T))


def sdpa(case: Case, device: str, seconds: float) -> dict:
    """torch's attention alone, without projections and rotation."""
    q, k, v = (
        inputs_of(case, case.T, device, seed).unflatten(-1, (case.H, case.D)).transpose(1, 2) for seed in (1, 2, 3)
    )
    return m.time_calls([partial(attended, q, k, v)], device, seconds) | {"backend": sdpa_backend(q, k, v)}


@torch.no_grad()
def step(case: Case, device: str, ceilings: dict, seconds: float, quick: bool) -> dict:
    """Two chunks of tokens, those that close a chunk apart; attention: after T tokens."""
    module = module_of(case, device)
    attention = "attention" in case.kind
    check = verified(case, module, inputs_of(case, case.C + 3, device, 0), stepwise)
    if not check["ok"]:
        return bench_titans.refused(check)
    before = case.T if attention else 0
    state = module.init_state(case.B)
    if before:
        state = module(inputs_of(case, before, device, 1), state, backend=case.backend)[1]
    x, spans = inputs_of(case, 2 * case.C, device, 2), {False: [], True: []}
    for t in range(2 * case.C):
        one = x[:, t : t + 1]
        ms = m.host_ms(lambda one=one: (module(one, state, backend=case.backend), m.sync(device)))
        spans[not attention and (t + 1) % case.C == 0].append(ms)
    record: dict = {"check": check}
    for commit, key in ((False, "plain"), (True, "commit")):
        if spans[commit]:
            timed = {
                "ms": m.stats(spans[commit]), "p50": m.quantile(spans[commit], 0.5),
                "p99": m.quantile(spans[commit], 0.99)
            }
            record[key] = m.rates(timed, ceilings, case.dtype, None, bytes_of(case, module, 1, before))
    return record | {"ms": record["plain"]["ms"], "tokens/s": 1e3 * case.B / record["plain"]["ms"]["median"]}


@torch.no_grad()
def fla_layer(case: Case, device: str, ceilings: dict, seconds: float, quick: bool) -> dict:
    """FLA's layer has three convolutions, five projections and one matrix a head: H heads of width D, values
    as wide as keys."""
    found = installed("flash-linear-attention")
    torch.manual_seed(0)
    layer = importlib.import_module("fla.layers").GatedDeltaNet(
        hidden_size=case.width, num_heads=case.H, head_dim=case.D, expand_v=1, mode="chunk").to(device,
        m.DTYPES[case.dtype]).eval()
    xs = [
        inputs_of(case, case.T, device, seed)
        for seed in range(m.sets_for(2 * case.B * case.T * case.width * case.itemsize, device))
    ]
    if not m.complete(layer(xs[0])[0]):
        return bench_titans.refused({"reason": "outputs zero or not finite"})
    record = found | m.time_calls([partial(layer, x) for x in xs], device, seconds)
    return record | {
        "compared": "speed only: another function", "tokens/s": 1e3 * case.B * case.T / record["ms"]["median"]
    }


def measured(case: Case, device: str, ceilings: dict, **options) -> dict:
    """The case's record. Raises Unserved, with the reason, where its backend does not serve it here."""
    if case.kind == "fla layer":
        return fla_layer(case, device, ceilings, **options)
    if case.backend is not None:
        try:
            with torch.no_grad():
                resolve(case.titans, m.DTYPES[case.dtype], torch.device(device), case.backend)
        except ValueError as e:
            raise m.Unserved(str(e)) from None
    return (step if case.kind.endswith("step") else prefill)(case, device, ceilings, **options)


def cases(device: str, quick: bool) -> tuple[Case, ...]:
    return (QUICK_GPU if quick else GPU_CASES) if device == "cuda" else QUICK_CPU if quick else CPU_CASES


def items(device: str, quick: bool) -> Iterator[tuple[str, dict, Callable]]:
    """(name, the case as data, call with (ceilings)), most important first."""
    for case in cases(device, quick):
        yield case.name, asdict(case), partial(
            measured, case, device, seconds=m.seconds(device, quick), quick=quick
        )
