"""Reading with as many threads as there are cores, while as many other processes want all of them: with the brief
waiting that hope_kernels asks OpenMP for (hope_kernels/waiting.py), and with OpenMP's own.

    python -m benchmarks.bench_busy [--tokens 1024] [--rounds 5] [--out FILE]

Every figure is of a process of its own, which reads with the bundled model and learning off; all in turn, in each
round. ``idle`` is without the other processes (whatever else the machine does).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from contextlib import contextmanager

from benchmarks.machine import machine, write_json
from benchmarks.measure import ROOT
from benchmarks.sources import mark

RESULT = ROOT / "benchmarks" / "results" / "busy.json"
READ = """
import sys, time
if {theirs}: import torch
from hope_kernels import HopeForCausalLM
import torch
torch.set_num_threads({threads})
model, ids = HopeForCausalLM.from_pretrained("hope-byte"), torch.arange({tokens}).remainder(256).unsqueeze(0)
with torch.no_grad():
    for _ in range(2):
        state, began = model.init_state(1), time.perf_counter()
        model(ids, state)
print((time.perf_counter() - began) / {tokens} * 1e6)
"""
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def per_token(threads: int, tokens: int, theirs: bool) -> float:
    """Microseconds; theirs: PyTorch is imported first, so OpenMP waits as it likes."""
    env = {n: v for n, v in os.environ.items() if n not in VARIABLES}
    script = READ.format(theirs=theirs, threads=threads, tokens=tokens)
    command = [sys.executable, "-c", script]
    return float(subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@contextmanager
def busy(processes: int):
    """With ``processes`` others that compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", default=RESULT)
    args = p.parse_args(argv)
    cores = len(os.sched_getaffinity(0))
    ways = {"brief": (cores, False), "OpenMP's own": (cores, True), "one thread": (1, False)}
    cases = []
    for others in (0, cores):
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, (threads, theirs) in ways.items():
                with busy(others):
                    found[name].append(per_token(threads, args.tokens, theirs))
        case = {name: {"median": statistics.median(v), "least": min(v), "most": max(v)} for name, v in found.items()}
        cases.append({"other processes": others, "us": case})
        print(others, {name: round(of["median"], 1) for name, of in case.items()}, flush=True)
    write_json(args.out, {
        "what": __doc__.split("\n")[0], "machine": machine() | {"threads": cores}, "tokens": args.tokens,
        "rounds": args.rounds, "cases": cases, **mark("model", device="cpu"),
    })


if __name__ == "__main__":
    main()
