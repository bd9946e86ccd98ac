"""What learning while reading is worth, in bits per byte.

    python -m benchmarks.bench_learning --text FILE [--title NAME] [--bytes N] [--lr-scale 1.0 ...] [--out JSON]

Reads the text once with the CMS frozen, once per --lr-scale (a factor on the model's own inner learning
rates) learning from next-token loss, and once with the CMS frozen and the memories' writes switched off
(eta_scale = 0): the same weights, three rules. Bits per byte over the whole text and over its last quarter,
and the peak of resident memory in every stretch of 10,000 bytes. Results are added to the JSON by title.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time

import torch
from tqdm import tqdm

from benchmarks.machine import machine, write_json
from benchmarks.sources import mark
from hope_kernels import HopeForCausalLM, bundled_models
from hope_kernels.cli.meter import PeakMemory
from hope_kernels.config import HopeConfig
from hope_kernels.engine.generation import read

RESULT = os.path.join(os.path.dirname(__file__), "results", "learning.json")


def text_bytes(path: str, n: int | None = None) -> bytes:
    """The first ``n`` bytes of a text file; .gz is unpacked."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
        return f.read()[:n]


def variant(model: HopeForCausalLM, lr_scale: float = 1.0, eta_scale: float | None = None) -> HopeForCausalLM:
    """The same weights under other inner rates."""
    c = model.config
    cms = tuple(m.replace(lr=tuple(
        tuple(lr * lr_scale for lr in m.matrix_rates(l).values()) for l in range(m.num_levels)
    )) for m in c.block_cms)
    titans = c.titans if eta_scale is None else c.titans.replace(eta_scale=eta_scale)
    other = HopeForCausalLM(
        HopeConfig.from_dict({**c.to_dict(), "cms": [m.to_dict() for m in cms], "titans": titans.to_dict()})
    )
    other.load_state_dict(model.state_dict())
    return other.to(model.embed.weight.device).eval()


@torch.no_grad()
def bits(model: HopeForCausalLM, ids: torch.Tensor, learn: str, label: str) -> dict:
    """Bits per byte of ids [1, T], of all of it and of its last quarter, and bytes/s."""
    T = ids.shape[1]
    marks, memory = [(1, 0.0)], []
    with PeakMemory(ids.device) as peak, tqdm(total=T, unit="B", unit_scale=True, desc=label) as bar:
        def on_piece(at: int, nats: float) -> None:
            marks.append((at, nats))
            if at >= 10_000 * (len(memory) + 1):
                memory.append([at, round(peak.take() / 2**20, 1)])
            bar.n = at
            bar.set_postfix(bits=f"{nats / math.log(2) / max(at - 1, 1):.3f}")

        began = time.perf_counter()
        read(model, ids, learn=learn, piece=1024, on_piece=on_piece)
        seconds = time.perf_counter() - began
    end, total = marks[-1]
    at, nats = min(marks, key=lambda m: abs(m[0] - 0.75 * T))
    scale = 1 / math.log(2)
    return {"bits_per_byte": total * scale / (end - 1), "last_quarter": (total - nats) * scale / (end - at),
            "bytes_per_s": T / seconds,
            "peak_memory_mib_per_10k_bytes": memory}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--text", required=True, help="any file, read as bytes; .gz is unpacked")
    p.add_argument("--title", help="how the result names the text (default: the file's name)")
    p.add_argument("--bytes", type=int, default=None)
    p.add_argument("--model", default=None)
    p.add_argument("--lr-scale", type=float, nargs="+", default=[1.0])
    p.add_argument("--skip-off", action="store_true", help="only the learning runs")
    p.add_argument("--out", default=RESULT)
    args = p.parse_args()
    data = text_bytes(args.text, args.bytes)
    model = HopeForCausalLM.from_pretrained(args.model or bundled_models()[0])
    ids = torch.tensor([list(data)])
    result = {"bytes": len(data), "machine": machine(), **mark("model", device="cpu"),
              "inner_lr": [list(m.learning_rates) for m in model.config.block_cms]}
    if not args.skip_off:
        result["off"] = bits(model, ids, "off", "learning off")
        result["off_no_memory_writes"] = bits(variant(model, eta_scale=0.0), ids, "off", "no memory writes")
    for scale in args.lr_scale:
        run = bits(variant(model, lr_scale=scale), ids, "next_token", f"learning, lr x {scale:g}")
        if "off" in result:
            run["last_quarter_on_over_off"] = run["last_quarter"] / result["off"]["last_quarter"]
        result[f"on_lr_x{scale:g}"] = run
    results = json.load(open(args.out)) if os.path.exists(args.out) else {}
    results[args.title or os.path.basename(args.text)] = result
    write_json(args.out, results)
    for name, run in result.items():
        if isinstance(run, dict) and "last_quarter" in run:
            ratio = f"   on/off {run['last_quarter_on_over_off']:.3f}" if "last_quarter_on_over_off" in run else ""
            print(
                f"{name:24} {run['bits_per_byte']:.4f} bits per byte, last quarter {run['last_quarter']:.4f}{ratio}"
            )


if __name__ == "__main__":
    main()
