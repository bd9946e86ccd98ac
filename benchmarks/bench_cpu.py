"""One layer on the CPU beside the token loop of the PyPI package nested-learning 0.2.0, titans-pytorch 0.5.5,
and the ceiling of the machine's cores.

    python -m benchmarks.bench_cpu [--rounds 5] [--out benchmarks/results/cpu.json]

B = 1, T = 512, fp32. "same" is the preset ``nested_learning`` with the package's weights: the same function,
outputs compared. "drop_in" is the class of ``compat.nested_learning``, called as the package's is, a new state
included; also with the package's default chunks of one token, there at T = 64 and d = 64 and 256. "default" is the
default configuration, which does more (output projection, gate, target norm, step clip). titans-pytorch's memory, where
it is installed, is a two-layer MLP of the same width and chunk that computes another function: speed only. Each
round times a loop of fused multiply-adds on as many threads (fma_peak.py; the best of all rounds is the ceiling),
ours (the default backend, median of five calls) and the packages, in turn; figures are medians over the rounds,
with minimum and maximum. FLOPs per token by the count H (c D N + 10 C N + 2 C D + 2 C^2) + 8 d^2, c = 80, or 70
for "same" (no deviation from a base, no target norm; projections 2 d^2).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time

import torch

from benchmarks.fma_peak import fma_rate
from benchmarks.machine import machine, write_json
from benchmarks.sources import mark
from hope_kernels import SelfModifyingTitans, TitansConfig, available_backends
from hope_kernels.compat.nested_learning import SelfModifyingTitans as DropIn
from hope_kernels.compat.nested_learning import SelfModifyingTitansConfig as DropInConfig

RESULT = os.path.join(os.path.dirname(__file__), "results", "cpu.json")
CASES = ((64, 16), (256, 16), (256, 64))
T = 512
DEFAULT_CHUNKS = {"default_chunks": (64, 1, 64), "default_chunks_wide": (256, 1, 64)}  # d, chunk, T


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed(f) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def flops(d: int, chunk: int, same: bool) -> float:
    """Per token, one head of width d with d hidden units."""
    memories = (70 if same else 80) * d * d + 10 * chunk * d + 2 * chunk * d + 2 * chunk**2
    return memories + (2 if same else 8) * d * d


def copy_weights(layer: SelfModifyingTitans, wheel) -> None:
    """The package's weights in our layer (one head)."""
    with torch.no_grad():
        layer.conv.copy_(wheel.local_conv.weight[:, 0])
        layer.q_proj.weight.copy_(wheel.w_q.weight)
        for name in layer.layout.names:
            theirs = getattr(wheel, f"m_{name}")
            for part, ours in layer.memory_init(name).items():
                ours[0].copy_(getattr(theirs, part).weight)


def titans_pytorch(d: int, chunk: int):
    """The package's memory as a module, or None where it is not installed."""
    try:
        from titans_pytorch import NeuralMemory
    except ImportError:
        return None
    model = {"depth": 2, "expansion_factor": 1.0}
    return NeuralMemory(
        d, chunk_size=chunk, batch_size=chunk, dim_head=d, heads=1, default_model_kwargs=model
    ).eval()


def geometric_mean(cases: list[dict], key: str) -> float:
    return math.exp(statistics.fmean(math.log(c[key]["median"]) for c in cases))


def case(d: int, chunk: int, rounds: int, T: int = T) -> dict:
    from nested_learning.titan.self_modifying import SelfModifyingTitans as Package
    from nested_learning.titan.self_modifying import SelfModifyingTitansConfig as PackageConfig

    torch.manual_seed(0)
    x = torch.randn(1, T, d)
    package = Package(PackageConfig(d, chunk_size_other=chunk, chunk_size_memory=chunk))
    same = SelfModifyingTitans(
        TitansConfig.preset("nested_learning", d_model=d, chunk_memory=chunk, chunk_other=chunk)
    )
    copy_weights(same, package)
    drop_in = DropIn(DropInConfig(d, chunk_size_other=chunk, chunk_size_memory=chunk))
    drop_in.load_state_dict(package.state_dict())
    default = SelfModifyingTitans(TitansConfig(d, chunk_memory=chunk, chunk_other=chunk))

    def theirs():
        return package.forward_with_updates(x, package.init_fast_state())[0]

    def dropped_in():
        return drop_in.forward_with_updates(x, drop_in.init_fast_state())[0]

    titans = titans_pytorch(d, chunk)

    with torch.no_grad():
        their_out = theirs()
        error = max(float((o - their_out).norm() / their_out.norm()) for o in (same(x)[0], dropped_in()))
        if error > 1e-4:
            raise RuntimeError(
                f"d={d} chunk={chunk}: outputs differ by {error:.1e}; no speed is reported for a wrong result"
            )
        default(x)
        if titans is not None:
            titans(x)
        seen: dict[str, list[float]] = {}
        for _ in range(rounds):
            rate = fma_rate(torch.get_num_threads())
            ours = statistics.median(timed(lambda: same(x)) for _ in range(5))
            compat = statistics.median(timed(dropped_in) for _ in range(5))
            full = statistics.median(timed(lambda: default(x)) for _ in range(5))
            loop = timed(theirs)
            if titans is not None:
                other = timed(lambda: titans(x))
                seen.setdefault("titans_pytorch", []).append(T / other)
                seen.setdefault("ratio_titans_pytorch", []).append(other / full)
            for key, value in (
                ("fma_gflops", rate / 1e9), ("same", T / ours), ("default", T / full), ("package", T / loop),
                ("ratio", loop / ours), ("drop_in", T / compat), ("ratio_drop_in", loop / compat),
                ("ratio_default", loop / full), ("of_fma", T * flops(d, chunk, True) / ours),
                ("of_fma_default", T * flops(d, chunk, False) / full),
            ):
                seen.setdefault(key, []).append(value)
    ceiling = 1e9 * max(seen["fma_gflops"])
    for key in ("of_fma", "of_fma_default"):
        seen[key] = [rate / ceiling for rate in seen[key]]
    return {"dim": d, "chunk": chunk, "T": T, "relative_error": error, **{k: spread(v) for k, v in seen.items()}}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", default=RESULT)
    args = p.parse_args()
    backend = "cpp" if available_backends()["cpp"] is None else "chunked"
    result = {"what": __doc__.split("\n")[0], "machine": machine(), "peer": "nested-learning 0.2.0",
              "backend": backend,
              **mark("layer", backend), "rounds": args.rounds, "cases": []}
    print(f"{'dim':>5}{'chunk':>6}{'ours tok/s':>12}{'default':>10}{'package':>9}{'ratio':>8}{'of FMA':>9}"
          f"{'default':>9}{'FMA GF/s':>11}{'error':>9}{'drop-in':>9}")
    for d, chunk in CASES:
        c = case(d, chunk, args.rounds)
        result["cases"].append(c)
        result["geometric_mean_ratio"] = geometric_mean(result["cases"], "ratio")
        result["geometric_mean_drop_in"] = geometric_mean(result["cases"], "ratio_drop_in")
        write_json(args.out, result)
        m = {k: v["median"] for k, v in c.items() if isinstance(v, dict)}
        print(f"{d:5}{chunk:6}{m['same']:12.0f}{m['default']:10.0f}{m['package']:9.0f}{m['ratio']:8.1f}"
              f"{m['of_fma']:9.0%}{m['of_fma_default']:9.0%}{m['fma_gflops']:11.1f}{c['relative_error']:9.1e}"
              f"{m['ratio_drop_in']:9.1f}")
    for name, (d, chunk, tokens) in DEFAULT_CHUNKS.items():
        result[name] = case(d, chunk, args.rounds, tokens)
        write_json(args.out, result)
    print(f"geometric mean of the ratios: {result['geometric_mean_ratio']:.1f}, of the drop-in class "
          f"{result['geometric_mean_drop_in']:.1f}; with the package's default chunks "
          f"{result['default_chunks']['ratio_drop_in']['median']:.1f}, at d = 256 "
          f"{result['default_chunks_wide']['ratio_drop_in']['median']:.1f}")


if __name__ == "__main__":
    main()
