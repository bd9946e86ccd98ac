"""A model whose weights are divided over processes with FSDP2: blocks are its units.

Every process reads and trains rows of its own. A block is gathered when it is read and given back after it,
in the backward as well. Where a model learns while it reads, a backward runs inside the forward of the
whole model: FSDP takes the end of that backward for the end of the iteration, and would take the embedding
and the head away from the call that is still reading with them. So the unit of the whole model keeps its
weights for as long as a call lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..engine import segments
from ..identity import collect
from ..layers.wrapped import placement
from ..model import HopeForCausalLM
from ..model_state import ModelState
from .agreed import agreed_checksum, check_agreed, mesh_for
from .sessions import joined_rows, rows_of
from .weights import WholeChecksum, full


def fully_shard_hope(
    model: HopeForCausalLM, mesh: DeviceMesh | None = None, **options: Any
) -> HopeForCausalLM:
    """Divides the weights of ``model`` over the processes of ``mesh`` (one dimension; None: all processes),
    in place: ``torch.distributed.fsdp.fully_shard`` of every block, then of the rest.

    options: of ``fully_shard``. Reading, learning while reading (``flush`` too), generation and training
    are those of the model as it was, each process with its own rows. All processes have the same weights
    before, and make the same calls afterwards: calls of which one would read a block more often than
    another (other lengths, other places in a segment) raise ValueError in all of them. Optimizers are made
    after this call.

    Raises ValueError for a model that is divided already or whose parameters are not plain tensors, other
    weights than in the first process, a mesh of several dimensions, memories with retain_to="zero", an
    option that keeps gathered weights after a call, and, later, by name, for what a divided model does not
    do: guard=True, wavefront, ``replay``, ``Decoder``, ``consolidate``, ``save_pretrained``, inference
    mode. ``whole_model`` gives a plain model for these.
    """
    op = "fully_shard_hope"
    mesh = mesh_for(op, model, mesh)
    if model.config.titans is not None and model.config.mixer != "attention" and (
        model.config.titans.retain_to == "zero"
    ):
        raise ValueError(f"{op}: argument model has retain_to='zero': its states start from the values of "
                         "weights that are sharded outside their call; use tensor_parallel")
    if options.setdefault("reshard_after_forward", True) is not True:
        raise ValueError(f"{op}: argument reshard_after_forward is {options['reshard_after_forward']!r}, "
                         "expected True: a reading without a backward would leave gathered weights "
                         "behind, which the next call would take for those that an optimizer has changed")
    held: list[Tensor] = []
    collect(model, held)
    if any(type(t.data) is not Tensor for t in held):
        raise ValueError(f"{op}: argument model has parameters that are no plain tensors")
    known = agreed_checksum(op, model, mesh.get_group())
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    model.holds = False  # the graph of a segment would outlive the call whose hooks belong to it
    model.parallel = Sharded(model, mesh, WholeChecksum(model, _whole, known))
    return model


def _whole(model: torch.nn.Module) -> Iterator[Tensor]:
    held: list[Tensor] = []
    collect(model, held)
    return (full(t.detach()) for t in held)


class Sharded:
    """What a model that is sharded does before and after a call; ``model.parallel``."""

    def __init__(self, model: Any, mesh: DeviceMesh, whole: WholeChecksum):
        self.group, self.device, self.whole = mesh.get_group(), placement(model.embed).device, whole
        self.parts, self._inside = 1, False
        # before FSDP's own hook, and after it
        model.register_forward_pre_hook(lambda module, args: self._enter(module), prepend=True)
        model.register_forward_hook(lambda module, args, output: self._leave(module))
        model.flush = self._as_forward(model, model.flush)

    def check(
        self, op: str, model: HopeForCausalLM, ids: Tensor, state: ModelState, lengths: list[int],
        known: list[int], asked: Any,
    ) -> None:
        """Before a call of the model. Raises ValueError for what it cannot do, and where the processes
        would read their blocks at different times."""
        self._check_state(op, model, state)
        if asked.guard:
            raise ValueError(f"{op}: argument guard is True, expected None or False in a model that is "
                             "sharded: whether the guard reads a segment again depends on its loss, and "
                             "all processes read together")
        if asked.wavefront is not None:
            self.refuse(op, "a wavefront")
        places: Any = any(n > 0 and c for n, c in zip(lengths, segments.complete(state)))
        if asked.learn == "next_token" and model.learns:
            C = model.segment
            rows = zip(state.pos, state.seen, lengths, known)
            places = sorted({(p % C, p > 0, s, n, k >= n) for p, s, n, k in rows})
        plan = ids.shape[1], places, asked.learn, asked.output, torch.is_grad_enabled()
        self._agree(op, plan)

    def check_flush(self, op: str, model: HopeForCausalLM, state: ModelState) -> None:
        self._check_state(op, model, state)
        self._agree(op, sorted({(p % (model.segment or 1), s) for p, s in zip(state.pos, state.seen)}))

    def check_replay(self, op: str, model: HopeForCausalLM, state: ModelState, asked: object) -> None:
        self.refuse(op, "replay")

    def check_stops(self, op: str) -> None:
        raise ValueError(f"{op}: arguments stop and eos_token_id are not supported by a model that is sharded over "
                         "processes: one whose rows have all ended would leave the others waiting; write "
                         "max_new_tokens everywhere, and cut what was written")

    def refuse(self, op: str, what: str) -> None:
        raise ValueError(f"{op}: the model is sharded over processes (fully_shard_hope), where {what} is not "
                         "supported; hope_kernels.parallel.whole_model gives a plain one")

    def gathered(self, model: HopeForCausalLM, state: ModelState) -> ModelState | None:
        """In the first process a state of a plain model with the rows of all."""
        return joined_rows(self.group, state)

    def own(self, op: str, model: HopeForCausalLM, state: ModelState) -> ModelState:
        """What this process has of the state of a plain model."""
        return rows_of(op, self.group, state)

    def _check_state(self, op: str, model: HopeForCausalLM, state: ModelState) -> None:
        if state.guard is not None:
            raise ValueError(f"{op}: argument state is guarded, which a model that is sharded over processes "
                             "does not support; state.guard = None goes on without")
        if state.config != model.config:
            raise ValueError(f"{op}: argument state has other settings than the model, which is sharded over "
                             "processes; expected the same")

    def _agree(self, op: str, plan: object) -> None:
        check_agreed(self.group, self.device, plan, (
            f"{op}: the processes would read different numbers of segments, tokens or blocks in this call, "
            "and their collectives would not meet; expected the same lengths, places in a segment and "
            "options in all of them"
        ))

    def _enter(self, model: Any) -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError("HopeForCausalLM: a model that is sharded over processes cannot be called in "
                             "inference mode; use torch.no_grad()")
        if self._inside:  # the call before this one has raised
            if not hasattr(model, "reset_iter_state"):
                raise RuntimeError("HopeForCausalLM: the call before this one has raised, after which this "
                                   "version of PyTorch cannot go on with a sharded model")
            model.reset_iter_state()
        self.whole.settled = False
        self.whole(model)
        self._inside = self.whole.settled = True
        model.set_reshard_after_backward(False, recurse=False)

    def _leave(self, model: Any) -> None:
        model.set_reshard_after_backward(True, recurse=False)
        self._inside = self.whole.settled = False

    def _as_forward(self, model: Any, method: Callable) -> Callable:
        """``method`` with the parameters that ``forward`` has."""
        hooks = model._get_fsdp_state()

        def call(*args: Any, **kwargs: Any) -> Any:
            self._enter(model)
            args, kwargs = hooks._pre_forward(model, args, kwargs)
            found = hooks._post_forward(model, args, method(*args, **kwargs))
            self._leave(model)
            return found

        return call
