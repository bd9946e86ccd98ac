"""Train a byte-level model over several processes, and write a checkpoint that a plain model reads.

    torchrun --nproc-per-node 2 examples/parallel_train.py TEXT --how fsdp --out OUT --steps 100

--how fsdp: the weights are sharded block by block, and every process trains on rows of its own. --how tensor:
heads and hidden units are divided, and all processes read the same rows. OUT/checkpoint is that of
torch.distributed.checkpoint (weights and step, not the optimizer's averages); started again, training goes on
from there, with any number of processes. OUT/model is a folder for from_pretrained.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from hope_kernels import CMSConfig, HopeConfig, HopeForCausalLM, TitansConfig
from hope_kernels.parallel import clip_grad_norm_, fully_shard_hope, tensor_parallel, whole_model


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("text")
    p.add_argument("--how", choices=("fsdp", "tensor"), default="fsdp")
    p.add_argument("--out", required=True)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--rows", type=int, default=8, help="of a step, of all processes together")
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--d-model", type=int, default=64)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--lr", type=float, default=3e-3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", choices=("cpu", "cuda"), default=device)
    return p.parse_args()


def main() -> None:
    args = arguments()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(args.device, (int(os.environ["WORLD_SIZE"]),))
    rank, world = dist.get_rank(), dist.get_world_size()
    with open(args.text, "rb") as f:
        data = torch.frombuffer(bytearray(f.read()), dtype=torch.uint8)
    torch.manual_seed(0)  # the same weights everywhere
    d = args.d_model
    model = HopeForCausalLM(HopeConfig(
        256, d, args.layers, titans=TitansConfig(d, args.heads), cms=CMSConfig(d, (64, 256), expansion=2.0)
    ), device=args.device)
    model = fully_shard_hope(model, mesh) if args.how == "fsdp" else tensor_parallel(model, mesh)
    path, start = os.path.join(args.out, "checkpoint"), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    if os.path.exists(os.path.join(path, ".metadata")):
        held = {"model": model.state_dict(), "step": torch.zeros((), dtype=torch.long)}
        dcp.load(held, checkpoint_id=path)
        model.load_state_dict(held["model"])
        start = int(held["step"])
    for step in range(start, start + args.steps):
        where = torch.Generator().manual_seed(step)
        places = torch.randint(len(data) - args.tokens - 1, (args.rows,), generator=where).tolist()
        mine = places[rank::world] if args.how == "fsdp" else places
        ids = torch.stack([data[p : p + args.tokens + 1] for p in mine]).long().to(args.device)
        logits, _ = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        if args.how == "fsdp":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == start + args.steps - 1:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}: {float(mean) / world / 0.693147:.3f} bits per byte", flush=True)
    done = torch.tensor(start + args.steps)
    dcp.save({"model": model.state_dict(), "step": done}, checkpoint_id=path)
    plain = whole_model(model)
    if rank == 0:
        plain.save_pretrained(os.path.join(args.out, "model"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
