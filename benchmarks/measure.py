"""What every device measurement shares: counted work, times, the ceilings of the card, and the check a result
passes before it is timed.

Times are taken with CUDA events around single calls, back to back, in rotation over several sets of random
inputs that together exceed the L2 cache; on a CPU with the host's clock. ``host_ms`` is what the host spends
on a call with an idle queue: where it is close to ``ms``, the host is what was measured. Ceilings are
measured in the same run: a device-to-device copy (bytes read + written), and torch's matmul, on a CPU a loop of
fused multiply-adds.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fma_peak import fma_rate
from hope_kernels import TitansConfig

ROOT = Path(__file__).parents[1]
SOURCES = ("hope_kernels/**/*.py", "csrc/**/*.*")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def source_hash() -> str:
    """16 hex digits over the package and the kernels: a figure belongs to this code."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in SOURCES for p in ROOT.glob(pattern) if p.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


# -- counted work --------------------------------------------------------------------------------------------


def flops_per_token(c: TitansConfig) -> float:
    """Of all memories of one layer; the slower clock's C. 80 D N becomes 70 D N without target norms and
    deviations from a base."""
    H, D, N, C = c.num_heads, c.head_dim, c.hidden, max(c.chunk_memory, c.chunk_other)
    bare = not c.target_norm and c.retain_to == "zero"
    return H * ((70 if bare else 80) * D * N + 10 * C * N + 2 * C * D + 2 * C * C)


def weights_per_head(c: TitansConfig) -> int:
    """Numbers in the memories of one head: k, v, memory with D outputs, eta and alpha with one."""
    return 8 * c.head_dim * c.hidden + 2 * c.hidden


def prefill_bytes(c: TitansConfig, B: int, T: int, itemsize: int) -> int:
    """What a call cannot avoid: x and q read, o written, initial weights read, fp32 deviations read and
    written once."""
    tokens = 3 * B * T * c.d_model * itemsize
    return tokens + c.num_heads * weights_per_head(c) * (itemsize + 2 * B * 4)


def state_bytes_per_chunk(c: TitansConfig, B: int) -> int:
    """Per chunk, if the state goes through memory (or L2) instead of staying on the chip: fp32 in and out, a
    16-bit copy."""
    return B * 8 * c.num_heads * c.hidden * c.head_dim * (4 + 4 + 2)


def step_bytes(c: TitansConfig, B: int, itemsize: int, commit: bool, rounded: bool = False) -> int:
    """One token a row: every fast weight read once (base and deviation; rounded: their rounded sum), x, q read,
    o written, k, v stored; a commit reads the open chunk's k, v and reads and writes the deviations."""
    C, weights = max(c.chunk_memory, c.chunk_other), c.num_heads * weights_per_head(c)
    moved = weights * (itemsize * B if rounded else itemsize + 4 * B) + 5 * B * c.d_model * itemsize
    return moved + (2 * 4 * B * weights + 2 * B * C * c.d_model * itemsize if commit else 0)


# -- times ---------------------------------------------------------------------------------------------------


class Times(dict):
    """What a record keeps of several times; ``samples`` has them all, in the order they were taken."""

    def __init__(self, samples: list[float]):
        s = sorted(samples)
        super().__init__(median=statistics.median(s), min=s[0], p90=quantile(s, 0.9), n=len(s))
        self.samples = samples


def stats(values: list[float]) -> Times:
    return Times(list(values))


def quantile(values: list[float], q: float) -> float:
    """The smallest value that is at least as large as a share q of all."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def seconds(device: str, quick: bool) -> float:
    """About how long a case is timed."""
    return 0.05 if quick else 1.0 if device == "cuda" else 0.3


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def sets_for(nbytes: int, device: str) -> int:
    """Input sets of ``nbytes`` to rotate through: three times the L2 cache, 2 to 16, a third of the free
    memory at most."""
    if device != "cuda":
        return 2
    L2, free = torch.cuda.get_device_properties(0).L2_cache_size, torch.cuda.mem_get_info()[0]
    return max(1, min(max(2, math.ceil(3 * L2 / nbytes)), 16, free // (3 * nbytes)))


def recorded(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events before and after a call; ``first.elapsed_time(second)`` is its ms once the device is done."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    return start, end


def host_ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def time_calls(calls: list[Callable[[], object]], device: str, seconds: float = 1.0) -> dict:
    """{"ms": ..., "host_ms": ...} of one call, over ``calls`` in rotation: 5 to 500 of them, about
    ``seconds`` in all. On a CPU both were the same: there is no "host_ms"."""
    for call in calls * (1 + 2 // len(calls)):
        call()
    sync(device)
    first = host_ms(lambda: (calls[0](), sync(device)))
    n = max(5, min(500, int(1e3 * seconds / max(first, 1e-3))))
    order = [calls[i % len(calls)] for i in range(n)]
    if device != "cuda":
        return {"ms": stats([host_ms(call) for call in order])}
    host = []
    for call in (calls * 5)[:5]:
        sync(device)
        host.append(host_ms(call))
    pairs = [recorded(call) for call in order]
    torch.cuda.synchronize()
    return {"ms": stats([a.elapsed_time(b) for a, b in pairs]), "host_ms": stats(host)}


def captured(calls: list[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, list]:
    """A CUDA graph of all ``calls`` in turn, and what they return, which every replay rewrites. Raises what
    the capture raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls * (1 + 2 // len(calls)):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    return graph, kept


class WrongResult(Exception):
    """What was to be timed computes something else."""


class Unserved(Exception):
    """A configuration that a backend does not serve on this machine."""


def time_graph(calls: list[Callable[[], object]], seconds: float = 1.0) -> dict:
    """{"ms": ...} of one call inside a CUDA graph of all ``calls``; raises what the capture raises, and
    WrongResult if a replay does not write the (first) tensors that the calls return outside the graph, bit
    for bit."""
    graph, kept = captured(calls)
    output = lambda found: found if isinstance(found, Tensor) else found[0]
    for found in kept:
        output(found).fill_(math.nan)
    graph.replay()
    if not all(torch.equal(output(found), output(call())) for found, call in zip(kept, calls)):
        raise WrongResult("a replay of the CUDA graph and the call itself differ")
    ms = time_calls([graph.replay], "cuda", seconds)["ms"]
    return {"ms": stats([v / len(calls) for v in ms.samples])}


def turns(
    calls: dict[str, Callable], device: str, seconds: float, least: int = 3, most: int = 8
) -> dict[str, Times]:
    """ms of each call, in turn: ``least`` rounds, and up to ``most`` while ``seconds`` last."""
    spent, began = {name: [] for name in calls}, time.perf_counter()
    while (n := len(next(iter(spent.values())))) < least or (n < most and time.perf_counter() - began < seconds):
        for name, call in calls.items():
            spent[name].append(host_ms(lambda call=call: (call(), sync(device))))
    return {name: stats(ms) for name, ms in spent.items()}


# -- ceilings ------------------------------------------------------------------------------------------------


def ceiling(name: str, device: str, quick: bool) -> dict:
    """The record of one ceiling: "copy" in GB/s, "matmul bf16", "matmul fp16", "matmul fp32" (tf32 off) and, of a CPU,
    "fma fp32" in TFLOP/s."""
    seconds = 0.05 if quick else 0.5
    if name == "fma fp32":
        return {"TFLOP/s": fma_rate(torch.get_num_threads()) / 1e12}
    if name == "copy":
        n = 2**24 if quick else 2**30 if device != "cuda" else min(2**31, torch.cuda.mem_get_info()[0] // 8)
        a = torch.randint(0, 255, (n,), dtype=torch.uint8, device=device)
        b = torch.empty_like(a)
        found = time_calls([lambda: b.copy_(a)], device, seconds)
        return found | {"bytes": 2 * n, "GB/s": 2 * n / found["ms"]["median"] / 1e6}
    torch.backends.cuda.matmul.allow_tf32 = False
    n, dtype = 512 if quick else 8192 if device == "cuda" else 1024, DTYPES[name.split()[1]]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    found = time_calls([lambda: a @ b, lambda: b @ a], device, seconds)
    return found | {"shape": [n, n, n], "flops": 2 * n**3, "TFLOP/s": 2 * n**3 / found["ms"]["median"] / 1e9}


class Beside(dict):
    """The ceilings of a CPU, whose cores others may share, around a case: GB/s of a copy (read + written), the best of
    sixteen, and TFLOP/s of a loop of fused multiply-adds, the best of twenty: half of them when this is made, before
    the case, and half when first asked for a value, after its timing. Without a C compiler there is no such loop."""

    def __init__(self, quick: bool):
        size = 2**20 if quick else 2**25
        self._a, self._b, self._asked = torch.ones(size), torch.ones(size), False
        self._look()

    def _look(self) -> None:
        ms = turns({"copy": lambda: self._a.copy_(self._b)}, "cpu", 0.0, least=8)
        found = {"copy": 8 * self._a.numel() / ms["copy"]["min"] / 1e6}
        with suppress(FileNotFoundError):
            found["fma fp32"] = fma_rate(torch.get_num_threads()) / 1e12
        self.update({name: max(rate, super(Beside, self).get(name, 0.0)) for name, rate in found.items()})

    def get(self, name: str, default=None):
        if not self._asked:
            self._asked = True
            self._look()
        return super().get(name, default)


def rates(record: dict, ceilings: dict, dtype: str, flops: float | None, nbytes: float) -> dict:
    """A timed record with its FLOPs (None: bytes are what counts), bytes, rates and what fractions of the
    measured ceilings these are."""
    ms = record["ms"]["median"]
    found = {"bytes": nbytes, "GB/s": nbytes / ms / 1e6}
    if flops is not None:
        found |= {"flops": flops, "TFLOP/s": flops / ms / 1e9}
    on_cpu = "fma fp32" in ceilings
    products = ("of_fma", "TFLOP/s", "fma fp32") if on_cpu else ("of_matmul", "TFLOP/s", f"matmul {dtype}")
    for key, unit, name in (products, ("of_copy", "GB/s", "copy")):
        if unit in found:
            found[key] = found[unit] / ceilings[name] if ceilings.get(name) else None
    return record | found


# -- checks --------------------------------------------------------------------------------------------------


def rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())


def compare(ours: dict[str, Tensor], peer: dict[str, Tensor], exact: dict[str, Tensor]) -> dict:
    """Whether every tensor of ``ours`` is at most twice as far from the fp64 result as chunked PyTorch in the
    same dtype, or 8 eps.

    A peer that is itself off by more than a tenth proves nothing, and NaN never passes. Errors are relative
    to rms(exact).
    """
    worst = {"ok": True, "share": -1.0}
    for name, t in ours.items():
        size, theirs = rms(exact[name]), rms(peer[name] - exact[name])
        alike = t.shape == peer[name].shape and t.dtype == peer[name].dtype
        error = rms(t - exact[name]) if alike else math.inf
        allowed = max(2 * theirs, 8 * torch.finfo(peer[name].dtype).eps * size)
        ok = error <= allowed and theirs <= 0.1 * size
        share = error / allowed if allowed > 0 else 0.0 if ok else math.inf
        if (worst["ok"] and not ok) or (worst["ok"] == ok and share > worst["share"]):
            unit = size or 1.0
            worst = {
                "ok": ok, "share": share, "tensor": name, "error": error / unit, "allowed": allowed / unit,
                "peer": theirs / unit
            }
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in worst.items()}


def verified(
    piece: Callable[[], dict], whole: Callable[[], dict], cut: Callable[[Tensor], Tensor], peer: dict, exact: dict
) -> dict:
    """Whether a call may be timed: {"ok": ..., "reason": ...} and the largest error.

    piece, whole: the call on its first rows and tokens, and all of it, results by name; "o" is the output and
    ``cut`` its part that belongs to the piece. peer, exact: the piece by the chunked backend in the same
    dtype and in fp64. The piece must pass ``compare``; the whole call, twice into poisoned memory, must write
    every vector, repeat bit for bit and agree with the piece.
    """
    with poisoned():
        small = compare(piece(), peer, exact)
        first, again = whole(), whole()
    if not small["ok"]:
        return small | {"reason": f"{small['tensor']} differs from the fp64 chunked backend"}
    if not complete(first["o"]):
        return small | {"ok": False, "reason": "the whole call left outputs unwritten, zero or not finite"}
    if not all(torch.equal(first[n], again[n]) for n in first):
        return small | {"ok": False, "reason": "two equal calls gave different bits"}
    start = compare({"o": cut(first["o"])}, peer, exact)
    return (
        small if start["ok"] else start
        | {"reason": "the start of the whole call differs from the fp64 chunked backend"}
    )


def complete(o: Tensor) -> bool:
    """Every vector along the last axis was written: finite and not all zero."""
    return bool(o.isfinite().all()) and bool((o != 0).any(-1).all())


@contextmanager
def poisoned():
    """Uninitialised memory holds NaN: a part of PyTorch's deterministic mode, here without its errors and
    warnings."""
    before, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
