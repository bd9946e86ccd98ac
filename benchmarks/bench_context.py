"""Speed against context length: does reading or decoding slow down as a sequence grows? The bundled model and
one layer, one thread.

    python -m benchmarks.bench_context [--longest 65536] [--out benchmarks/results/context.json]

The model reads one text, with learning off and on, and stops after 1024, 2048, ... bytes: tokens/s of the
stretch since the last stop, and ms of a decoded token from there, on a copy of the state. "learning" compares
both over the longest read. The layer (d = 256, one head, chunks of 64, the default backend) reads T tokens in
one call. Seconds are those of the one thread's CPU clock: what else runs on the machine costs caches, not
turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch

from benchmarks import measure as m
from benchmarks.bench_learning import text_bytes
from benchmarks.machine import machine, write_json
from benchmarks.sources import mark
from hope_kernels import HopeForCausalLM, SelfModifyingTitans, TitansConfig, available_backends, bundled_models
from hope_kernels.engine.generation import read

RESULT = m.ROOT / "benchmarks" / "results" / "context.json"
TEXT = m.ROOT / "hope_kernels" / "assets" / "kjv-john-acts.txt.gz"
FIRST = 1024
WARM = 1024  # bytes read before the clock starts
MODES = ("off", "next_token")
ROUNDS = 5  # of decoding a segment from every stop


def cpu_ms(call) -> float:
    began = time.process_time()
    call()
    return 1e3 * (time.process_time() - began)


def stops(longest: int) -> list[int]:
    return [FIRST << i for i in range(64) if FIRST << i <= longest]


def segment(model: HopeForCausalLM, given, ids: torch.Tensor, learn: str) -> list[float]:
    """ms of each token of ids [1, n], decoded from a copy of the state."""
    state, ms = given.clone(), []
    for t in range(ids.shape[1]):
        began = time.process_time()
        state = model(ids[:, t : t + 1], state, learn=learn)[1]
        ms.append(1e3 * (time.process_time() - began))
    return ms


@torch.no_grad()
def reading(model: HopeForCausalLM, ids: torch.Tensor, longest: int) -> dict[str, dict]:
    """{mode: {"points": one a stop, "tokens/s": over all of them}}; modes in turn stretch by stretch, then
    decoding from every stop's state in turn, round by round: what disturbs the machine meanwhile disturbs all
    alike."""
    found: dict[str, dict] = {mode: {"points": [], "tokens/s": 0.0} for mode in MODES}
    kept: dict[tuple[str, int], object] = {}
    reached, seconds, at = {}, dict.fromkeys(MODES, 0.0), 0
    for mode in MODES:
        read(model, ids[:, :WARM], learn=mode)
    for stop in stops(longest):
        for mode in MODES:
            before = reached.get(mode)
            given = (None, None) if before is None else (before.state, before.logits)
            began = time.process_time()
            reached[mode] = after = read(
                model, ids[:, at:stop], given[0], learn=mode, last=given[1], check_finite=False
            )
            spent = time.process_time() - began
            seconds[mode] += spent
            kept[mode, stop] = after.state.clone()
            found[mode]["points"].append(
                {"tokens": stop, "tokens/s": (stop - at) / spent, "state_bytes": after.state.nbytes()}
            )
            print(f"{mode:11} {stop:7} tokens {(stop - at) / spent:10.0f} tokens/s", flush=True)
        at = stop
    ms: dict[tuple[str, int], list[float]] = {key: [] for key in kept}
    for _ in range(ROUNDS):
        for (mode, stop), state in kept.items():
            ms[mode, stop] += segment(model, state, ids[:, stop : stop + model.segment], mode)
    for mode in MODES:
        found[mode]["tokens/s"] = at / seconds[mode]
        for p in found[mode]["points"]:
            times = ms[mode, p["tokens"]]
            p["decode_ms"] = m.stats(times) | {"mean": statistics.fmean(times)}
            print(f"{mode:11} {p['tokens']:7} tokens, then {p['decode_ms']['median']:.3f} ms a token", flush=True)
    return found


@torch.no_grad()
def layer(longest: int) -> list[dict]:
    torch.manual_seed(0)
    one, points = SelfModifyingTitans(TitansConfig(256, chunk_memory=64, chunk_other=64)), []
    one(torch.randn(1, WARM, 256))
    for T in stops(longest):
        x = torch.randn(1, T, 256)
        times = [cpu_ms(partial(one, x)) for _ in range(5 if T < 16384 else 3)]
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
    result["layer at once"] = {
        "d": 256, "C": 64, "backend": backend, "points": layer(args.longest), **mark("layer", backend)
    }
    for mode, found in reading(model, ids, args.longest).items():
        result[mode] = found | mark("model", device="cpu")
    result["learning"] = {"reading_per_learning": result["off"]["tokens/s"] / result["next_token"]["tokens/s"]}
    write_json(args.out, result)
    print(f"reading without learning is {result['learning']['reading_per_learning']:.2f} times as fast as with it")


if __name__ == "__main__":
    main()
