"""How exact the memories are: rms error relative to fp64, against the correlation of keys and for several
retentions.

    python -m benchmarks.bench_accuracy [--out benchmarks/results/accuracy.json]

One self-modifying layer, H = 2 heads of D = N = 64, chunks of 64, B = 2, T = 640. Tokens are x_t = sqrt(r) c
+ sqrt(1 - r) e_t with a common c: two of them have the correlation r, and so, about, have the keys that the
memories make of them. ``alpha`` is what the retention gate gives without a token's own part: 1 keeps all that
was written, small values forget it within a chunk. Errors are relative to the rms of what the chunked backend
gives in fp64; "o" is the output, "state" the largest of the learned deviations.
"""

from __future__ import annotations

import argparse
import math

import torch

from benchmarks import measure as m
from benchmarks.bench_titans import to
from benchmarks.machine import machine, write_json
from benchmarks.sources import mark
from hope_kernels import TitansConfig, available_backends
from hope_kernels.ops import FastWeights, Layout, TokenInputs, titans_chunk

RESULT = m.ROOT / "benchmarks" / "results" / "accuracy.json"
CONFIG = TitansConfig(128, 2, hidden_mult=1, chunk_memory=64, chunk_other=64, conv_window=None)
B, T, SEEDS = 2, 640, 3
CORRELATIONS = (0.0, 0.5, 0.9, 0.99)
ALPHAS = (0.5, 0.9, 0.999)
DEVIATIONS = ("delta2", "delta1", "delta1s")


def problem(correlation: float, alpha: float, seed: int) -> tuple[FastWeights, TokenInputs]:
    """fp64 weights and inputs; retention sigmoid(logit(alpha) + the memory's own part)."""
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    H, D = CONFIG.num_heads, CONFIG.head_dim
    tokens = lambda: math.sqrt(correlation) * random(B, 1, H, D) + math.sqrt(1 - correlation) * random(B, T, H, D)
    w = FastWeights(*(None if s is None else random(*s) * s[-1] ** -0.5 for s in Layout.of(CONFIG).shapes(H)))
    bias = torch.full((H,), math.log(alpha / (1 - alpha)), dtype=torch.float64)
    return w, TokenInputs(
        torch.nn.functional.normalize(tokens(), dim=-1), x=tokens(), eta_bias=torch.zeros_like(bias),
        alpha_bias=bias
    )


def rounded(found, dtype: torch.dtype):
    """In dtype and back: every backend and the fp64 result start from the same numbers."""
    return to(to(found, dtype), torch.float64)


@torch.no_grad()
def errors(correlation: float, alpha: float, backend: str, dtype: str, device: str) -> dict[str, float]:
    """{"o", "state"}: the largest over the seeds."""
    worst = {"o": 0.0, "state": 0.0}
    for seed in range(SEEDS):
        w, inputs = (rounded(found, m.DTYPES[dtype]) for found in problem(correlation, alpha, seed))
        exact, learned = titans_chunk(CONFIG, w, inputs, backend="chunked")
        place = lambda found: type(found)(*(None if t is None else t.to(device, m.DTYPES[dtype]) for t in found))
        o, state = titans_chunk(CONFIG, place(w), place(inputs), backend=backend)
        share = lambda a, b: m.rms(a.cpu() - b) / m.rms(b)
        found = {
            "o": share(o, exact), "state": max(share(getattr(state, n), getattr(learned, n)) for n in DEVIATIONS)
        }
        if not all(math.isfinite(e) for e in found.values()):
            raise RuntimeError(
                f"{backend} {dtype}, correlation {correlation}, alpha {alpha}: the result is not finite"
            )
        worst = {n: max(worst[n], e) for n, e in found.items()}
    return worst


def backends() -> list[tuple[str, str, str]]:
    """(backend, dtype, device) of what can be used here."""
    found = [("chunked", "fp32", "cpu"), ("chunked", "bf16", "cpu")]
    available = available_backends()
    found += [("cpp", "fp32", "cpu")] * (available["cpp"] is None)
    if torch.cuda.is_available():
        found += [(b, d, "cuda")
                  for b, d in (("chunked", "bf16"), ("triton", "fp32"), ("triton", "bf16"), ("cuda", "bf16"))
                  if available[b] is None]
    return found


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", default=str(RESULT))
    args = p.parse_args(argv)
    shape = {
        "H": CONFIG.num_heads, "D": CONFIG.head_dim, "N": CONFIG.hidden, "C": CONFIG.chunk_memory, "B": B,
        "T": T, "seeds": SEEDS
    }
    result = {"what": __doc__.split("\n")[0], "machine": machine(), "shape": shape, "cases": []}
    for backend, dtype, device in backends():
        for alpha in ALPHAS:
            for correlation in CORRELATIONS:
                found = errors(correlation, alpha, backend, dtype, device)
                case = {
                    "backend": backend, "dtype": dtype, "device": device, "alpha": alpha, "correlation": correlation
                }
                result["cases"].append(case | {"error": found} | mark("accuracy", backend))
                print(f"{backend:8} {dtype} {device:5} alpha {alpha:<6g} correlation {correlation:<5g} "
                      + "  ".join(f"{n} {e:.2e}" for n, e in found.items()), flush=True)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
