"""Speed and memory of reading: ours off and learning, transformers and llama.cpp (both without learning).

One process a case, so that its peak memory is its own; medians over rounds in which the cases take turns. llama.cpp
(the wheel xllamacpp) reads the GGUF file's own 4-bit weights; the others read bf16.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from benchmarks import studies as s
from hope_kernels import HopeForCausalLM

TOKENS = 1024
CASES = ("off", "learn all", "learn 10 last", "transformers", "llama.cpp")


def run(study: s.Study, folder: str, theirs: str | None, gguf: str | None, rounds: int, threads: int) -> None:
    cases = [c for c in CASES if (c != "transformers" or theirs) and (c != "llama.cpp" or gguf)]
    if all(f"speed {c}" in study.cases for c in cases):
        return
    found: dict[str, list[dict]] = {c: [] for c in cases}
    for _ in range(rounds):
        for case in cases:
            given = json.dumps({"case": case, "folder": folder, "theirs": theirs, "gguf": gguf, "threads": threads})
            done = subprocess.run([sys.executable, "-m", "benchmarks.real.speed"], input=given, text=True,
                                  capture_output=True)
            if done.returncode:
                print(f"speed {case}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
                continue
            found[case].append(json.loads(done.stdout.strip().splitlines()[-1]))
    for case, results in found.items():
        if not results:
            continue
        speeds = sorted(r["tokens_per_s"] for r in results)
        study.put(f"speed {case}", {
            "part": "speed", "case": case, "tokens": TOKENS, "threads": threads,
            "tokens_per_s": round(statistics.median(speeds), 1), "spread": [round(v, 1) for v in speeds],
            "peak_mb": round(max(r["peak_mb"] for r in results)),
            "state_mb": round(max(r.get("state_mb", 0) for r in results)),
        })
        print(f"speed {case}: {study.cases[f'speed {case}']}", flush=True)


def measured(case: str, folder: str, theirs: str | None, gguf: str | None, threads: int) -> dict:
    """Reads three times, and times the third: the memory that learning needs is there by then."""
    ids = torch.randint(0, 40_000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    found: dict = {}
    if case == "llama.cpp":
        seconds = _llama_cpp(str(gguf), ids[0].tolist(), threads)
    elif case == "transformers":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.bfloat16)
        seconds = _timed(lambda: model(ids, logits_to_keep=1))
    else:
        from benchmarks.real.models import nats, variant

        blocks = {"learn 10 last": tuple(range(20, 30))}.get(case)
        one = variant(HopeForCausalLM.from_pretrained(folder), {"chunks": 256}, learn_blocks=blocks)
        learn = "off" if case == "off" else "next_token"
        state = None
        for _ in range(2):
            _, state, _ = nats(one, ids, learn, state)
        seconds = nats(one, ids, learn, state)[2]
        found["state_mb"] = state.nbytes() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found | {"tokens_per_s": TOKENS / seconds, "peak_mb": peak}


@torch.no_grad()
def _timed(read) -> float:
    read()
    read()
    began = time.perf_counter()
    read()
    return time.perf_counter() - began


def _llama_cpp(path: str, ids: list[int], threads: int) -> float:
    """Seconds of llama.cpp for reading ids, by its own timing of the prompt."""
    import xllamacpp as xlc

    params = xlc.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_predict = 4096, 1, 1
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xlc.Server(params)
    timed = []
    for shift in (0, 1):  # another prompt each time: nothing is in its cache
        prompt = {"prompt": [(t + shift) % 40_000 for t in ids], "n_predict": 1, "cache_prompt": False}
        answer = server.handle_completions(prompt)
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        timed.append(answer["timings"]["prompt_ms"] / 1e3 * len(ids) / answer["timings"]["prompt_n"])
    return timed[-1]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    print(json.dumps(measured(**asked)))
