"""Processes that train one model on rows of their own: ``torchrun --nproc-per-node 2 PROGRAM``, or one without it."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class Together:
    """rank, world: this process, and how many there are. All start with the same weights and make the same steps, for
    what they step by is the mean over them all."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if self.device.index >= torch.cuda.device_count():
                raise SystemExit(f"process {self.device.index} has no GPU: {torch.cuda.device_count()} are here")
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def mine(self, rows: list | Tensor) -> list | Tensor:
        """Every world-th row, beginning with that of this rank."""
        return rows[self.rank :: self.world]

    def mean(self, parameters: Iterable[Tensor], numbers: list[float]) -> list[float]:
        """Makes each gradient the mean of those of all processes, which have gradients of the same parameters; returns
        the means of ``numbers``."""
        if self.world == 1:
            return numbers
        grads = [p.grad for p in parameters if p.grad is not None]
        parts = [g.flatten() for g in grads] + [torch.tensor(numbers, device=self.device)]
        flat = torch.cat(parts)  # one message
        dist.all_reduce(flat)
        flat /= self.world
        *means, found = flat.split([len(part) for part in parts])
        for g, own in zip(grads, means):
            g.copy_(own.view_as(g))
        return found.tolist()

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()
