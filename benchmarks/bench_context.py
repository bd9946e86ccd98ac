"""Speed against context length: does reading or decoding slow down as a sequence grows? The bundled model and one layer, one thread.

    python -m benchmarks.bench_context [--longest 65536] [--out benchmarks/results/context.json]

The model reads one text, once with learning off and once on, and stops after 1024, 2048, ... bytes: tokens/s of the stretch since the last
stop, and ms of a decoded token from there, on a copy of the state. "learning" compares both over the longest read. The layer
(d = 256, one head, chunks of 64, the default backend) reads T tokens in one call. Seconds are those of the one thread's CPU clock: what
else runs on the machine costs caches, not turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from hope_kernels import HopeForCausalLM, SelfModifyingTitans, TitansConfig, available_backends, bundled_models
from hope_kernels.generation import read

from . import measure as m
from .bench_learning import text_bytes
from .machine import machine, write_json
from .sources import mark

RESULT = m.ROOT / "benchmarks" / "results" / "context.json"
TEXT = m.ROOT / "hope_kernels" / "assets" / "kjv-john-acts.txt.gz"
FIRST = 1024
WARM = 512  # bytes read before the clock starts


def cpu_ms(call) -> float:
    began = time.process_time()
    call()
    return 1e3 * (time.process_time() - began)


def stops(longest: int) -> list[int]:
    return [FIRST << i for i in range(64) if FIRST << i <= longest]


@torch.no_grad()
def decode(model: HopeForCausalLM, given, ids: torch.Tensor, learn: str) -> dict:
    """ms of a token, over two segments of ids [1, n], from a copy of the state."""
    state, ms = given.clone(), []
    for t in range(ids.shape[1]):
        began = time.process_time()
        state = model(ids[:, t : t + 1], state, learn=learn)[1]
        ms.append(1e3 * (time.process_time() - began))
    return {**m.stats(ms), "mean": statistics.fmean(ms)}


def reading(model: HopeForCausalLM, ids: torch.Tensor, learn: str, longest: int) -> dict:
    """{"points": one a stop, "tokens/s": over all of them}."""
    read(model, ids[:, :WARM], learn=learn)
    state, last, at, total, points = None, None, 0, 0.0, []
    for stop in stops(longest):
        began = time.process_time()
        found = read(model, ids[:, at:stop], state, learn=learn, last=last, check_finite=False)
        seconds = time.process_time() - began
        state, last = found.state, found.logits
        points.append({"tokens": stop, "tokens/s": (stop - at) / seconds, "state_bytes": state.nbytes(),
                       "decode_ms": decode(model, state, ids[:, stop : stop + 2 * model.segment], learn)})
        at, total = stop, total + seconds
        p = points[-1]
        print(f"{learn:11} {stop:7} tokens {p['tokens/s']:10.0f} tokens/s   decode {p['decode_ms']['median']:8.3f} ms", flush=True)
    return {"points": points, "tokens/s": at / total}


@torch.no_grad()
def layer(longest: int) -> list[dict]:
    torch.manual_seed(0)
    one, points = SelfModifyingTitans(TitansConfig(256, chunk_memory=64, chunk_other=64)), []
    one(torch.randn(1, WARM, 256))
    for T in stops(longest):
        x = torch.randn(1, T, 256)
        times = [cpu_ms(lambda: one(x)) for _ in range(5 if T < 16384 else 3)]
        points.append({"tokens": T, "ms": m.stats(times), "tokens/s": 1e3 * T / statistics.median(times)})
        print(f"layer       {T:7} tokens {points[-1]['tokens/s']:10.0f} tokens/s", flush=True)
    return points


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--longest", type=int, default=65536)
    p.add_argument("--out", default=str(RESULT))
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    model = HopeForCausalLM.from_pretrained(bundled_models()[0])
    ids = torch.tensor([list(text_bytes(str(TEXT), args.longest + 2 * model.segment))])
    backend = "cpp" if available_backends()["cpp"] is None else "chunked"
    result = {"what": __doc__.split("\n")[0], "machine": machine(), "model": bundled_models()[0]}
    result["layer at once"] = {"d": 256, "C": 64, "backend": backend, "points": layer(args.longest), **mark("layer", backend)}
    for learn in ("off", "next_token"):
        result[learn] = reading(model, ids, learn, args.longest) | mark("model", device="cpu")
        write_json(args.out, result)
    result["learning"] = {"reading_per_learning": result["off"]["tokens/s"] / result["next_token"]["tokens/s"]}
    write_json(args.out, result)
    print(f"reading without learning is {result['learning']['reading_per_learning']:.2f} times as fast as with it")


if __name__ == "__main__":
    main()
