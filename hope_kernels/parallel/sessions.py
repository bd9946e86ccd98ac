"""Sessions of a model that is divided over processes, as the files that a plain model reads and writes."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from ..check import check_state
from ..identity import matches
from ..layers.wrapped import placement
from ..model import HopeForCausalLM
from ..model_state import ModelState
from ..state import State
from ..state_file import load_state


def save_session(
    model: HopeForCausalLM, state: ModelState, path: str | os.PathLike, note: dict | None = None
) -> None:
    """``state`` of ``model``, which is divided over processes, as one file at ``path``, as ``State.save``
    writes it: with the mark of the whole weights, for a plain model or any number of processes.

    All processes call this. With ``fully_shard_hope`` the file has the rows of all of them, in the order of
    their ranks. The first process writes; where it cannot, all raise ValueError.
    """
    op = "save_session"
    parallel = _parallel(op, model)
    check_state(op, state, ModelState, model.config, getattr(state, "batch", 0))
    if state.fingerprint is None:
        raise ValueError(f"{op}: argument state was last read in grad mode, where no mark of the weights "
                         "is taken; read it under torch.no_grad() first")
    group, failed = parallel.group, [None]
    try:
        whole = parallel.gathered(model, state)
        if whole is not None:
            whole.save(path, note)
    except Exception as error:  # of the first process, whatever it is: the others wait to be told
        failed = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(failed, group_src=0, group=group)
    if failed[0] is not None:
        raise ValueError(f"{op}: the first process could not write {os.fspath(path)} ({failed[0]})")


def load_session(model: HopeForCausalLM, path: str | os.PathLike) -> ModelState:
    """The session at ``path``, which any number of processes has written, for this process of ``model``: with
    ``fully_shard_hope`` its share of the rows, in the order of the ranks.

    All processes call this, and see the same file. Raises FileNotFoundError, and ValueError for what is no
    session of a model of this configuration and these weights, and for rows that cannot be divided evenly.
    """
    op = "load_session"
    parallel = _parallel(op, model)
    state: Any = load_state(path)
    check_state(op, state, ModelState, model.config, getattr(state, "batch", 0))
    if state.fingerprint is not None:
        same, mine = matches(model, state.fingerprint)
        if not same:
            raise ValueError(f"{op}: {os.fspath(path)} belongs to weights {state.fingerprint}, these are "
                             f"weights {mine}")
    return parallel.own(op, model, state).to(placement(model.embed).device)


def joined_rows(group: dist.ProcessGroup, state: ModelState) -> ModelState | None:
    """In the first process the rows of all, in the order of their ranks; None in the others."""
    first = dist.get_rank(group) == 0
    states: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(state.to("cpu"), states if first else None, group_dst=0, group=group)
    return State.join(states) if first else None  # type: ignore[return-value]


def rows_of(op: str, group: dist.ProcessGroup, state: ModelState) -> ModelState:
    """The share of this process of the rows of ``state``. Raises ValueError where they cannot be divided
    evenly."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if state.batch % size:
        raise ValueError(f"{op}: the session has {state.batch} rows, expected a multiple of the {size} "
                         "processes, which share them")
    n = state.batch // size
    return state.select(range(rank * n, rank * n + n))


def _parallel(op: str, model: HopeForCausalLM) -> Any:
    if getattr(model, "parallel", None) is None:
        raise ValueError(f"{op}: argument model is not divided over processes; state.save(path) and "
                         "load_state(path) serve it")
    return model.parallel
