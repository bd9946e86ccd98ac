"""The operators on one device: prefill and decoding of the memories, their gradient, convolution, output
gate. Run by benchmarks.gpu.

Every case first passes two checks: on its first rows and tokens, a piece of 2.5 chunks, output and state are
compared with the fp64 chunked backend (``measure.compare``); then the whole call runs twice into poisoned
memory, must write every vector, give the same bits both times and agree with the fp64 piece where they
overlap. A case that fails is recorded as refused, without a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks import measure as m
from hope_kernels import TitansConfig
from hope_kernels.ops import (
    FastWeights,
    Layout,
    RoundedWeights,
    TokenInputs,
    init_titans_state,
    titans_advance_,
    titans_chunk,
    titans_step,
)
from hope_kernels.ops.shared import cuda_library
from hope_kernels.ops.titans.backends import resolve

STATE = ("delta2", "delta1", "delta1s", "pending_k", "pending_v", "pending_eta", "pending_alpha")


@dataclass(frozen=True)
class Case:
    """B rows of T tokens, H heads of width D, N hidden units, chunks of C tokens."""

    kind: str
    C: int = 64
    D: int = 64
    N: int = 256
    H: int = 32
    B: int = 1
    T: int = 32768
    dtype: str = "bf16"
    backend: str = "triton"

    @property
    def name(self) -> str:
        return f"{self.kind} C{self.C} D{self.D} N{self.N} H{self.H} B{self.B} T{self.T} {self.dtype} {self.backend}"

    @property
    def config(self) -> TitansConfig:
        return TitansConfig(
            self.H * self.D, self.H, hidden_mult=self.N // self.D, chunk_memory=self.C, chunk_other=self.C,
            conv_window=None)

    @property
    def itemsize(self) -> int:
        return m.DTYPES[self.dtype].itemsize


P, S = partial(Case, "prefill"), partial(Case, "step", T=1)
X, XS = partial(P, backend="cuda"), partial(S, backend="cuda")
# Most important first: the run may end anywhere. FIRST of them go before any peer.
FIRST = 9
GPU_CASES = (
    P(), X(), P(N=64, B=4, T=8192), X(N=64, B=4, T=8192), P(C=16, N=64, B=4, T=8192), X(C=16, N=64, B=4, T=8192),
    S(), XS(), X(C=16), Case("step graph", T=1), Case("step graph", T=1, backend="cuda"),
    Case("step graph rounded", T=1, backend="cuda"), P(C=16), P(C=256, B=4, T=8192), P(N=64), X(N=64),
    Case("conv"), Case("gate"), Case("grad", T=8192),
    P(D=128, N=512, H=16), P(D=128, N=128, H=16), X(D=128, N=128, H=16), X(N=64, B=32, T=2048), P(C=256),
    P(N=64, B=32, T=2048),
    P(C=128), P(C=32), X(C=32), P(B=4, T=8192), X(B=4, T=8192), P(B=32, T=2048), X(B=32, T=2048),
    P(C=256, B=32, T=2048),
    S(B=32), XS(B=32), S(N=64, C=16), XS(N=64, C=16), S(D=128, N=512, H=16), Case("step graph", B=32, T=1),
    P(T=2048), X(T=2048), P(T=131072), P(H=8), X(H=8), P(H=64, T=16384), P(C=16, N=64, B=32, T=2048),
    P(C=256, N=64), P(N=128), X(N=128),
    P(C=1024), X(C=1024), P(N=512), P(dtype="fp16"), X(dtype="fp16"), P(dtype="fp32", T=4096),
    Case("conv", B=32, T=1), Case("gate", B=32, T=1),
)
QUICK_GPU = (
    P(H=8, T=1024), X(H=8, T=1024), P(C=16, N=64, H=8, T=1024), S(H=8), XS(H=8), Case("step graph", H=8, T=1),
    Case("step graph", H=8, T=1, backend="cuda"), Case("conv", T=256), Case("gate", T=256),
)
ON_CPU = (("prefill", 16, 64, 256), ("prefill", 64, 64, 256), ("prefill", 64, 256, 256), ("step", 16, 64, 1),
          ("conv", 64, 64, 512),
          ("gate", 64, 64, 512))
CPU_CASES = (
    *(Case(kind, C, 64, N, 2, 1, T, "fp32", backend) for kind, C, N, T in ON_CPU for backend in ("cpp", "chunked")),
    *(Case("grad", 16, 32, 32, 1, 1, 64, "fp32", backend) for backend in ("cpp", "chunked")),
)
QUICK_CPU = (  # the first one also has a size that means something
    Case("prefill", 64, 64, 64, 2, 1, 256, "fp32", "cpp"),
    *(Case(kind, 16, 32, 32, 2, 1, T, "fp32", backend) for backend in ("cpp", "chunked")
      for kind, T in (("prefill", 64), ("step", 1), ("conv", 16), ("gate", 16), ("grad", 40))),
)


def problem(case: Case, device: str, seed: int) -> tuple[FastWeights, TokenInputs]:
    """Random initial weights and inputs in the case's dtype; keys and queries of unit length, retention
    between 0.73 and 0.99."""
    g = torch.Generator(device).manual_seed(seed)
    c, kw = case.config, {"device": device, "dtype": m.DTYPES[case.dtype]}

    def random(*shape):
        return torch.randn(*shape, generator=g, **kw)

    w = FastWeights(*(None if s is None else random(*s) * s[-1] ** -0.5 for s in Layout.of(c).shapes(case.H)))
    q, x = (random(case.B, case.T, case.H, case.D) for _ in range(2))
    bias = torch.linspace(-1, 3, case.H, **kw)
    return w, TokenInputs(torch.nn.functional.normalize(q, dim=-1), x=x, eta_bias=bias, alpha_bias=bias + 2)


def to(found, dtype: torch.dtype):
    return type(found)(*(None if t is None else t.to(dtype) for t in found))


def head(inputs: TokenInputs, rows: int, tokens: int) -> TokenInputs:
    return inputs._replace(q=inputs.q[:rows, :tokens], x=inputs.x[:rows, :tokens])


def results(o, state) -> dict[str, torch.Tensor]:
    return {"o": o} | {n: t for n in STATE if (t := getattr(state, n)) is not None}


def verified(case: Case, w: FastWeights, inputs: TokenInputs, op: Callable) -> dict:
    """The checks of the module's first paragraph: {"ok": ..., "reason": ...} and the largest error."""
    c, piece = case.config, head(inputs, 2, 2 * case.C + case.C // 2 + 1)
    exact = results(*titans_chunk(c, to(w, torch.float64), to(piece, torch.float64), backend="chunked"))
    run = lambda given: results(*op(c, w, given, backend=case.backend))
    return m.verified(lambda: run(piece), lambda: run(inputs), lambda o: o[: len(piece.x), : piece.x.shape[1]],
                      results(*titans_chunk(c, w, piece, backend="chunked")), exact)


def refused(check: dict) -> dict:
    return {"status": "refused", "reason": check["reason"], "check": check}


def sets(case: Case, device: str, least: int = 1) -> list[tuple[FastWeights, TokenInputs]]:
    """As many problems as exceed the L2 cache together."""
    nbytes = m.prefill_bytes(case.config, case.B, case.T, case.itemsize)
    return [problem(case, device, seed) for seed in range(max(least, m.sets_for(nbytes, device)))]


@torch.no_grad()
def prefill(case: Case, device: str, ceilings: dict, seconds: float = 1.0, op: Callable = titans_chunk) -> dict:
    c, problems = case.config, sets(case, device)
    check = verified(case, *problems[0], op)
    if not check["ok"]:
        return refused(check)
    dtype = m.DTYPES[case.dtype]
    states = [init_titans_state(c, w, case.B, device, dtype) for w, _ in problems]
    calls = [partial(op, c, w, i, s, backend=case.backend) for (w, i), s in zip(problems, states)]
    per_token = m.flops_per_token(c)
    record = m.time_calls(calls, device, seconds) | {
        "check": check, "sets": len(problems), "flops_per_token": per_token
    }
    record["ns_per_token"] = 1e6 * record["ms"]["median"] / (case.B * case.T)
    if case.backend == "cuda":  # more pairs than run at once come in turns
        at_once = cuda_library.at_once(case.D, case.N, case.C, torch.device(device))
        record |= {"pairs": case.B * case.H, "pairs_at_once": at_once}
    record["bytes_if_state_in_memory"] = case.T // case.C * m.state_bytes_per_chunk(c, case.B)
    nbytes = m.prefill_bytes(c, case.B, case.T, case.itemsize)
    return m.rates(record, ceilings, case.dtype, case.B * case.T * per_token, nbytes)


def _steps(case: Case, device: str):
    """(problems, check): layers to rotate through, each with one chunk of tokens, and the check of decoding
    it token by token."""
    c, problems = case.config, sets(Case(**asdict(case) | {"T": 2 * case.C}), device)
    w, i = problems[0]

    def stepwise(_, w, inputs, backend):
        state = init_titans_state(c, w, inputs.x.shape[0], device, inputs.x.dtype)
        outputs = []
        for t in range(inputs.x.shape[1]):
            o, state = titans_step(c, w, token(inputs, t), state, backend=backend)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    return problems, verified(case, w, head(i, case.B, case.C + 3), stepwise)


def token(inputs: TokenInputs, t: int) -> TokenInputs:
    return inputs._replace(q=inputs.q[:, t : t + 1], x=inputs.x[:, t : t + 1])


@torch.no_grad()
def step(case: Case, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    """Decoding, the layers in turn: two chunks, so that every layer commits twice."""
    c = case.config
    problems, check = _steps(case, device)
    if not check["ok"]:
        return refused(check)
    states = [init_titans_state(c, w, case.B, device, m.DTYPES[case.dtype]) for w, _ in problems]
    spans: dict[bool, list] = {False: [], True: []}
    for t in range(2 * case.C):
        for layer, (w, i) in enumerate(problems):
            one = token(i, t)

            def call(layer=layer, w=w, one=one):
                states[layer] = titans_step(c, w, one, states[layer], backend=case.backend)[1]

            spans[(t + 1) % case.C == 0].append(m.recorded(call) if device == "cuda" else m.host_ms(call))
    m.sync(device)
    record = {"check": check, "layers": len(problems)}
    for commit, key in ((False, "plain"), (True, "commit")):
        ms = [s if isinstance(s, float) else s[0].elapsed_time(s[1]) for s in spans[commit]]
        timed = {"ms": m.stats(ms), "p50": m.quantile(ms, 0.5), "p99": m.quantile(ms, 0.99)}
        record[key] = m.rates(timed, ceilings, case.dtype, None, m.step_bytes(c, case.B, case.itemsize, commit))
    return record | {"ms": record["plain"]["ms"]}


@torch.no_grad()
def step_graph(case: Case, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    """One step of every layer in one CUDA graph, replayed for token after token: the device decides which of
    them fill a chunk. "step graph rounded": it reads rounded copies of the weights."""
    c, dtype = case.config, m.DTYPES[case.dtype]
    problems, check = _steps(case, device)
    if not check["ok"]:
        return refused(check)
    states = [init_titans_state(c, w, case.B, device, dtype) for w, _ in problems]
    tokens = [
        TokenInputs(*(t if t is None or t.dim() == 1 else t.clone() for t in token(i, 0))) for _, i in problems
    ]
    one = torch.ones(case.B, dtype=torch.int64, device=device)
    rounded = case.kind == "step graph rounded"
    copies = [RoundedWeights(c, w, s) if rounded else None for (w, _), s in zip(problems, states)]
    calls = [
        partial(titans_advance_, c, w, i, s, one, backend=case.backend, rounded=copy)
        for (w, _), i, s, copy in zip(problems, tokens, states, copies)
    ]
    try:
        graph, kept = m.captured(calls)
    except RuntimeError as e:
        return {"check": check, "status": "skipped", "reason": f"capture: {e}".splitlines()[0], "restart": True}
    for state, (w, _) in zip(states, problems):
        state.assign(init_titans_state(c, w, case.B, device, dtype))
    for copy in copies:
        if copy is not None:
            copy.renew()

    def replayed(t: int) -> tuple:
        for mine, (_, i) in zip(tokens, problems):
            mine.q.copy_(i.q[:, t : t + 1])
            mine.x.copy_(i.x[:, t : t + 1])
        return m.recorded(graph.replay)

    outputs = []
    for t in range(case.C + 3):
        replayed(t)
        outputs.append(kept[0].clone())
    eager = titans_chunk(c, problems[0][0], head(problems[0][1], case.B, case.C + 3), backend=case.backend)[0]
    if not torch.equal(torch.cat(outputs, 1), eager):
        return refused(
            {**check, "ok": False, "reason": "replays of the CUDA graph and one call over the same tokens differ"}
        )
    spans: dict[bool, list] = {False: [], True: []}
    for t in range(case.C + 3, case.C * max(4, int(200 * seconds) // case.C)):
        spans[(t + 1) % case.C == 0].append(replayed(t % (2 * case.C)))
    m.sync(device)
    record: dict = {"check": check, "layers": len(problems)}
    for commit, key in ((False, "plain"), (True, "commit")):
        ms = [start.elapsed_time(end) / len(problems) for start, end in spans[commit]]
        timed = {"ms": m.stats(ms), "p50": m.quantile(ms, 0.5), "p99": m.quantile(ms, 0.99)}
        nbytes = m.step_bytes(c, case.B, case.itemsize, commit, rounded)
        record[key] = m.rates(timed, ceilings, case.dtype, None, nbytes)
    return record | {"ms": record["plain"]["ms"]}


def grad(case: Case, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    """Backward / forward, once gradients (of x, q and the initial memory w2) pass the yardstick."""
    c = case.config
    w, inputs = problem(case, device, 0)

    def run(w, inputs, backend, backward=True):
        leaves = {
            "x": inputs.x.detach().requires_grad_(), "q": inputs.q.detach().requires_grad_(),
            "w2": w.w2.detach().requires_grad_()
        }
        o, _ = titans_chunk(
            c, w._replace(w2=leaves["w2"]), inputs._replace(x=leaves["x"], q=leaves["q"]), backend=backend
        )
        if backward:
            return dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), inputs.q.detach())))

    piece = head(inputs, 2, 2 * case.C + case.C // 2 + 1)
    ours = run(w, piece, case.backend)
    exact = run(to(w, torch.float64), to(piece, torch.float64), "chunked")
    check = m.compare(ours, run(w, piece, "chunked"), exact)
    if not check["ok"]:
        return refused(
            check | {"reason": f"the gradient of {check['tensor']} differs from the fp64 chunked backend"}
        )
    forward = m.time_calls([partial(run, w, inputs, case.backend, False)], device, seconds)["ms"]
    both = m.time_calls([partial(run, w, inputs, case.backend)], device, seconds)["ms"]
    return {
        "check": check, "ms": both, "forward_ms": forward,
        "backward_per_forward": both["median"] / forward["median"] - 1
    }


def small_operator(kind: str, backend: str) -> Callable:
    """The convolution ("conv") or the output gate ("gate") of a backend; the CUDA one has those of Triton."""
    if backend == "cpp":
        from hope_kernels.ops.conv.cpp import causal_conv as conv
        from hope_kernels.ops.output_gate.cpp import output_gate as gate
    elif backend == "chunked":
        from hope_kernels.ops.conv.forward import causal_conv_chunked as conv
        from hope_kernels.ops.output_gate.forward import output_gate_chunked as gate
    else:
        from hope_kernels.ops.conv.triton.forward import causal_conv_triton as conv
        from hope_kernels.ops.output_gate.triton.forward import output_gate_triton as gate
    return conv if kind == "conv" else gate


@torch.no_grad()
def elementwise(case: Case, device: str, ceilings: dict, seconds: float = 1.0) -> dict:
    """The convolution (window 4) or the output gate: 2 or 3 numbers of d a token move."""
    B, T, H, D, W = case.B, case.T, case.H, case.D, 4
    conv = case.kind == "conv"
    ours, chunked = (small_operator(case.kind, backend) for backend in (case.backend, "chunked"))
    nbytes, flops = (2 if conv else 3) * B * T * H * D * case.itemsize, (2 * W if conv else 8) * B * T * H * D

    def made(seed: int):
        g = torch.Generator(device).manual_seed(seed)
        shapes = ((B, T, H * D), (B, W - 1, H * D), (H * D, W)) if conv else ((B, T, H, D), (H, D), (B, T, H * D))
        return tuple(torch.randn(s, generator=g, device=device, dtype=m.DTYPES[case.dtype]) for s in shapes)

    problems = [made(seed) for seed in range(m.sets_for(nbytes, device))]
    lengths = [T] * B if case.backend == "cpp" else torch.full((B,), T, dtype=torch.int32, device=device)

    def named(found) -> dict:
        return dict(zip(("y", "tail"), found if conv else (found,)))

    given = problems[0]
    peer, exact = (named(chunked(*(t.to(d) for t in given), *([[T] * B] if conv else [])))
                   for d in (m.DTYPES[case.dtype], torch.float64))
    extra = (lengths,) if conv else ()
    with m.poisoned():
        first, again = (named(ours(*given, *extra)) for _ in range(2))
    check = m.compare(first, peer, exact)
    if not check["ok"] or not all(torch.equal(first[n], again[n]) for n in first):
        reason = "two equal calls gave different bits" if check["ok"] else "differs from fp64"
        return refused(check | {"ok": False, "reason": reason})
    calls = [partial(ours, *p, *extra) for p in problems]
    record = m.rates(
        m.time_calls(calls, device, seconds) | {"check": check, "sets": len(problems)}, ceilings, case.dtype,
        flops, nbytes
    )
    if device != "cuda":
        return record
    try:
        record["graph"] = m.rates(m.time_graph(calls, seconds), ceilings, case.dtype, flops, nbytes)
    except RuntimeError as e:
        record |= {"graph": None, "graph_reason": str(e).splitlines()[0], "restart": True}
    return record


KINDS = {
    "prefill": prefill, "step": step, "step graph": step_graph, "step graph rounded": step_graph, "grad": grad,
    "conv": elementwise, "gate": elementwise
}


def measured(case: Case, device: str, ceilings: dict, seconds: float) -> dict:
    """The case's record. Raises Unserved, with the reason, where its backend does not serve it here."""
    try:
        with torch.set_grad_enabled(case.kind == "grad"):
            resolve(case.config, m.DTYPES[case.dtype], torch.device(device), case.backend)
    except ValueError as e:
        raise m.Unserved(str(e)) from None
    return KINDS[case.kind](case, device, ceilings, seconds=seconds)


def cases(device: str, quick: bool) -> tuple[Case, ...]:
    return (QUICK_GPU if quick else GPU_CASES) if device == "cuda" else QUICK_CPU if quick else CPU_CASES


def items(device: str, quick: bool) -> Iterator[tuple[str, dict, Callable]]:
    """(name, the case as data, call with (ceilings)), most important first."""
    for case in cases(device, quick):
        yield case.name, asdict(case), partial(measured, case, device, seconds=m.seconds(device, quick))
