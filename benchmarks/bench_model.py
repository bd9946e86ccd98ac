"""Whole models on one device: reading with learning off and on, decoding, bytes of state, a long run. Run by
benchmarks.gpu.

    prefill  tokens/s with learning off and on, peak memory
    decode   ms of a token after ``T`` tokens, with learning off and on; on a GPU with the step in a CUDA graph,
             and without beside it
    state    bytes a row holds per level, by formula and as they are
    long     a long text read with learning: speed and peak memory of every tenth, a decoded token after 1000
             tokens and after all

"hope-byte" is the bundled model. "heavy" and "1.3B" have random weights: two blocks of width 256 with three
levels each, and 14 blocks of width 2048 with two levels of 33.5 M weights each. Before a case is timed,
logits read with learning are compared with the fp64 model (``measure.compare``); of "1.3B" the check takes
two blocks. FLOPs count reading without learning; a decoded token must read the weights and the memories once.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import measure as m
from benchmarks import studies
from hope_kernels import CMSConfig, Decoder, HopeConfig, HopeForCausalLM, TitansConfig
from hope_kernels.cli.meter import PeakMemory
from hope_kernels.engine.generation import read
from hope_kernels.ops.titans.backends import DEVICE_DECIDES, resolve

SPAN = 16384  # tokens between two looks at the clock
BLOCKS = 14  # of "1.3B"
LEARN = ("off", "next_token")


@dataclass(frozen=True)
class Case:
    """B rows of T tokens of the bundled text, read by a model (a name, or a folder). backend None: the
    default of the device."""

    kind: str
    model: str
    B: int = 1
    T: int = 0
    dtype: str = "fp32"
    backend: str | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.model} B{self.B} T{self.T} {self.dtype} {self.backend or 'default'}"

    @property
    def itemsize(self) -> int:
        return m.DTYPES[self.dtype].itemsize


def K(kind: str, T: int = 0, **more) -> Case:
    return Case(kind, "hope-byte", T=T, **more)


def H(kind: str, T: int = 0, **more) -> Case:
    return Case(kind, "heavy", T=T, **more)


def G(kind: str, T: int, backend: str = "triton", **more) -> Case:
    return Case(kind, "1.3B", T=T, dtype="bf16", backend=backend, **more)


FIRST = 3  # of the GPU's cases, before everything else of its kind
GPU_CASES = (
    G("prefill", 8192), K("prefill", 8192, backend="triton"), K("decode", 1000, backend="triton"),
    G("decode", 1000), K("long", 1_000_000, backend="triton"), G("long", 1_000_000), G("decode", 32768),
    K("decode", 100_000, backend="triton"),
    G("prefill", 8192, "cuda"), G("decode", 1000, "cuda"), K("prefill", 8192), H("prefill", 8192),
    K("prefill", 8192, B=8),
    H("prefill", 8192, B=8), H("state"), G("prefill", 8192, B=4), K("long", 10_000_000, backend="triton"),
)
QUICK_GPU = (K("prefill", 256, backend="triton"), K("decode", 100, backend="triton"), K("state"), K("long", 2000))
SUITE_CPU = (
    K("prefill", 1024, backend="cpp"), K("decode", 1000, backend="cpp"), K("prefill", 512, backend="chunked"),
    H("prefill", 512),
    K("state"), H("state"), K("long", 8192), K("decode", 4000, backend="cpp"), K("decode", 200, backend="chunked"),
)
CPU_CASES = (K("prefill", 4096), H("prefill", 4096), K("prefill", 4096, B=4), K("decode", 1000),
             K("decode", 16384), K("state"), H("state"),
             K("long", 200_000))
QUICK_CPU = (K("prefill", 192), K("decode", 70), K("state"), K("long", 1280))


def refused(check: dict, what: str = "the fp64 model") -> dict:
    return {"status": "refused", "reason": f"{check.get('tensor', 'it')} differs from {what}", "check": check}


def random_config(name: str) -> HopeConfig | None:
    """Of the models with random weights."""
    if name == "heavy":
        return HopeConfig(256, 256, 2, titans=TitansConfig(256, 4), cms=CMSConfig(256, (64, 256, 1024)))
    if name == "1.3B":
        cms = CMSConfig(2048, (512, 4096), lr=(1e-4, 1e-5))
        return HopeConfig(
            32000, 2048, BLOCKS, titans=TitansConfig(2048, 32, 4, chunk_memory=64, chunk_other=64), cms=cms
        )
    return None


def model_of(case: Case, device: str, blocks: int | None = None) -> HopeForCausalLM:
    """The case's model, or its first ``blocks`` blocks where its weights are random."""
    config = random_config(case.model)
    if config is None:
        return HopeForCausalLM.from_pretrained(case.model, device=device, dtype=m.DTYPES[case.dtype])
    torch.manual_seed(0)
    config = config if blocks is None else config.replace(num_layers=blocks)
    return HopeForCausalLM(config, device=device, dtype=m.DTYPES[case.dtype]).eval()


def prose(case: Case, T: int, device: str) -> Tensor:
    """[B, T] bytes of the bundled text, from a different place in every row, repeated where it ends."""
    data = torch.tensor(list(studies.text(studies.KJV)), device=device)
    at = torch.arange(T, device=device) + len(data) // case.B * torch.arange(case.B, device=device)[:, None]
    return data[at % len(data)]


def whole(model: HopeForCausalLM, ids: Tensor, backend: str | None) -> Tensor:
    """Logits [B, T, vocab] of one call that learns: the call under test."""
    return model(ids, learn="next_token", backend=backend)[0]


def stepwise(model: HopeForCausalLM, ids: Tensor, backend: str | None) -> Tensor:
    """The same from a ``Decoder``, token by token."""
    decoder = Decoder(model, model.init_state(ids.shape[0]), "next_token", backend)
    return torch.cat([decoder.step(ids[:, t : t + 1]).clone() for t in range(ids.shape[1])], 1)


def checked(model: HopeForCausalLM, case: Case, ids: Tensor, op: Callable = whole) -> dict:
    """Logits of a little more than two segments, read with learning, against the fp64 model; the peer is the chunked
    backend in the same dtype."""
    net = model_of(case, str(ids.device), blocks=2) if case.model == "1.3B" else model
    piece = ids[:2, : 2 * net.segment + 5]
    wide = copy.deepcopy(net).double()
    return m.compare(*({"logits": f(given, piece, backend)} for f, given, backend in
                       ((op, net, case.backend), (whole, net, "chunked"), (whole, wide, "chunked"))))


def flops_per_token(model: HopeForCausalLM) -> float:
    """Of reading without learning: memories, projections, convolutions, CMS levels, head."""
    c, gains = model.config, ("embed.weight", "norm_gain")
    static = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not n.endswith(gains))
    static += c.vocab_size * c.d_model if c.tie_embeddings else 0
    return 2 * static + (c.num_layers * m.flops_per_token(c.titans) if c.titans else 0)


def weight_bytes(model: HopeForCausalLM) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@torch.no_grad()
def prefill(case: Case, device: str, ceilings: dict, seconds: float, quick: bool) -> dict:
    model = model_of(case, device)
    ids = prose(case, case.T, device)
    check = checked(model, case, prose(case, 2 * model.segment + 5, device))
    if not check["ok"]:
        return refused(check)
    calls = {
        learn: partial(read, model, ids, learn=learn, backend=case.backend, check_finite=False) for learn in LEARN
    }
    for learn in calls:
        read(model, ids[:, : 4 * model.segment], learn=learn, backend=case.backend, check_finite=False)
    peaks, state = {}, 0
    with PeakMemory(device) as peak:
        for learn, call in calls.items():
            peak.take()
            state = call().state.nbytes()
            m.sync(device)
            peaks[learn] = peak.take()
    found = m.turns(calls, device, 10 * seconds, least=2 if device == "cpu" else 3)
    rate = {learn: 1e3 * case.B * case.T / ms["median"] for learn, ms in found.items()}
    flops, nbytes = case.B * case.T * flops_per_token(model), weight_bytes(model)
    return {"check": check, "ms": found["next_token"], "tokens/s": rate["next_token"], "off_tokens/s": rate["off"],
            "on_per_off": rate["next_token"] / rate["off"],
            "off": m.rates({"ms": found["off"]}, ceilings, case.dtype, flops, nbytes),
            "parameters": sum(p.numel() for p in model.parameters()), "state_bytes_per_row": state / case.B,
            "peak_mib": {learn: round(n / 2**20, 1) for learn, n in peaks.items()}}


@torch.no_grad()
def decode(case: Case, device: str, ceilings: dict, seconds: float, quick: bool) -> dict:
    """At least one segment from the same state, learning off and on, after some tokens that warm up. ``ms``
    is learning on, in a graph where there is one."""
    model = model_of(case, device)
    check = checked(model, case, prose(case, 2 * model.segment + 5, device), stepwise)
    if not check["ok"]:
        return refused(check)
    warm, graph = min(model.segment, 64), device == "cuda" and case.backend in DEVICE_DECIDES
    ids = prose(case, case.T + warm + max(model.segment, 128), device)
    given = read(model, ids[:, : case.T], learn="next_token", backend=case.backend, check_finite=False).state
    record: dict = {"check": check, "context": case.T, "captured": graph}
    nbytes = weight_bytes(model) + sum(mixer.nbytes() for mixer in given.mixers)
    with PeakMemory(device) as peak:
        for learn in LEARN:
            for capture in (graph, False) if graph else (False,):
                decoder = Decoder(model, given.clone(), learn, case.backend, capture=capture)
                ms = decoded(decoder, ids[:, case.T :], device)[warm:]
                timed = {
                    "ms": m.stats(ms), "p50": m.quantile(ms, 0.5), "p99": m.quantile(ms, 0.99),
                    "mean": statistics.fmean(ms)
                }
                timed = m.rates(timed, ceilings, case.dtype, None, nbytes) | {"captures": decoder.captures}
                record[learn if capture == graph else f"{learn} without a graph"] = timed
        record["peak_mib"] = round(peak.take() / 2**20, 1)
    on, off = record["next_token"], record["off"]
    return record | {"ms": on["ms"], "tokens/s": 1e3 * case.B / on["mean"],
                     "off_tokens/s": 1e3 * case.B / off["mean"],
                     "on_per_off": off["mean"] / on["mean"], "state_bytes_per_row": given.nbytes() / case.B}


def decoded(decoder: Decoder, ids: Tensor, device: str) -> list[float]:
    """ms of every token of ids [B, n], each waited for."""
    return [m.host_ms(lambda t=t: (decoder.step(ids[:, t : t + 1]), m.sync(device))) for t in range(ids.shape[1])]


def held_bytes(cms, level: int, K: int) -> int:
    """Bytes that a CMSState holds for one level, whatever its fields are called."""
    parts = [
        value[level] for _, value in cms._fields() if isinstance(value, list) and len(value) == K
        and isinstance(value[level], dict)
    ]
    return sum(t.numel() * t.element_size() for part in parts for t in part.values())


def level_bytes(c: CMSConfig, level: int, itemsize: int = 4) -> dict[str, int]:
    """What one level of one row needs: fp32 weights, a copy where the model computes in 16 bits, the
    gradients of earlier segments above the first level (muon: at all levels, it needs the whole gradient),
    momentum."""
    n = (3 if c.gated else 2) * c.d_model * c.hidden
    waits = c.chunks[level] > c.chunks[0] or c.optimizer == "muon"
    needed = {"weights": 4 * n, "copy": itemsize * n if itemsize < 4 else 0, "gradients": 4 * n if waits else 0,
              "momentum": 4 * n if c.optimizer == "momentum" else 0}
    return needed | {"total": sum(needed.values())}


@torch.no_grad()
def state(case: Case, device: str, ceilings: dict, seconds: float, quick: bool) -> dict:
    """Read until every level has been refreshed and each one above the first has gradients waiting. Nothing
    is timed."""
    model = model_of(case, device)
    configs = model.config.block_cms
    tokens = max(c.chunks[-1] for c in configs) + model.segment + 1
    fresh = model.init_state(case.B).nbytes()
    found = read(model, prose(case, tokens, device), learn="next_token", check_finite=False).state
    levels = []
    for l in range(max(c.num_levels for c in configs)):
        blocks = [(c, s) for c, s in zip(configs, found.cms) if l < c.num_levels]
        levels.append({
            "level": l + 1, "period": blocks[0][0].chunks[l],
            "formula": sum(level_bytes(c, l, case.itemsize)["total"] for c, _ in blocks),
            "formula_parts": level_bytes(blocks[0][0], l, case.itemsize),
            "measured": sum(held_bytes(s, l, c.num_levels) for c, s in blocks) / case.B,
            "layer_says": sum(sum(b.cms.state_bytes(1)[l].values()) for b in model.blocks)})
    return {"tokens": tokens, "blocks": len(configs), "levels": levels,
            "state_bytes_per_row": found.nbytes() / case.B,
            "fresh_bytes_per_row": fresh / case.B, "model_bytes": weight_bytes(model)}


def latency(model: HopeForCausalLM, given, ids: Tensor, device: str, backend: str | None) -> dict:
    """ms of a token over ids [B, n], from a clone of a state, learning on, without a graph."""
    ms = decoded(Decoder(model, given.clone(), "next_token", backend, capture=False), ids, device)
    return {"p50": m.quantile(ms, 0.5), "p99": m.quantile(ms, 0.99), "mean": statistics.fmean(ms), "n": len(ms)}


@torch.no_grad()
def long(case: Case, device: str, ceilings: dict, seconds: float, quick: bool, limit: float = math.inf) -> dict:
    """``T`` tokens a row in ten parts; it ends early where ``limit`` seconds are over, and says so."""
    model = model_of(case, device)
    after = min(2 * model.segment, 256)
    ids = prose(case, case.T + after, device)
    check = checked(model, case, ids)
    if not check["ok"]:
        return refused(check)
    state, last, parts, early, at = model.init_state(case.B), None, [], None, 0
    began = time.perf_counter()
    over = lambda: at > 0 and time.perf_counter() - began > limit
    with PeakMemory(device) as peak:
        for mark in (min(1000, case.T // 10), *(case.T * i // 10 for i in range(1, 11))):
            start, first, nats = time.perf_counter(), at, 0.0
            while at < mark and not over():
                span = ids[:, at : min(mark, at + SPAN)]
                got = read(
                    model, span, state, learn="next_token", last=last, backend=case.backend, check_finite=False
                )
                state, last, at, nats = got.state, got.logits, at + span.shape[1], nats + float(got.nats.mean())
            m.sync(device)
            if at > first:
                spent = time.perf_counter() - start
                parts.append({"tokens": at, "seconds": spent, "tokens/s": case.B * (at - first) / spent,
                              "peak_mib": round(peak.take() / 2**20, 1),
                              "state_mib": round(state.nbytes() / 2**20, 3),
                              "bits_per_byte": nats / math.log(2) / (at - max(first, 1))})
            if early is None:
                early = {"after": at} | latency(model, state, ids[:, at : at + after], device, case.backend)
                peak.take()
    late = {"after": at} | latency(model, state, ids[:, at : at + after], device, case.backend)
    warm = parts[1:] or parts
    complete = at == case.T
    return {"check": check, "tokens": at, "complete": complete,
            "read_seconds": sum(p["seconds"] for p in parts) if complete else None,
            "parts": parts, "decode_ms": [early, late], "decode_late_per_early": late["p50"] / early["p50"],
            "tokens/s": statistics.median(part["tokens/s"] for part in warm),
            "peak_mib_first": warm[0]["peak_mib"], "peak_mib_last": warm[-1]["peak_mib"]}


KINDS = {"prefill": prefill, "decode": decode, "state": state, "long": long}


def measured(case: Case, device: str, ceilings: dict, **options) -> dict:
    """The case's record. Raises Unserved, with the reason, where its backend does not serve it here."""
    config = random_config(case.model) or model_of(case, device).config
    try:
        with torch.no_grad():
            resolve(config.titans, m.DTYPES[case.dtype], torch.device(device), case.backend)
    except ValueError as e:
        raise m.Unserved(str(e)) from None
    return KINDS[case.kind](case, device, ceilings, **options)


def cases(device: str, quick: bool, full: bool = False) -> tuple[Case, ...]:
    if device == "cuda":
        return QUICK_GPU if quick else GPU_CASES
    return QUICK_CPU if quick else CPU_CASES if full else SUITE_CPU


def items(
    device: str, quick: bool, full: bool = False, limit: float = math.inf
) -> Iterator[tuple[str, dict, Callable]]:
    """(name, the case as data, call with (ceilings)), most important first. full: longer texts on a CPU;
    limit: seconds after which the long run stops."""
    for case in cases(device, quick, full):
        more = {"limit": limit} if case.kind == "long" else {}
        yield case.name, asdict(case), partial(
            measured, case, device, seconds=m.seconds(device, quick), quick=quick, **more
        )
