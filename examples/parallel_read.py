"""Read a text with one model over several processes, learn from it, and keep the session.

    torchrun --nproc-per-node 2 examples/parallel_read.py TEXT --how tensor --session SESSION --write 60

--how tensor: heads and hidden units are divided; all processes read the same text. --how fsdp: the weights
are sharded, and every process reads a stretch of its own, a row of the session. SESSION is a file as a plain
model reads it; started again, with any number of processes that divides its rows, reading goes on after it.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hope_kernels import HopeForCausalLM, Tokenizer
from hope_kernels.folders import bundled_models
from hope_kernels.parallel import fully_shard_hope, load_session, save_session, tensor_parallel


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("text")
    p.add_argument("--model", default=bundled_models()[0], help="a folder, or the name of a bundled model")
    p.add_argument("--how", choices=("fsdp", "tensor"), default="tensor")
    p.add_argument("--session", required=True)
    p.add_argument("--tokens", type=int, default=4096, help="of the text, of all processes together")
    p.add_argument("--write", type=int, default=60, help="tokens to write afterwards")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", choices=("cpu", "cuda"), default=device)
    return p.parse_args()


def main() -> None:
    args = arguments()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(args.device, (int(os.environ["WORLD_SIZE"]),))
    rank, world, sharded = dist.get_rank(), dist.get_world_size(), args.how == "fsdp"
    model = HopeForCausalLM.from_pretrained(args.model, device=args.device)
    tokenizer = Tokenizer.of(model, args.model)
    model = fully_shard_hope(model, mesh) if sharded else tensor_parallel(model, mesh)
    with open(args.text, encoding="utf-8", errors="replace") as f:
        ids = torch.tensor([tokenizer.encode(f.read())[: args.tokens]], device=args.device)
    if sharded:  # rows of one length
        n = ids.shape[1] // world
        ids = ids[:, rank * n : rank * n + n]
    state = load_session(model, args.session) if os.path.exists(args.session) else None
    dist.barrier()
    options = {"guard": not sharded}  # whether it reads again depends on what a process has read
    reading = model.read(ids[:, :-1], state, unread=None if state is None else "before", **options)
    bits = reading.nats.sum() / 0.693147 / max(sum(reading.predicted), 1)
    out = model.generate(ids[:, -1:], args.write, reading.state, **options)
    save_session(model, out.state, args.session)
    for turn in range(world if sharded else 1):
        if turn == rank:
            text = tokenizer.decode(out.tokens[0].tolist())
            print(f"process {rank}: {float(bits):.3f} bits per token, then it writes {text!r}", flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
