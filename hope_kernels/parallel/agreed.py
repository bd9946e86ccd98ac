"""Whether all processes are about to do the same.

A collective has no name: where one process enters another collective than the others, of the same size,
each gets numbers that belong to something else, and nothing raises. So what decides which collectives a
call will enter is compared before the call, by one all-reduce of two numbers.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist


def check_agreed(group: dist.ProcessGroup, device: torch.device, value: object, reason: str) -> None:
    """Raises ValueError(``reason``), in every process of ``group``, unless ``value`` has one repr in all of
    them."""
    digest = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
    both = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group)
    most, least = both.tolist()
    if most != -least:
        raise ValueError(reason)
