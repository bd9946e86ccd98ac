"""Writing text on a CPU with the bundled model: a token's time in ``generate``, the step in one call of C++, and
beside it in calls of PyTorch, in the same rounds.

    python -m benchmarks.bench_decode [--tokens 200] [--rounds 9] [--threads 1] [--out FILE]

Times are those of the whole loop: the step, the draw, stops, and with learning on the segments learned on the way.
What reading the prompt takes is not in them: a round is the difference of two runs of different length.
``step`` is the call of C++ alone. One case is a random model of the same width and depth with attention. Where the
wheels xllamacpp and gguf are installed, llama.cpp writes as many tokens with a random Llama of as many weights, in the
same rounds, by its own clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from benchmarks import llama_cpp
from benchmarks.bench_model import flops_per_token
from benchmarks.fma_peak import fma_rate
from benchmarks.machine import machine, write_json
from benchmarks.measure import ROOT
from benchmarks.sources import mark
from benchmarks.studies import KJV, text
from hope_kernels import Decoder, HopeForCausalLM
from hope_kernels.engine import native

RESULT = ROOT / "benchmarks" / "results" / "decode.json"
CASES = tuple((B, learn, how) for B in (1, 4, 16) for learn in ("off", "next_token") for how in ("greedy",)) + (
    (1, "off", "drawn"), (1, "off", "greedy, attention"),
)
HOW = {"greedy": {}, "drawn": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "seed": 1}, "greedy, attention": {}}


@contextmanager
def in_pytorch():
    """Steps as calls of the model."""
    with mock.patch.object(native, "unserved", lambda *_: "measured without"):
        yield


def prompts(B: int) -> Tensor:
    """[B, 256] bytes of the held-out text."""
    data = text(KJV)
    return torch.tensor([list(data[1000 * b : 1000 * b + 256]) for b in range(B)])


def per_token(model: HopeForCausalLM, ids: Tensor, tokens: int, **how) -> float:
    """Microseconds of a step."""
    took = []
    for n in (tokens // 4, tokens + tokens // 4):
        began = time.perf_counter()
        model.generate(ids, n, **how)
        took.append(time.perf_counter() - began)
    return (took[1] - took[0]) / tokens * 1e6


@torch.no_grad()
def step_alone(model: HopeForCausalLM, ids: Tensor, steps: int = 64) -> float:
    """Microseconds of the call of C++: the mean over whole chunks, commits included."""
    state = model.init_state(len(ids))
    model(ids, state)
    decoder = Decoder(model, state)
    decoder.step(ids[:, :1])
    step = decoder._native
    assert step is not None
    began = time.perf_counter()
    for _ in range(steps):
        step.ready(state, True)
        step.ended(step.step())
        for part in (state, *state.mixers):
            part.pos[:] = [p + 1 for p in part.pos]
    return (time.perf_counter() - began) / steps * 1e6


def with_attention(model: HopeForCausalLM) -> HopeForCausalLM:
    """Attention in place of the memories of ``model``."""
    c = model.config
    assert c.titans is not None
    torch.manual_seed(0)
    config = c.replace(mixer="attention", titans=None, num_heads=c.titans.num_heads, num_kv_heads=c.titans.num_heads)
    return HopeForCausalLM(config).eval()


def summary(values: list[float]) -> dict:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokens", type=int, default=200)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", default=RESULT)
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    bundled = HopeForCausalLM.from_pretrained("hope-byte")
    weights = sum(p.numel() for p in bundled.parameters())
    attention = with_attention(bundled)
    peer = None if llama_cpp.absent() else llama_cpp.like(bundled, args.threads)
    cases, ceiling, flops = [], fma_rate(args.threads), flops_per_token(bundled)
    for B, learn, how in CASES:
        model = attention if how.endswith("attention") else bundled
        ids, given = prompts(B), {"learn": learn, **HOW[how]}
        with in_pytorch():
            want = model.generate(ids, 40, **given).tokens
        same = bool((model.generate(ids, 40, **given).tokens == want).all())
        ours, theirs, alone, llama = [], [], [], []
        for _ in range(args.rounds):
            ours.append(per_token(model, ids, args.tokens, **given))
            alone.append(step_alone(model, ids))
            with in_pytorch():
                theirs.append(per_token(model, ids, args.tokens, **given))
            if peer is not None and (B, learn, how) == CASES[0]:
                llama.append(peer.per_token(ids[0].tolist(), args.tokens))
        case = {
            "B": B, "learn": learn, "how": how, "same tokens": same, "us": summary(ours), "step": summary(alone),
            "pytorch": summary(theirs), "ratio": summary([b / a for a, b in zip(ours, theirs)]),
        }
        if llama:
            case["llama.cpp"] = summary(llama)
        ceiling = max(ceiling, fma_rate(args.threads))
        cases.append(case)
        print(f"B {B} {learn} {how}: {case['us']['median']:.0f} us a step ({case['step']['median']:.0f} in C++), "
              f"in PyTorch {case['pytorch']['median']:.0f}: {case['ratio']['median']:.1f}x", flush=True)
    write_json(args.out, {
        "what": __doc__.split("\n")[0], "machine": machine() | {"threads": args.threads}, "model": "hope-byte",
        "weights": weights, "tokens": args.tokens, "rounds": args.rounds, "flops": flops, "fma gflops": ceiling / 1e9,
        "cases": cases, **mark("model", device="cpu"),
    })


if __name__ == "__main__":
    main()
