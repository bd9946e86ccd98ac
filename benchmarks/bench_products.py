"""Products of tokens with a weight, y = x W^T in fp32, on one core: those of this package, whose bits depend on no
company (csrc/cpu/linear_run.h), beside PyTorch's, and oneDNN's with the weight packed for it beforehand.

    python -m benchmarks.bench_products [--rounds 9] [--out FILE]

The three take turns; the best of all rounds counts, of each and of the loop of multiply-adds beside them: whatever else
the machine does can only lower them. Before anything is timed the three are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fma_peak import fma_rate
from benchmarks.machine import machine, write_json
from benchmarks.measure import ROOT
from benchmarks.sources import mark
from hope_kernels.ops.linear.cpp import linear

RESULT = ROOT / "benchmarks" / "results" / "products.json"
SHAPES = ((512, 128, 128), (512, 128, 256), (512, 256, 256), (512, 256, 1024), (512, 512, 512), (256, 576, 1536),
          (256, 2048, 2048), (64, 512, 512), (16, 512, 512), (16, 2048, 2048), (1, 512, 512), (1, 2048, 2048))
LONG = 2e-2  # seconds that a round takes at least
AGREE = 1e-5  # the largest difference of two ways, of the largest number


def packed(W: Tensor, tokens: int) -> Tensor:
    """As oneDNN wants W [R, K] for so many tokens."""
    return torch.ops.mkldnn._reorder_linear_weight(W, tokens)


def ways(x: Tensor, W: Tensor) -> dict[str, Callable[[], Tensor]]:
    theirs = packed(W, x.shape[0])
    return {
        "own": lambda: linear(x, W),
        "pytorch": lambda: F.linear(x, W),
        "onednn": lambda: torch.ops.mkldnn._linear_pointwise(x, theirs, None, "none", [], ""),
    }


def gflops(call: Callable[[], Tensor], products: int) -> float:
    """Of one round."""
    calls = max(1, round(LONG * 50e9 / (2 * products)))
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return 2 * products * calls / (time.perf_counter() - began) / 1e9


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--out", default=RESULT)
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    cases, ceiling = [], fma_rate(1)
    for n, K, R in SHAPES:
        g = torch.Generator().manual_seed(0)
        calls = ways(torch.randn(n, K, generator=g), torch.randn(R, K, generator=g))
        ours = calls["own"]()
        for name, call in calls.items():
            difference = float((call() - ours).abs().max() / ours.abs().max())
            if not difference <= AGREE:
                raise RuntimeError(f"{n} x {K} x {R}: {name} differs by {difference:.1e}; no speed is reported for a "
                                   "wrong result")
        found = dict.fromkeys(calls, 0.0)
        for _ in range(args.rounds):
            for name, call in calls.items():
                found[name] = max(found[name], gflops(call, n * K * R))
        ceiling = max(ceiling, fma_rate(1))
        cases.append({"tokens": n, "inputs": K, "outputs": R, "gflops": found})
        print(f"{n} x {K} x {R}: " + ", ".join(f"{name} {rate:.0f}" for name, rate in found.items()), flush=True)
    write_json(args.out, {
        "what": __doc__.split("\n")[0], "machine": machine(), "rounds": args.rounds, "fma gflops": ceiling / 1e9,
        "cases": cases, **mark("linear", "cpp", "cpu"),
    })


if __name__ == "__main__":
    main()
