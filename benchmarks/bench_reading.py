"""Reading a text on a CPU with the bundled model, learning off and on: a token's time with segments that are learned
in C++, and beside it in calls of PyTorch, in the same rounds. And with learning off, of the model and of layers: with
products of our own (csrc/cpu/linear.h) and beside it with those of PyTorch's library, block by block.

    python -m benchmarks.bench_reading [--tokens 8192] [--rounds 9] [--threads 1] [--cpu-time] [--out FILE]

Rows read the held-out text from different places, in calls of 4096 tokens; "guarded" is what ``read`` does unless told
otherwise. ``--cpu-time`` counts the time that the process was at work, for a machine that others use as well. Before
anything is timed both ways read the same 512 tokens, and their losses (or outputs) are compared. "flops": of a token's
products; with learning, at least: what passes errors back through memories is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import llama_cpp
from benchmarks.bench_decode import summary
from benchmarks.bench_model import flops_per_token
from benchmarks.fma_peak import fma_rate
from benchmarks.machine import machine, write_json
from benchmarks.measure import ROOT
from benchmarks.measure import flops_per_token as of_memories
from benchmarks.sources import mark
from benchmarks.studies import KJV, text
from hope_kernels import HopeForCausalLM, SelfModifyingTitans, TitansConfig
from hope_kernels.engine import native_segment
from hope_kernels.engine.generation import read
from hope_kernels.ops.cms import cpp as cms
from hope_kernels.ops.linear import cpp as products

RESULT = ROOT / "benchmarks" / "results" / "reading.json"
HOW = {"off": {"learn": "off"}, "learning": {"learn": "next_token", "guard": False}, "guarded": {"learn": "next_token"}}
CASES = ((1, "learning"), (1, "guarded"), (4, "learning"))
LAYERS = ((256, 4), (512, 8), (2048, 16))  # d, heads
AGREE = 1e-4  # the largest difference of the two ways' losses over the first 512 tokens, in nats; of outputs, relative


@contextmanager
def in_pytorch():
    """Segments as calls of the model."""
    with mock.patch.object(native_segment, "unserved", lambda *_: "measured without"):
        yield


@contextmanager
def by_library():
    """Blocks one after another, with PyTorch's products."""
    def linear(
        x: Tensor, weight: Tensor, more: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        return y if more is None else more + y

    with mock.patch.object(products, "linear", linear), mock.patch.object(cms, "linear", linear), in_pytorch():
        yield


def rows(B: int, tokens: int) -> Tensor:
    """[B, tokens] bytes of the held-out text."""
    data = text(KJV)
    return torch.tensor([list(data[tokens * b : tokens * (b + 1)]) for b in range(B)])


def per_token(model: HopeForCausalLM, ids: Tensor, clock: Callable[[], float], how: str) -> float:
    """Microseconds."""
    began = clock()
    read(model, ids, **HOW[how])
    return (clock() - began) / ids.numel() * 1e6


def off_cases(model: HopeForCausalLM, rounds: int, clock: Callable[[], float]) -> list[dict]:
    """Calls of 512 tokens with learning off: microseconds a token, and how many times faster than ``by_library``."""
    found, ids, peer = [], rows(1, 512), None
    if not llama_cpp.absent():
        peer = llama_cpp.like(model, torch.get_num_threads())
    calls: dict[str, Callable[[], Tensor]] = {"model": lambda: model(ids)[0]}
    flops = {"model": flops_per_token(model)}
    for d, heads in LAYERS:
        layer, x = SelfModifyingTitans(TitansConfig(d, heads)), torch.randn(1, 512, d)
        calls[f"layer d={d} H={heads}"] = lambda layer=layer, x=x: layer(x)[0]
        flops[f"layer d={d} H={heads}"] = of_memories(layer.config) + 8 * d * d

    def per_call(call: Callable[[], Tensor]) -> float:
        began = clock()
        call()
        return (clock() - began) / 512 * 1e6

    for name, call in calls.items():
        ours = call()
        with by_library():
            theirs = call()
        difference = float((ours - theirs).norm() / theirs.norm())
        if not difference <= AGREE:
            raise RuntimeError(f"{name}: outputs differ by {difference:.1e}; no speed is reported for a wrong result")
        times: dict[str, list[float]] = {"us": [], "library": [], "fma gflops": []}
        if name == "model" and peer is not None:
            times["llama.cpp"] = [peer.per_read_token(ids[0].tolist()) for _ in range(4 * rounds)]
        for _ in range(4 * rounds):
            times["us"].append(per_call(call))
            with by_library():
                times["library"].append(per_call(call))
        times["fma gflops"] = [fma_rate(torch.get_num_threads()) / 1e9 for _ in range(rounds)]
        case = {"case": name, "difference": difference, "flops": flops[name]}
        case |= {n: summary(t) for n, t in times.items()}
        case["ratio"] = summary([a / b for a, b in zip(times["library"], times["us"])])
        found.append(case)
        us, library = statistics.median(times["us"]), statistics.median(times["library"])
        print(f"{name}, learning off: {us:.1f} us a token, with the library's products {library:.1f} "
              f"({case['ratio']['median']:.2f}x)", flush=True)
    return found


def flops_of_learning(model: HopeForCausalLM) -> float:
    """Of a token, at least: of reading it, of the gradients of levels by inputs and by weights, and of the head and of
    projections between blocks by inputs."""
    c = model.config
    levels = sum(2 * p.numel() for block in model.blocks if block.cms for p in block.cms.parameters() if p.dim() == 2)
    return flops_per_token(model) + 2 * levels + 2 * c.vocab_size * c.d_model + (c.num_layers - 1) * 8 * c.d_model**2


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--cpu-time", action="store_true")
    p.add_argument("--out", default=RESULT)
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    model, cases = HopeForCausalLM.from_pretrained("hope-byte"), []
    frozen = off_cases(model, args.rounds, clock)
    for B, how in CASES:
        ids = rows(B, args.tokens)
        ours = read(model, ids[:, :512], **HOW[how]).nats
        with in_pytorch():
            difference = float((read(model, ids[:, :512], **HOW[how]).nats - ours).abs().max())
        if not difference <= AGREE:
            raise RuntimeError(f"losses differ by {difference:.1e} nats; no speed is reported for a wrong result")
        times: dict[str, list[float]] = {"us": [], "pytorch": [], "off": []}
        for _ in range(args.rounds):
            times["us"].append(per_token(model, ids, clock, how))
            with in_pytorch():
                times["pytorch"].append(per_token(model, ids, clock, how))
            times["off"].append(per_token(model, ids, clock, "off"))
        case = {"B": B, "how": how, "difference": difference, "flops": flops_of_learning(model)}
        case |= {n: summary(t) for n, t in times.items()}
        for name, above, below in (("ratio", "pytorch", "us"), ("over off", "us", "off")):
            case[name] = summary([a / b for a, b in zip(times[above], times[below])])
        cases.append(case)
        us, pytorch, off = (statistics.median(times[n]) for n in ("us", "pytorch", "off"))
        print(f"B {B} {how}: {us:.1f} us a token, in PyTorch {pytorch:.1f} ({case['ratio']['median']:.2f}x); "
              f"learning off {off:.1f}", flush=True)
    write_json(args.out, {
        "what": __doc__.split("\n\n")[0].replace("\n", " "),
        "machine": machine() | {"threads": args.threads}, "model": "hope-byte",
        "clock": "cpu" if args.cpu_time else "wall", "tokens": args.tokens, "rounds": args.rounds, "cases": cases,
        "off": frozen,
        **mark("model", device="cpu"),
    })


if __name__ == "__main__":
    main()
