"""Other implementations on the same card in the same run, where they can be imported. Run by benchmarks.gpu.

    fla       chunk_gated_delta_rule at equal width (K = V = D): one matrix a head where ours are five memories,
              about 1/16 of the FLOPs at N = 256; whether FLA handed the call to FlashQLA is seen, not guessed
    sdpa      torch's causal attention at equal width, without projections; which of its backends served is recorded
    ttt       FLA's TTT-Linear at equal width, mini-batches of 16
    titans    NeuralMemory of titans-pytorch at equal width, chunk and hidden units; the projections, gates and
              norms of its own inputs included, another function: speed only
    compiled  our chunked backend as fast as it gets without kernels: torch.compile of one chunk, captured in a
              CUDA graph
    package   the token loop of nested-learning 0.2.0, same weights, outputs compared; ours beside it

Where a peer computes a function that is written down here, a piece of its result is compared with that in
fp64 ("error"). A peer that is not installed is recorded as skipped, one whose result is wrong as refused.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import bench_cpu
from benchmarks import measure as m
from benchmarks.bench_titans import STATE, Case, P, head, problem, refused, results, to
from hope_kernels import SelfModifyingTitans, TitansConfig, available_backends
from hope_kernels.ops import init_titans_state, titans_chunk

FLA_CASES = (P(), P(N=64, B=4, T=8192), P(D=128, N=128, H=16), P(N=64, B=32, T=2048))
COMPILED_CASES = (P(), P(C=16, N=64, B=4, T=8192), P(C=256), P(C=1024))
SDPA_CASES = (P(T=8192), P(), P(N=64, B=4, T=8192))
TTT_CASES = (P(C=16, N=64, B=4, T=8192), P(C=16))
TITANS_CASES = (P(N=64, B=4, T=8192), P(T=8192))
PACKAGE_SHAPES = ((64, 16), (64, 64), (128, 64))
ON_CPU = partial(P, N=64, H=2, T=256, dtype="fp32")
QUICK_CPU = partial(P, C=16, D=16, N=16, H=2, T=40, dtype="fp32")
TOLERANCE = {"bf16": 0.02, "fp16": 0.02, "fp32": 1e-4}  # rms of the error over rms of the result


def installed(*packages: str) -> dict:
    """{"package", "version"} of the first of these distributions that is installed. Raises ImportError if
    none is."""
    for package in packages:
        try:
            return {"package": package, "version": importlib.metadata.version(package)}
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ImportError(f"{' or '.join(packages)} is not installed")


def delta_rule(q, k, v, g, beta, scale):
    """The gated delta rule token by token, fp64: [B, T, H, D]."""
    q, k, v, g, beta = (t.double() for t in (q, k, v, g, beta))
    S, outputs = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        S = S * g[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], error)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outputs, 1)


def flashqla_calls(call: Callable[[], object]) -> dict:
    """Whether ``call`` reaches FlashQLA: its function is replaced by one that counts, for this call."""
    try:
        qla = importlib.import_module("flash_qla")
    except Exception as e:
        call()
        return {"active": False, "reason": f"{type(e).__name__}: {e}"}
    original, seen = qla.chunk_gated_delta_rule, []

    def counting(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    qla.chunk_gated_delta_rule = counting
    try:
        call()
    finally:
        qla.chunk_gated_delta_rule = original
    return {"active": bool(seen), "FLA_FLASH_QLA": os.environ.get("FLA_FLASH_QLA")}


@torch.no_grad()
def fla(case: Case, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    found = installed("flash-linear-attention", "fla-core")
    rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    B, T, H, D, dtype = case.B, case.T, case.H, case.D, m.DTYPES[case.dtype]

    def made(seed: int):
        g = torch.Generator(device).manual_seed(seed)
        random = lambda *s, dt=dtype: torch.randn(*s, generator=g, device=device, dtype=dt)
        q, k = (F.normalize(random(B, T, H, D), dim=-1) for _ in range(2))
        return q, k, random(B, T, H, D), F.logsigmoid(
            random(B, T, H, dt=torch.float32) + 4
        ), torch.sigmoid(random(B, T, H))

    nbytes = 4 * B * T * H * D * case.itemsize
    problems = [made(seed) for seed in range(m.sets_for(nbytes, device))]
    calls = [
        partial(lambda q, k, v, g, beta: rule(q, k, v, g=g, beta=beta, scale=D**-0.5,
                output_final_state=True), *p) for p in problems
    ]
    exact = delta_rule(*(t[:, :100] for t in problems[0]), D**-0.5)
    error = m.rms(calls[0]()[0][:, :100] - exact) / m.rms(exact)
    if not error < 0.02:
        return refused(
            {"reason": f"differs from the token loop in fp64 by {error:.1e}",
                "error": error if math.isfinite(error) else None}
        )
    found |= {"flashqla": flashqla_calls(calls[0]), "error": error, "sets": len(problems), "bytes": nbytes}
    return found | m.time_calls(calls, device, seconds)


def attended(q, k, v):
    """torch's causal attention: [B, H, T, D]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_backend(q, k, v) -> str:
    """Which of torch's implementations serves a call, as torch tells."""
    try:
        return torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)).name
    except (AttributeError, ValueError, RuntimeError) as e:
        return f"unknown: {e}"


def inputs_of(case: Case, device: str, seed: int, least: int = 3) -> list[torch.Tensor]:
    """``least`` tensors [B, T, H, D] in the case's dtype; the first two of unit length."""
    g = torch.Generator(device).manual_seed(seed)
    kw = {"generator": g, "device": device, "dtype": m.DTYPES[case.dtype]}
    found = [torch.randn(case.B, case.T, case.H, case.D, **kw) for _ in range(least)]
    return [F.normalize(t, dim=-1) for t in found[:2]] + found[2:]


def judged(found: dict, case: Case, ours: torch.Tensor, exact: torch.Tensor) -> dict:
    """``found`` with the error of ``ours`` against the same in fp64, or refused."""
    error = m.rms(ours - exact) / m.rms(exact)
    if not error < TOLERANCE[case.dtype]:
        return refused(
            {"reason": f"differs from fp64 by {error:.1e}", "error": error if math.isfinite(error) else None}
        )
    return found | {"error": error}


@torch.no_grad()
def sdpa(case: Case, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    nbytes = 4 * case.B * case.T * case.H * case.D * case.itemsize
    problems = [
        [t.transpose(1, 2).contiguous() for t in inputs_of(case, device, seed)]
        for seed in range(m.sets_for(nbytes, device))
    ]
    piece = [t[:2, :, :256] for t in problems[0]]
    scores = (piece[0].double() @ piece[1].double().mT * case.D**-0.5).masked_fill(
        torch.ones(piece[0].shape[2], piece[0].shape[2], dtype=torch.bool, device=device).triu(1), -math.inf)
    found = judged({"package": "torch", "version": torch.__version__, "backend": sdpa_backend(*problems[0])}, case,
                   attended(*problems[0])[:2, :, :256], scores.softmax(-1) @ piece[2].double())
    if found.get("status"):
        return found
    record = m.time_calls(
        [partial(attended, *p) for p in problems], device, seconds
    ) | found | {"sets": len(problems)}
    return m.rates(record, ceilings, case.dtype, 2 * case.B * case.T * (case.T + 1) * case.H * case.D, nbytes)


def ttt_linear(q, k, v, w, b, S, s, eta: float, scale: float, chunk: int):
    """TTT-Linear (Learning to learn at test time, mini-batch form) in fp64: [B, T, H, D]. A matrix S [B, H,
    D, D] and a bias s [B, H, 1, D] a head; each token's gradient of |norm(k S + s) w + b - (v - k)|^2 / 2 is
    taken where its mini-batch starts; o + norm(o) w + b is what comes out."""
    q, k, v = (t.double().transpose(1, 2) for t in (q * scale, k, v))
    w, b, S, s, outputs = w.double()[:, None], b.double()[:, None], S.double(), s.double(), []
    norm = lambda t: F.layer_norm(t, t.shape[-1:], eps=1e-6) * w + b
    for t in range(0, k.shape[2], chunk):
        qc, kc, vc = (x[:, :, t : t + chunk] for x in (q, k, v))
        with torch.enable_grad():
            z = (kc @ S + s).requires_grad_()
            (g,) = torch.autograd.grad((norm(z) - (vc - kc)).square().sum() / 2, z)
        seen = torch.ones(kc.shape[2], kc.shape[2], dtype=k.dtype, device=k.device).tril()
        o = qc @ S + s - eta * ((qc @ kc.mT) * seen + seen) @ g
        S, s = S - eta * kc.mT @ g, s - eta * g.sum(2, keepdim=True)
        outputs.append(o + norm(o))
    return torch.cat(outputs, 2).transpose(1, 2)


@torch.no_grad()
def ttt(case: Case, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    found = installed("flash-linear-attention", "fla-core") | {"backend": "triton"}
    rule = importlib.import_module("fla.ops.ttt").chunk_ttt_linear
    B, H, D, scale, dtype = case.B, case.H, case.D, case.D**-0.5, m.DTYPES[case.dtype]
    g = torch.Generator(device).manual_seed(0)
    random = lambda *s: torch.randn(*s, generator=g, device=device)
    w, b, S, s = 1 + random(H, D).to(dtype) / 8, random(H, D).to(dtype) / 8, random(B, H, D, D), random(B, H, 1, D)
    rates = torch.full((B, case.T, H, 1), 0.005, device=device, dtype=dtype)
    nbytes = 4 * case.B * case.T * case.H * case.D * case.itemsize
    problems = [inputs_of(case, device, seed) for seed in range(m.sets_for(nbytes, device))]
    call = lambda q, k, v: rule(q, k, v, w=w, b=b, eta=rates, scale=scale, chunk_size=case.C, initial_state=S,
                                initial_state_bias=s,
                                output_final_state=True)[0]
    exact = ttt_linear(
        *(t[:, : 6 * case.C] for t in problems[0]), w, b, S, s, float(rates[0, 0, 0, 0]), scale, case.C
    )
    found = judged(
        found | {"sets": len(problems), "bytes": nbytes}, case, call(*problems[0])[:, : 6 * case.C], exact
    )
    return (
        found if found.get("status") else found
        | m.time_calls([partial(call, *p) for p in problems], device, seconds)
    )


@torch.no_grad()
def titans_pytorch(case: Case, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    found = installed("titans-pytorch") | {"backend": "torch", "compared": "speed only: another function"}
    width = case.H * case.D
    torch.manual_seed(0)
    module = importlib.import_module("titans_pytorch").NeuralMemory(
        width, chunk_size=case.C, batch_size=case.C, dim_head=case.D, heads=case.H,
        default_model_kwargs={"depth": 2, "expansion_factor": case.N / case.D}).to(device,
        m.DTYPES[case.dtype]).eval()
    nbytes = 2 * case.B * case.T * width * case.itemsize
    xs = [inputs_of(case, device, seed)[2].flatten(2) for seed in range(m.sets_for(nbytes, device))]
    o = module(xs[0])[0]
    if o.shape != xs[0].shape or not o.isfinite().all():
        return refused({"reason": f"outputs {tuple(o.shape)} not finite, or not of the inputs' shape"})
    record = found | m.time_calls([partial(module, x) for x in xs], device, seconds)
    return record | {"tokens/s": 1e3 * case.B * case.T / record["ms"]["median"], "sets": len(xs)}


@torch.no_grad()
def compiled(case: Case, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    """One chunk traced, compiled and captured, replayed T / C times over a state in fixed buffers; checked
    after two replays.

    Dynamo fails on the state object (2.13: InternalTorchDynamoError), so make_fx records the tensor
    operations and those are compiled.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    c = case.config
    w, inputs = problem(case, device, 0)
    first = head(inputs, case.B, case.C)
    q, x = first.q.clone(), first.x.clone()
    state = init_titans_state(c, w, case.B, device, x.dtype)
    held = [getattr(state, n) for n in STATE]

    def one(q, x, *tensors):
        given = replace(state, **dict(zip(STATE, tensors)))
        o, new = titans_chunk(c, w, first._replace(q=q, x=x), given, backend="chunked")
        return o, *(getattr(new, n) for n in STATE)

    fast = torch.compile(make_fx(one)(q, x, *held), dynamic=False, fullgraph=True)

    def advance():
        o, *tensors = fast(q, x, *held)
        for old, new in zip(held, tensors):
            old.copy_(new)
        return o

    graph, o = m.captured([advance])
    for t in held:
        t.zero_()  # the state of a sequence that has read nothing
    outputs = []
    for t in (0, case.C):
        q.copy_(inputs.q[:, t : t + case.C])
        x.copy_(inputs.x[:, t : t + case.C])
        graph.replay()
        outputs.append(o[0].clone())
    two = head(inputs, case.B, 2 * case.C)
    exact = results(*titans_chunk(c, to(w, torch.float64), to(two, torch.float64), backend="chunked"))
    check = m.compare(
        dict(zip(("o", *STATE), (torch.cat(outputs, 1), *held))),
        results(*titans_chunk(c, w, two, backend="chunked")), exact
    )
    if not check["ok"]:
        return refused(check | {"reason": f"{check['tensor']} differs from the fp64 chunked backend"})
    found = m.time_calls([graph.replay], device, seconds)["ms"]
    ms = {k: v if k == "n" else v * (case.T // case.C) for k, v in found.items()}
    flops, nbytes = case.B * case.T * m.flops_per_token(c), m.prefill_bytes(c, case.B, case.T, case.itemsize)
    return m.rates({"check": check, "ms": ms, "ms_per_chunk": found}, ceilings, case.dtype, flops, nbytes)


@torch.no_grad()
def package(d: int, chunk: int, T: int, long: int, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    """Ours and the package on the same fp32 weights and T tokens, one head; ours also on ``long`` tokens,
    where the loop's rate stays."""
    found = installed("nested-learning")
    torch.backends.cudnn.allow_tf32 = False  # the package's convolution
    module = importlib.import_module("nested_learning.titan.self_modifying")
    torch.manual_seed(0)
    loop = module.SelfModifyingTitans(
        module.SelfModifyingTitansConfig(d, chunk_size_other=chunk, chunk_size_memory=chunk)
    )
    ours = SelfModifyingTitans(
        TitansConfig.preset("nested_learning", d_model=d, chunk_memory=chunk, chunk_other=chunk)
    )
    bench_cpu.copy_weights(ours, loop)
    loop, ours = loop.to(device), ours.to(device)
    backend = "triton" if device == "cuda" else "cpp" if available_backends()["cpp"] is None else "chunked"
    x, far = torch.randn(1, T, d, device=device), torch.randn(1, long, d, device=device)
    theirs = lambda: loop.forward_with_updates(x, loop.init_fast_state())[0]
    exact = theirs()
    error = m.rms(ours(x, backend=backend)[0] - exact) / m.rms(exact)
    if not error < 1e-4:
        return refused(
            {"reason": f"outputs differ by {error:.1e}", "error": error if math.isfinite(error) else None}
        )
    timed = [m.time_calls([f], device, seconds)["ms"] for f in
             (theirs, lambda: ours(x, backend=backend), lambda: ours(far, backend=backend))]
    rate = [1e3 * n / t["median"] for n, t in zip((T, T, long), timed)]
    return found | {
        "backend": backend, "error": error, "ms": timed[0], "ours_ms": timed[1], "ours_long_ms": timed[2],
        "tokens/s": rate[0],
        "ours_tokens/s": rate[1], "ours_long_tokens/s": rate[2], "ratio": rate[1] / rate[0],
        "ratio_long": rate[2] / rate[0]}


def items(device: str, quick: bool) -> Iterator[tuple[str, dict, Callable]]:
    """(name, the case as data, call with (ceilings)), most important first: FLA, then one of each other peer,
    then the rest, what has to be compiled last."""
    seconds = m.seconds(device, quick)
    T, long = (64, 256) if quick else (128, 32768 if device == "cuda" else 2048)

    def named(kind: str, run: Callable, cases) -> list[tuple[str, dict, Callable]]:
        name = lambda c: kind + c.name.removeprefix(c.kind).removesuffix(" " + c.backend)
        return [
            (name(c), asdict(c) | {"kind": kind, "backend": None}, partial(run, c, device, seconds=seconds))
            for c in cases
        ]

    loops = []
    for d, chunk in PACKAGE_SHAPES:
        shape = {
            "kind": "package", "D": d, "N": d, "C": chunk, "H": 1, "B": 1, "T": T, "long": long, "dtype": "fp32"
        }
        loops.append(
            (f"package C{chunk} D{d}", shape, partial(package, d, chunk, T, long, device, seconds=seconds))
        )
    if device != "cuda":
        sizes = [QUICK_CPU()] if quick else [ON_CPU(), ON_CPU(C=16)]
        yield from (
            *named("sdpa", sdpa, sizes[:1]), *loops[:1], *named("titans", titans_pytorch, sizes),
            *loops[1 : 1 if quick else None]
        )
    elif quick:
        yield from (*named("fla", fla, [P(H=8, T=1024)]), *named("sdpa", sdpa, [P(H=8, T=1024)]), loops[0])
    else:
        graphs, attention = named("compiled", compiled, COMPILED_CASES), named("sdpa", sdpa, SDPA_CASES)
        ttts, memories = named("ttt", ttt, TTT_CASES), named("titans", titans_pytorch, TITANS_CASES)
        yield from (  # torch.compile last: it takes most of the time
            *named("fla", fla, FLA_CASES), attention[0], ttts[0], memories[0], loops[0], graphs[0],
            *attention[1:], *ttts[1:], *memories[1:], *loops[1:], *graphs[1:]
        )
