"""What a step of training costs on a CPU: the memory's gradient by autograd through the chunked backend and by the
C++ library, in interleaved rounds.

    python -m benchmarks.bench_train [--threads N] [--batch N] [--tokens N] [--rounds N] [--out JSON]

The model and the batch are the defaults of examples/train_lm.py, the optimizer is AdamW (that one steps matrices by
DeltaMomentum); the states of the memories are carried from step to step. Microseconds a token of a whole step: forward,
backward, clipping and optimizer. Before anything is timed both backends' gradients of the first step are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.bench_model import flops_per_token
from benchmarks.fma_peak import fma_rate
from benchmarks.machine import machine, write_json
from benchmarks.measure import ROOT
from benchmarks.sources import mark
from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig

RESULT = ROOT / "benchmarks" / "results" / "train.json"
BACKENDS = ("chunked", "cpp")
PARTS = ("forward", "backward", "optimizer", "step")


class Training:
    """A model of examples/train_lm.py's configuration that reads random bytes on one backend."""

    def __init__(self, backend: str, batch: int, tokens: int):
        torch.manual_seed(0)
        titans = TitansConfig(128, 4, chunk_memory=16, chunk_other=16)
        cms = CMSConfig(128, (64, 256), expansion=2.0)
        self.backend, self.tokens = backend, batch * tokens
        self.model = HopeForCausalLM(HopeConfig(256, 128, 3, titans=titans, cms=cms))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), fused=True)
        self.ids, self.state = torch.randint(0, 256, (batch, tokens + 1)), self.model.init_state(batch)

    def gradients(self) -> list[torch.Tensor]:
        """Of one step, none of which is taken."""
        self.loss()[0].backward()
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def loss(self):
        logits, state = self.model(self.ids[:, :-1], self.state, backend=self.backend)
        return F.cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten()), state

    def step(self) -> dict[str, float]:
        """Microseconds a token, by part."""
        at = [time.perf_counter()]
        loss, state = self.loss()
        at.append(time.perf_counter())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        at.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.state = state.detach()
        at.append(time.perf_counter())
        ends = [*zip(at, at[1:]), (at[0], at[-1])]
        return {name: (b - a) * 1e6 / self.tokens for name, (a, b) in zip(PARTS, ends)}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--out", default=RESULT)
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    runs = {backend: Training(backend, args.batch, args.tokens) for backend in BACKENDS}
    for a, b in zip(*(run.gradients() for run in runs.values())):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
    found: dict[str, list[dict[str, float]]] = {backend: [] for backend in BACKENDS}
    for i in range(args.rounds + 1):
        for backend, run in runs.items():
            times = run.step()
            if i:  # the first warms up
                found[backend].append(times)
    cases, model = [], runs["cpp"].model
    for backend, steps in found.items():
        us = {part: sorted(s[part] for s in steps) for part in PARTS}
        us = {part: {"median": statistics.median(v), "least": v[0], "most": v[-1]} for part, v in us.items()}
        cases.append({"backend": backend, "us": us})
        print(backend, {part: round_(of) for part, of in us.items()}, flush=True)
    print("ratio of medians", round(cases[0]["us"]["step"]["median"] / cases[1]["us"]["step"]["median"], 2))
    write_json(args.out, {
        "what": __doc__.split("\n\n")[0].replace("\n", " "), "machine": machine() | {"threads": args.threads},
        "batch": args.batch, "tokens": args.tokens, "rounds": args.rounds, "cases": cases,
        "flops": 3 * flops_per_token(model), "fma gflops": fma_rate(args.threads) / 1e9,
        **mark("train", device="cpu"),
    })


def round_(times: dict[str, float]) -> str:
    return f"{times['median']:.1f} ({times['least']:.1f}..{times['most']:.1f})"


if __name__ == "__main__":
    main()
