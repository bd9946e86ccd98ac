"""Other implementations on the same card in the same run, where they can be imported. Run by benchmarks.gpu.

    fla       chunk_gated_delta_rule at equal width (K = V = D): one matrix a head where ours are five memories, about 1/16 of the FLOPs
              at N = 256; whether FLA handed the call to FlashQLA is seen, not guessed
    compiled  our chunked backend as people would speed it up without kernels: torch.compile of one chunk, captured in a CUDA graph
    package   the token loop of nested-learning 0.2.0, same weights, outputs compared; ours beside it

A peer that is not installed is recorded as skipped, one whose result is wrong as refused.
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

from hope_kernels import SelfModifyingTitans, TitansConfig, available_backends
from hope_kernels.ops import init_titans_state, titans_chunk

from . import bench_cpu
from . import measure as m
from .bench_titans import STATE, Case, P, head, problem, refused, results, to

FLA_CASES = (P(), P(N=64, B=4, T=8192), P(D=128, N=128, H=16), P(N=64, B=32, T=2048))
COMPILED_CASES = (P(), P(C=16, N=64, B=4, T=8192), P(C=256))
PACKAGE_SHAPES = ((64, 16), (64, 64), (128, 64))


def installed(*packages: str) -> dict:
    """{"package", "version"} of the first of these distributions that is installed. Raises ImportError if none is."""
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
        return q, k, random(B, T, H, D), F.logsigmoid(random(B, T, H, dt=torch.float32) + 4), torch.sigmoid(random(B, T, H))

    nbytes = 4 * B * T * H * D * case.itemsize
    problems = [made(seed) for seed in range(m.sets_for(nbytes, device))]
    calls = [partial(lambda q, k, v, g, beta: rule(q, k, v, g=g, beta=beta, scale=D**-0.5, output_final_state=True), *p) for p in problems]
    exact = delta_rule(*(t[:, :100] for t in problems[0]), D**-0.5)
    error = m.rms(calls[0]()[0][:, :100] - exact) / m.rms(exact)
    if not error < 0.02:
        return refused({"reason": f"differs from the token loop in fp64 by {error:.1e}", "error": error if math.isfinite(error) else None})
    found |= {"flashqla": flashqla_calls(calls[0]), "error": error, "sets": len(problems), "bytes": nbytes}
    return found | m.time_calls(calls, device, seconds)


@torch.no_grad()
def compiled(case: Case, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    """One chunk traced, compiled and captured, replayed T / C times over a state in fixed buffers; checked after two replays.

    Dynamo fails on the state object (2.13: InternalTorchDynamoError), so make_fx records the tensor operations and those are compiled.
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
    check = m.compare(dict(zip(("o", *STATE), (torch.cat(outputs, 1), *held))), results(*titans_chunk(c, w, two, backend="chunked")), exact)
    if not check["ok"]:
        return refused(check | {"reason": f"{check['tensor']} differs from the fp64 chunked backend"})
    found = m.time_calls([graph.replay], device, seconds)["ms"]
    ms = {k: v if k == "n" else v * (case.T // case.C) for k, v in found.items()}
    flops, nbytes = case.B * case.T * m.flops_per_token(c), m.prefill_bytes(c, case.B, case.T, case.itemsize)
    return m.rates({"check": check, "ms": ms, "ms_per_chunk": found}, ceilings, case.dtype, flops, nbytes)


@torch.no_grad()
def package(d: int, chunk: int, T: int, long: int, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    """Ours and the package on the same fp32 weights and T tokens, one head; ours also on ``long`` tokens, where the loop's rate stays."""
    found = installed("nested-learning")
    torch.backends.cudnn.allow_tf32 = False  # the package's convolution
    module = importlib.import_module("nested_learning.titan.self_modifying")
    torch.manual_seed(0)
    loop = module.SelfModifyingTitans(module.SelfModifyingTitansConfig(d, chunk_size_other=chunk, chunk_size_memory=chunk))
    ours = SelfModifyingTitans(TitansConfig.preset("nested_learning", d_model=d, chunk_memory=chunk, chunk_other=chunk))
    bench_cpu.copy_weights(ours, loop)
    loop, ours = loop.to(device), ours.to(device)
    backend = "triton" if device == "cuda" else "cpp" if available_backends()["cpp"] is None else "chunked"
    x, far = torch.randn(1, T, d, device=device), torch.randn(1, long, d, device=device)
    theirs = lambda: loop.forward_with_updates(x, loop.init_fast_state())[0]
    exact = theirs()
    error = m.rms(ours(x, backend=backend)[0] - exact) / m.rms(exact)
    if not error < 1e-4:
        return refused({"reason": f"outputs differ by {error:.1e}", "error": error if math.isfinite(error) else None})
    timed = [m.time_calls([f], device, seconds)["ms"] for f in
             (theirs, lambda: ours(x, backend=backend), lambda: ours(far, backend=backend))]
    rate = [1e3 * n / t["median"] for n, t in zip((T, T, long), timed)]
    return found | {
        "backend": backend, "error": error, "ms": timed[0], "ours_ms": timed[1], "ours_long_ms": timed[2], "tokens/s": rate[0],
        "ours_tokens/s": rate[1], "ours_long_tokens/s": rate[2], "ratio": rate[1] / rate[0], "ratio_long": rate[2] / rate[0]}


def items(device: str, quick: bool) -> Iterator[tuple[str, dict, Callable]]:
    """(name, the case as data, call with (ceilings)), most important first: FLA, then one of each other peer, then the rest."""
    seconds = 0.05 if quick else 1.0
    T, long = (64, 256) if quick else (128, 32768 if device == "cuda" else 2048)

    def named(kind: str, run: Callable, cases) -> list[tuple[str, dict, Callable]]:
        name = lambda c: kind + c.name.removeprefix(c.kind).removesuffix(" " + c.backend)
        return [(name(c), asdict(c) | {"kind": kind, "backend": None}, partial(run, c, device, seconds=seconds)) for c in cases]

    loops = []
    for d, chunk in PACKAGE_SHAPES:
        shape = {"kind": "package", "D": d, "N": d, "C": chunk, "H": 1, "B": 1, "T": T, "long": long, "dtype": "fp32"}
        loops.append((f"package C{chunk} D{d}", shape, partial(package, d, chunk, T, long, device, seconds=seconds)))
    if device != "cuda":
        yield from loops[: 1 if quick else None]
    elif quick:
        yield from (*named("fla", fla, [P(H=8, T=1024)]), loops[0])
    else:
        graphs = named("compiled", compiled, COMPILED_CASES)
        yield from (*named("fla", fla, FLA_CASES), loops[0], graphs[0], *loops[1:], *graphs[1:])
