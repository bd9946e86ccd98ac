"""Train a byte-level HOPE language model on any text files; resumes where it was when killed.

    python examples/train_lm.py TEXT [TEXT ...] --out runs/lm --minutes 60 --heldout HELDOUT

Every batch row reads its own stretch of the corpus, carrying the state of its memories from step to step
(gradients are cut there); now and then a row starts afresh elsewhere. The CMS does not learn while training
reads: it learns when the model is used.
OUT holds config.json and model.safetensors (what from_pretrained loads), checkpoint.safetensors (optimizer
and progress; every minute, atomically) and log.jsonl. Data order depends on the seed and the step alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig
from hope_kernels.files import write_atomically
from hope_kernels.generation import read


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("texts", nargs="+", help="text files, read as bytes")
    p.add_argument("--out", required=True)
    p.add_argument("--heldout", help="text for the bits per byte at the end (first 100 KB)")
    p.add_argument(
        "--minutes", type=float, default=60.0, help="training time; the learning-rate schedule follows it"
    )
    p.add_argument("--d-model", type=int, default=128)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--chunk", type=int, default=16, help="memory update period, tokens")
    p.add_argument("--cms", type=int, nargs="+", default=[64, 256], help="CMS periods, tokens")
    p.add_argument("--expansion", type=float, default=2.0)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--tokens", type=int, default=256, help="tokens per row and step")
    p.add_argument("--restart", type=float, default=0.04, help="chance per row and step to start afresh elsewhere")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--warmup", type=float, default=0.02, help="share of the time")
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=0, help="CPU threads (0: PyTorch's choice)")
    return p.parse_args()


class Streams:
    """Where each batch row stands in the corpus; a pure function of (seed, steps taken)."""

    def __init__(self, data: torch.Tensor, batch: int, tokens: int, restart: float, seed: int):
        self.data, self.tokens, self.restart, self.seed = data, tokens, restart, seed
        self.at = self._draw(batch, -1)

    def _draw(self, n: int, step: int) -> list[int]:
        g = torch.Generator().manual_seed(hash((self.seed, step)) & (2**63 - 1))
        return torch.randint(0, len(self.data) - self.tokens - 1, (n,), generator=g).tolist()

    def next(self, step: int) -> tuple[torch.Tensor, list[bool]]:
        """ids [B, tokens + 1], and which rows start afresh."""
        g = torch.Generator().manual_seed(hash((self.seed, step, 1)) & (2**63 - 1))
        coin = torch.rand(len(self.at), generator=g).tolist()
        places = self._draw(len(self.at), step)
        fresh = [c < self.restart or a + self.tokens + 1 >= len(self.data) for c, a in zip(coin, self.at)]
        self.at = [p if f else a for p, f, a in zip(places, fresh, self.at)]
        ids = torch.stack([self.data[a : a + self.tokens + 1] for a in self.at])
        self.at = [a + self.tokens for a in self.at]
        return ids, fresh


def learning_rate(args, progress: float) -> float:
    if progress < args.warmup:
        return args.lr * progress / args.warmup
    return args.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def save(args, model, optimizer, progress: dict) -> None:
    model.save_pretrained(args.out)
    tensors = {}
    for i, p in enumerate(model.parameters()):
        for name, value in optimizer.state.get(p, {}).items():
            tensors[f"{i}.{name}"] = value.detach().cpu().contiguous()
    meta = {"progress": json.dumps(progress)}
    weights = {f"model.{n}": t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    write_atomically(
        os.path.join(args.out, "checkpoint.safetensors"), safetensors_bytes({**tensors, **weights}, metadata=meta)
    )


def restore(args, model, optimizer) -> dict:
    """Progress of an interrupted run of the same configuration, or that of a new one."""
    path = os.path.join(args.out, "checkpoint.safetensors")
    if not os.path.exists(path):
        return {"step": 0, "seconds": 0.0, "config": model.config.to_dict(), "seed": args.seed}
    with safe_open(path, framework="pt") as f:
        progress = json.loads(f.metadata()["progress"])
        if HopeConfig.from_dict(progress["config"]) != model.config or progress["seed"] != args.seed:
            raise SystemExit(f"{path} belongs to another configuration or seed; choose another --out")
        model.load_state_dict({n[len("model.") :]: f.get_tensor(n) for n in f.keys() if n.startswith("model.")})
        for i, p in enumerate(model.parameters()):
            state = {n.split(".", 1)[1]: f.get_tensor(n) for n in f.keys() if n.split(".", 1)[0] == str(i)}
            if state:
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
    print(f"resuming {args.out} at step {progress['step']}, {progress['seconds'] / 60:.1f} minutes")
    return progress


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = torch.frombuffer(
        bytearray(b"".join(open(t, "rb").read() for t in args.texts)), dtype=torch.uint8
    ).long().to(device)
    titans = TitansConfig(args.d_model, args.heads, chunk_memory=args.chunk, chunk_other=args.chunk)
    config = HopeConfig(256, args.d_model, args.layers, titans=titans,
                        cms=CMSConfig(args.d_model, tuple(args.cms), expansion=args.expansion))
    model = HopeForCausalLM(config, device=device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # in one pass on a CPU, where the loop over parameters takes several times as long
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=device.type == "cpu")
    progress = restore(args, model, optimizer)
    streams = Streams(data, args.batch, args.tokens, args.restart, args.seed)
    for step in range(progress["step"]):
        streams.next(step)
    os.makedirs(args.out, exist_ok=True)
    log = open(os.path.join(args.out, "log.jsonl"), "a")
    total = args.minutes * 60
    bar = tqdm(total=round(total), initial=round(progress["seconds"]), unit="s", desc="training")
    state, saved, smooth = None, time.monotonic(), None
    while progress["seconds"] < total:
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, progress["seconds"] / total)
        ids, fresh = streams.next(progress["step"])
        if state is None:
            state = model.init_state(args.batch)
        elif any(fresh):
            state = state.merge(model.init_state(args.batch).detach(), fresh)
        logits, state = model(ids[:, :-1], state)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = state.detach()
        bits = loss.item() / math.log(2)
        smooth = bits if smooth is None else 0.98 * smooth + 0.02 * bits
        progress["step"] += 1
        progress["seconds"] += time.monotonic() - began
        bar.n = round(progress["seconds"])
        bar.set_postfix(step=progress["step"], bits=f"{smooth:.3f}", refresh=False)
        bar.refresh()
        if progress["step"] % 50 == 0:
            seconds, bits = round(progress["seconds"], 1), round(smooth, 4)
            line = {"step": progress["step"], "seconds": seconds, "bits_per_byte": bits}
            print(json.dumps(line), file=log, flush=True)
        if time.monotonic() - saved > 60:
            save(args, model, optimizer, progress)
            saved = time.monotonic()
    save(args, model, optimizer, progress)
    bar.close()
    if args.heldout:
        text = open(args.heldout, "rb").read(100_000)
        reading = read(model, torch.tensor([list(text)], device=device))
        bits = float(reading.nats[0]) / math.log(2) / reading.predicted[0]
        print(f"held-out bits per byte ({len(text)} bytes, learning off): {bits:.4f}")


if __name__ == "__main__":
    main()
