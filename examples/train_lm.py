"""Train a byte-level HOPE language model on any text files; goes on where it was when stopped.

    python examples/train_lm.py TEXT[=WEIGHT] [TEXT ...] --out runs/lm --minutes 60 --through-refreshes 0.3
    torchrun --nproc-per-node 2 examples/train_lm.py TEXT ... --threads 4   # a step's rows divided over two processes

Every batch row reads its own stretch of one source (``mixed_text.py``), carrying the state of its memories from step
to step (gradients are cut there); now and then a row starts afresh elsewhere. At first the CMS does not learn while
training reads. In the last ``--through-refreshes`` of the training it does, as it will when the model is used: what
rows have learned is carried as deviations from the weights, which move on under it (docs/training.md), and the inner
rates are trained too. In OUT they are numbers of the configuration. Matrices are trained by delta momentum with
orthogonal steps (``hope_kernels.optim``, docs/optim.md), the rest by AdamW.

OUT holds config.json and model.safetensors (what from_pretrained loads), checkpoint and state-STEP-RANK.safetensors
(weights, optimizer, progress; what the rows' memories and levels hold; every minute, atomically, and on SIGTERM or
Ctrl-C) and log.jsonl. Data order depends on the seed and the step alone. With --steps the schedule does too: on one
machine, with as many threads and processes, a run that was stopped ends with the bits of one that was not.
"""

from __future__ import annotations

import argparse
import copy
import glob
import json
import math
import os
import signal
import time
from typing import Any

import torch
import torch.nn.functional as F
from mixed_text import Source, Streams, sources
from parity import trusted
from rounded import Rounded
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from together import Together
from tqdm import tqdm

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig, load_state
from hope_kernels.files import write_atomically
from hope_kernels.generation import read
from hope_kernels.model_state import ModelState
from hope_kernels.optim import DeltaMomentum, groups

RATES = 10.0  # how much faster logarithms of inner rates move than other parameters
SAVE_SECONDS = 60
# what a run that goes on has to have in common with its beginning, or other text would be read, at other rates
SAME = ("texts", "suffix", "heldout_share", "through_refreshes", "batch", "tokens", "restart", "lr", "matrices",
        "warmup", "weight_decay", "seed", "steps", "processes", "dtype")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("texts", nargs="+", metavar="TEXT[=WEIGHT]", help="text files or folders of them, read as bytes")
    p.add_argument("--suffix", nargs="+", default=[], help="of the files that are taken from folders (all text files)")
    p.add_argument("--out", required=True)
    p.add_argument("--heldout", help="text for the bits per byte at the end (first 100 KB)")
    p.add_argument("--heldout-share", type=float, default=0.0, help="of each source, its end, for the same")
    p.add_argument(
        "--minutes", type=float, default=60.0, help="training time; the learning-rate schedule follows it"
    )
    p.add_argument("--steps", type=int, help="in place of --minutes: a schedule that knows no clock")
    p.add_argument("--pause", type=int, help="stop after so many steps of this run; the same command goes on")
    p.add_argument("--through-refreshes", type=float, default=0.0, help="share of the training, its end")
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
    p.add_argument("--matrices", type=float, default=8.0, help="rate of the matrices' orthogonal steps, in --lr")
    p.add_argument("--warmup", type=float, default=0.02, help="share of the training")
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of what computes; steps are taken in fp32")
    p.add_argument("--backend", help="who computes, if its gradients can be trusted (the package's choice)")
    p.add_argument("--threads", type=int, default=0, help="of a process (0: PyTorch's choice; torchrun's is 1)")
    return p.parse_args()


def learning_rate(args: argparse.Namespace, progress: float) -> float:
    if progress < args.warmup:
        return args.lr * progress / args.warmup
    return args.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def built(args: argparse.Namespace, device: torch.device) -> tuple[HopeForCausalLM, torch.optim.Optimizer]:
    titans = TitansConfig(args.d_model, args.heads, chunk_memory=args.chunk, chunk_other=args.chunk)
    lr = "learned" if args.through_refreshes > 0 else None
    cms = CMSConfig(args.d_model, tuple(args.cms), expansion=args.expansion, lr=lr)
    model = HopeForCausalLM(HopeConfig(256, args.d_model, args.layers, titans=titans, cms=cms), device=device)
    rates = [p for n, p in model.named_parameters() if n.endswith("log_rates")]
    matrices, others = (group["params"] for group in groups(model))
    others = [p for p in others if all(p is not rate for rate in rates)]
    tables = [p for p in others if p.dim() >= 2]
    vectors = [p for p in others if p.dim() < 2]
    chosen = [
        {"params": matrices, "weight_decay": args.weight_decay, "factor": args.matrices},
        {"params": tables, "weight_decay": args.weight_decay, "factor": 1.0, "adamw": True},
        {"params": vectors, "weight_decay": 0.0, "factor": 1.0, "adamw": True},
        {"params": rates, "weight_decay": 0.0, "factor": RATES, "adamw": True},
    ]
    optimizer = DeltaMomentum(
        [group for group in chosen if group["params"]], lr=args.lr, orthogonalize=True, adjust_lr_fn="match_rms_adamw",
        adamw_betas=(0.9, 0.98),
    )
    return model, optimizer


def state_path(args: argparse.Namespace, step: int, rank: int) -> str:
    return os.path.join(args.out, f"state-{step}-{rank}.safetensors")


def save(
    args: argparse.Namespace, together: Together, rounded: Rounded, optimizer, state: ModelState, progress: dict
) -> None:
    """The folder as it stands after ``progress["step"]`` steps. The checkpoint is written last, and says of which step
    its states are: whenever this is cut, checkpoint and states are whole."""
    model = rounded.model
    state.adopt(rounded.computes)
    state.save(state_path(args, progress["step"], together.rank))
    together.wait()
    if together.rank == 0:
        (model.with_fixed_rates() if args.through_refreshes > 0 else model).save_pretrained(args.out)
        tensors = {f"model.{n}": t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
        for i, p in enumerate(model.parameters()):
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"{i}.{key}"] = value.detach().cpu().contiguous()
        write_atomically(
            os.path.join(args.out, "checkpoint.safetensors"),
            safetensors_bytes(tensors, metadata={"progress": json.dumps(progress)}),
        )
        kept = {state_path(args, progress["step"], rank) for rank in range(together.world)}
        for path in glob.glob(glob.escape(args.out) + "/state-*"):
            if path not in kept:
                os.remove(path)
    together.wait()


def restore(args: argparse.Namespace, together: Together, model, optimizer) -> tuple[dict, ModelState | None]:
    """Progress and state of an interrupted run of the same configuration, or those of a new one."""
    path = os.path.join(args.out, "checkpoint.safetensors")
    mine = {"config": json.loads(json.dumps(model.config.to_dict()))} | {n: getattr(args, n) for n in SAME}
    if not os.path.exists(path):
        return {"step": 0, "seconds": 0.0, "smooth": None, **mine}, None
    with safe_open(path, framework="pt") as f:
        progress = json.loads(f.metadata()["progress"])
        if any(progress.get(name) != value for name, value in mine.items()):
            wrong = ", ".join(name for name, value in mine.items() if progress.get(name) != value)
            raise SystemExit(f"{path} belongs to a run with other settings ({wrong}); choose another --out")
        model.load_state_dict({n[len("model.") :]: f.get_tensor(n) for n in f.keys() if n.startswith("model.")})
        for i, p in enumerate(model.parameters()):
            held = {n.split(".", 1)[1]: f.get_tensor(n) for n in f.keys() if n.split(".", 1)[0] == str(i)}
            if held:
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in held.items()}
    state: Any = load_state(state_path(args, progress["step"], together.rank), together.device)
    if together.rank == 0:
        print(f"resuming {args.out} at step {progress['step']}, {progress['seconds'] / 60:.1f} minutes")
    return progress, state


def agreed(together: Together, model: HopeForCausalLM, ids: torch.Tensor, chosen: str | None) -> str | None:
    """The backend of all processes: "chunked" where one of them cannot trust ``chosen`` (``parity.py``)."""
    backend, own, chunked = trusted(model, together.mine(ids).to(together.device), chosen)
    trust = together.mean([], [float(backend == chosen)])[0]
    if together.rank == 0:
        print(f"error of gradients: {own:.1e}, by the chunked backend {chunked:.1e}")
    return chosen if trust == 1 else "chunked"


def train(
    args: argparse.Namespace, together: Together, model, optimizer, found: list[Source], progress: dict, state
) -> bool:
    """Whether the training has come to its end."""
    rounded = Rounded(model, DTYPES[args.dtype])
    streams = Streams(found, args.batch, args.tokens, args.restart, args.seed)
    for step in range(progress["step"]):
        streams.skip(step)
    stopped: list[int] = []
    before = {n: signal.signal(n, lambda *_: stopped.append(1)) for n in (signal.SIGINT, signal.SIGTERM)}
    if "backend" not in progress:  # a run that goes on keeps the one it began with
        progress["backend"] = agreed(together, rounded.computes, copy.copy(streams).next(0)[0], args.backend)
    backend = progress["backend"]
    log = open(os.path.join(args.out, "log.jsonl"), "a")
    total, unit = (args.steps, "step") if args.steps else (args.minutes * 60, "s")
    done = lambda: progress["step"] if args.steps else progress["seconds"]
    until = math.inf if args.pause is None else progress["step"] + args.pause
    bar = tqdm(total=round(total), initial=round(done()), unit=unit, desc="training", disable=together.rank > 0)
    if state is None:
        state = rounded.computes.init_state(args.batch // together.world).detach()
    saved, asked, clock = progress["seconds"], 0.0, time.monotonic()
    while done() < total and progress["step"] < until and not asked:
        share = done() / total
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(args, share)
        ids, fresh = streams.next(progress["step"])
        ids, fresh = together.mine(ids).to(together.device), together.mine(fresh)
        if any(fresh):
            state = state.merge(rounded.computes.init_state(len(ids)).detach(), fresh)
        through = share >= 1 - args.through_refreshes
        options = {"learn": "next_token", "outer": "first_order"} if through else {}
        logits, state = rounded.computes(ids[:, :-1], state, backend=backend, **options)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        rounded.take_gradients()
        told = [loss.item() / math.log(2), time.monotonic() - clock, float(bool(stopped))]
        clock += told[1]
        bits, seconds, asked = together.mean(model.parameters(), told)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise SystemExit(f"step {progress['step']}: the gradient's norm is {float(norm)}; nothing of this step was "
                             f"taken, and {args.out} is as it was saved last. A lower --lr may help.")
        optimizer.step()
        rounded.round()
        state = state.detach()
        smooth = progress["smooth"]
        progress["smooth"] = smooth = bits if smooth is None else 0.98 * smooth + 0.02 * bits
        progress["step"] += 1
        progress["seconds"] += seconds
        bar.n = round(done())
        bar.set_postfix(step=progress["step"], bits=f"{smooth:.3f}", refresh=False)
        bar.refresh()
        if progress["step"] % 50 == 0 and together.rank == 0:
            line = {"step": progress["step"], "seconds": round(progress["seconds"], 1),
                    "bits_per_byte": round(smooth, 4), "through_refreshes": through}
            print(json.dumps(line), file=log, flush=True)
        if progress["seconds"] - saved > SAVE_SECONDS:
            save(args, together, rounded, optimizer, state, progress)
            saved, clock = progress["seconds"], time.monotonic()  # saving is no training time
    save(args, together, rounded, optimizer, state, progress)
    bar.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    return done() >= total


def report(args: argparse.Namespace, model: HopeForCausalLM, found: list[Source]) -> None:
    texts = [(s.name, s.heldout[:100_000]) for s in found if len(s.heldout) > 1]
    if args.heldout:
        data = torch.frombuffer(bytearray(open(args.heldout, "rb").read(100_000)), dtype=torch.uint8).long()
        texts.append((args.heldout, data))
    for name, text in texts:
        found_bits = []
        for learn in ("off", "next_token"):
            reading = read(model, text.unsqueeze(0).to(next(model.parameters()).device), learn=learn)
            found_bits.append(float(reading.nats[0]) / math.log(2) / reading.predicted[0])
        off, on = found_bits
        print(f"{name}: held-out bits per byte ({len(text)} bytes): learning off {off:.4f}, on {on:.4f}")


def main() -> None:
    args = arguments()
    if not 0 <= args.through_refreshes <= 1 or not 0 <= args.heldout_share < 1:
        raise SystemExit("--through-refreshes and --heldout-share are shares, from 0 to 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    together = Together()
    args.processes = together.world
    if args.batch % together.world:
        raise SystemExit(f"--batch is {args.batch}, expected a multiple of the {together.world} processes")
    torch.manual_seed(args.seed)  # the same weights everywhere
    found = sources(args.texts, args.heldout_share, tuple(args.suffix))
    model, optimizer = built(args, together.device)
    os.makedirs(args.out, exist_ok=True)
    progress, state = restore(args, together, model, optimizer)
    ended = train(args, together, model, optimizer, found, progress, state)
    together.close()
    if together.rank > 0:
        return
    if not ended:
        print(f"stopped at step {progress['step']}; the same command goes on")
        return
    if args.through_refreshes > 0:
        model = model.with_fixed_rates()
        for i, c in enumerate(model.config.block_cms):
            assert c is not None
            print(f"block {i}: inner rates {[c.matrix_rates(l) for l in range(c.num_levels)]}")
    report(args, model, found)


if __name__ == "__main__":
    main()
