"""Several processes that run one measurement together, over gloo.

A fresh interpreter forks them (importing torch once for each would cost more than all of the work); the first
one's findings come back as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache

import quick_interpreter
import torch
import torch.distributed as dist

POSSIBLE = dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")
WHY_NOT = None if POSSIBLE else "needs gloo and fork"


@cache
def report(file: str, world: int) -> dict:
    """What ``file``, which calls ``main`` when it is run, finds with ``world`` processes."""
    done = subprocess.run(
        [sys.executable, file, str(world)], capture_output=True, text=True, timeout=1200,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(measure: Callable[[int, int], dict]) -> None:
    """``measure(rank, world)`` in as many processes as the command line says."""
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":  # as in the process of the tests
        quick_interpreter.install()
    world, rank = int(sys.argv[1]), 0
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for other in range(1, world):
        child = os.fork()
        if not child:
            rank = other
            break
        children.append(child)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
        timeout=timedelta(seconds=600),
    )
    found = measure(rank, world)
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        os._exit(0)
    failed = [status for _, status in (os.waitpid(child, 0) for child in children) if status]
    print(json.dumps(found))
    sys.exit(bool(failed))


def refusal(call: Callable[[], object]) -> str:
    """What a ValueError of ``call`` says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, in sizes of the largest number of ``b``."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.numel() else 0.0
