"""Whether all processes are about to do the same, and over which mesh.

A collective has no name: where one process enters another collective than the others, of the same size,
each gets numbers that belong to something else, and nothing raises. So what decides which collectives a
call will enter is compared before the call, by one all-reduce of two numbers.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..identity import Checksum, checksum
from ..layers.wrapped import placement
from ..model import HopeForCausalLM


def check_agreed(group: dist.ProcessGroup, device: torch.device, value: object, reason: str) -> None:
    """Raises ValueError(``reason``), in every process of ``group``, unless ``value`` has one repr in all of
    them."""
    digest = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
    both = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group)
    most, least = both.tolist()
    if most != -least:
        raise ValueError(reason)


def mesh_for(op: str, model: HopeForCausalLM, mesh: DeviceMesh | None) -> DeviceMesh:
    """``mesh``, or one of all processes, to divide ``model`` over. Raises ValueError for a mesh of several
    dimensions and a model that is divided already."""
    if model.parallel is not None:
        raise ValueError(f"{op}: argument model is divided over processes already")
    if mesh is None:
        mesh = init_device_mesh(placement(model.embed).device.type, (dist.get_world_size(),))
    if mesh.ndim != 1:
        raise ValueError(f"{op}: argument mesh has {mesh.ndim} dimensions, expected one: pass mesh[name]")
    return mesh


def agreed_checksum(op: str, model: HopeForCausalLM, group: dist.ProcessGroup) -> Checksum | None:
    """The checksum of ``model``. Raises ValueError where it or the configuration is not the same in all processes."""
    known = checksum(model)
    check_agreed(group, placement(model.embed).device, (str(known), model.config), (
        f"{op}: argument model has other weights or another configuration in some processes, expected the "
        "same; load or seed it alike in all of them"
    ))
    return known
