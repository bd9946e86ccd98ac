"""A model whose layers are divided over processes: memories and attention by heads, CMS levels by hidden
units.

Every process reads the same tokens, and has the same numbers outside these layers (``ops/shared/across.py``
says what is exchanged inside). Each learns its part of a level without the others: a step of gradient
descent, momentum or Adam takes every element for itself; Muon gathers the gradient. Embedding, head, norms
and the convolution are whole in every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..config import CMSConfig
from ..identity import Checksum, checksum_of, collect, steps
from ..layers.attention import CausalAttention
from ..layers.block import Block
from ..layers.cms_level import CMSLevel
from ..layers.wrapped import is_hooked, placement
from ..model import HopeForCausalLM
from ..model_state import ModelState
from ..ops.shared.across import Across
from .agreed import agreed_checksum, check_agreed, mesh_for
from .shares import share, whole
from .weights import WholeChecksum

Dims = dict[str, int]  # a parameter's name in the model -> the dimension along which it is cut

_TITANS = {"w2": 0, "w1": 0, "w1s": 0, "norm_gain": 0, "eta_bias": 0, "alpha_bias": 0, "beta_bias": 0} | {
    f"{name}_proj.weight": 0 for name in ("in", "q", "k", "v", "eta", "alpha", "beta", "gate")
} | {"out_proj.weight": 1}
_ATTENTION = {f"{name}_proj.{kind}": 0 for name in ("q", "k", "v") for kind in ("weight", "bias")} | {
    "o_proj.weight": 1
}
_LEVEL = {"up": 0, "gate": 0, "up_bias": 0, "gate_bias": 0, "down": 1}


def tensor_parallel(model: HopeForCausalLM, mesh: DeviceMesh | None = None) -> HopeForCausalLM:
    """Divides the layers of ``model`` over the processes of ``mesh`` (one dimension; None: all processes),
    in place.

    All processes have the same weights before, and make the same calls with the same tokens afterwards:
    what differs raises ValueError in all of them. Reading, learning while reading, generation, replay and
    training are those of the model as it was, to rounding. Levels are computed by PyTorch, whatever
    ``backend`` says. ``state_dict`` has DTensors, so that ``torch.distributed.checkpoint`` saves and loads
    whole tensors. Optimizers are made after this call and see the parts: one that treats a matrix as a
    whole, as Muon does, is not what it would be, and ``clip_grad_norm_`` of this package clips.

    Raises ValueError for heads or hidden units that cannot be divided evenly, other weights than in the first
    process, a model that is divided or wrapped already, and CMS levels that learn with ``precondition`` or ``rank``,
    which mix all hidden units, or with learned rates.
    """
    op = "tensor_parallel"
    mesh = mesh_for(op, model, mesh)
    across = Across(mesh.get_group())
    _check(op, model, across.size)
    known = agreed_checksum(op, model, across.group)
    dims: Dims = {}
    for i, block in enumerate(model.blocks):
        _divide(block, f"blocks.{i}.", across, dims)
    model.parallel = Divided(model, mesh, across, dims, known)
    return model


def clip_grad_norm_(model: HopeForCausalLM, max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` of a model that ``tensor_parallel`` has divided: of the norm of all
    gradients of all processes, which is returned. All processes call this."""
    parallel: Any = model.parallel
    if not isinstance(parallel, Divided):
        raise ValueError("clip_grad_norm_: argument model is not divided by tensor_parallel, expected that; "
                         "torch.nn.utils.clip_grad_norm_ serves it")
    grads = [(name in parallel.dims, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    zero = torch.zeros((), dtype=torch.float64, device=parallel.device)
    cut, same = (
        sum([g.double().square().sum() for of, g in grads if of is one], zero) for one in (True, False)
    )
    norm = (parallel.across.sum(cut) + same).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, g in grads:
        g.mul_(factor.to(g.dtype))
    return norm


def _check(op: str, model: HopeForCausalLM, size: int) -> None:
    for name, module in model.named_modules():
        plain = type(module).__module__.startswith(("hope_kernels.", "torch.nn.modules."))
        divided = any(type(p.data) is not Tensor for p in module.parameters(False))
        if not plain or divided or is_hooked(module):
            raise ValueError(f"{op}: {name or 'argument model'}, a {type(module).__name__}, is wrapped, "
                             "hooked or sharded, expected a model of plain modules: merge or remove what wraps them")
    config = model.config
    if config.mixer == "attention":
        counts = {"heads": config.heads[0], "key-value heads": config.heads[1]}
    else:
        assert config.titans is not None
        counts = {"heads": config.titans.num_heads}
    for cms in config.block_cms:
        if cms is not None:
            counts["hidden units of a CMS level"] = cms.hidden
            _check_level(op, cms)
            _even(op, counts, size)
    _even(op, counts, size)


def _even(op: str, counts: dict[str, int], size: int) -> None:
    for what, n in counts.items():
        if n % size:
            raise ValueError(f"{op}: argument model has {n} {what}, expected a multiple of the {size} "
                             "processes")


def _check_level(op: str, config: CMSConfig) -> None:
    if not any(config.learning_rates):
        return
    if config.lr == "learned":
        raise ValueError(f"{op}: the CMS of argument model has lr='learned', expected numbers: each process would have "
                         "a part of a rate's gradient; model.with_fixed_rates() makes them numbers")
    for name in ("precondition", "rank"):
        value = getattr(config, name)
        if value is not None:
            raise ValueError(f"{op}: the CMS of argument model learns with {name}={value}, which mixes all hidden "
                             "units and is not supported by tensor_parallel; fully_shard_hope supports it")


def _divide(block: Block, prefix: str, across: Across, dims: Dims) -> None:
    mixer = block.mixer
    found = _ATTENTION if isinstance(mixer, CausalAttention) else _TITANS
    parts: list[tuple[str, nn.Module, Dims]] = [("mixer.", mixer, found)]
    mixer.across = across
    if block.cms is not None:
        block.cms.across = across
        parts += [(f"cms.levels.{l}.", level, _LEVEL) for l, level in enumerate(block.cms.levels)]
    for name, module, cuts in parts:
        for parameter, p in list(module.named_parameters()):
            if parameter in cuts:
                _cut(module, parameter, p, across, cuts[parameter])
                dims[prefix + name + parameter] = cuts[parameter]


def _cut(module: nn.Module, name: str, p: nn.Parameter, across: Across, dim: int) -> None:
    """The parameter ``name`` becomes this process's part of it."""
    *path, last = name.split(".")
    owner = module.get_submodule(".".join(path))
    part = nn.Parameter(across.own(p.detach(), dim).clone(), requires_grad=p.requires_grad)
    if isinstance(owner, CMSLevel):
        owner[last] = part
    else:
        setattr(owner, last, part)
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape


class Divided:
    """What a model that is divided by ``tensor_parallel`` does before a call; ``model.parallel``."""

    def __init__(
        self, model: HopeForCausalLM, mesh: DeviceMesh, across: Across, dims: Dims, known: Checksum | None
    ):
        self.mesh, self.across, self.dims = mesh, across, dims
        self.group, self.parts, self.device = across.group, across.size, placement(model.embed).device
        self.whole = WholeChecksum(model, self._whole, known)
        self._same: tuple[Any, str] | None = None
        model.register_state_dict_post_hook(lambda *given: self._as_dtensors(*given))
        model.register_load_state_dict_pre_hook(lambda *given: self._own_parts(*given))

    def check(
        self, op: str, model: HopeForCausalLM, ids: Tensor, state: ModelState, lengths: list[int],
        known: list[int], asked: Any,
    ) -> None:
        """Before a call of the model. Raises ValueError for what it cannot do, and where the processes
        would not do the same."""
        if asked.wavefront is not None:
            self.refuse(op, "a wavefront")
        options = asked.learn, asked.backend, asked.output, asked.guard, torch.is_grad_enabled()
        following = None if asked.following is None else asked.following.tolist()
        embeds = None if asked.embeds is None else str(checksum_of([asked.embeds]))
        self._agree(op, model, state, (ids.tolist(), lengths, following, embeds, options))

    def check_flush(self, op: str, model: HopeForCausalLM, state: ModelState) -> None:
        self._agree(op, model, state, "flush")

    def check_replay(self, op: str, model: HopeForCausalLM, state: ModelState, asked: object) -> None:
        self._agree(op, model, state, asked)

    def check_stops(self, op: str) -> None:
        """A row ends in all processes at the same token."""

    def refuse(self, op: str, what: str) -> None:
        raise ValueError(f"{op}: the model is divided over processes (tensor_parallel), where {what} is "
                         "not supported; hope_kernels.parallel.whole_model gives a plain one")

    def gathered(self, model: HopeForCausalLM, state: ModelState) -> ModelState | None:
        """In the first process the state of a plain model."""
        found = whole(state, self.across)
        return found.to("cpu") if self.across.rank == 0 else None

    def own(self, op: str, model: HopeForCausalLM, state: ModelState) -> ModelState:
        """What this process has of the state of a plain model."""
        return share(state, self.across)

    def _agree(self, op: str, model: HopeForCausalLM, state: ModelState, call: object) -> None:
        rows = list(state.pos), list(state.seen), list(state.rollbacks), state.config == model.config
        check_agreed(self.group, self.device, (call, rows, self._undivided(model)), (
            f"{op}: the processes would not do the same: their tokens, options, states or undivided "
            "weights differ. All of them read the same; gradients are clipped by hope_kernels.parallel.clip_grad_norm_"
        ))

    def _undivided(self, model: HopeForCausalLM) -> str:
        """The checksum of the weights that every process has whole, looked at when they may have changed."""
        held = [p for name, p in model.named_parameters() if name not in self.dims]
        now = steps(), [id(p) for p in held], [p._version for p in held]
        if self._same is None or self._same[0] != now:
            self._same = now, str(checksum_of([p.detach() for p in held]))
        return self._same[1]

    def _whole(self, model: nn.Module) -> Iterator[Tensor]:
        held: list[Tensor] = []
        collect(model, held)
        names = {id(p): name for name, p in model.named_parameters()}
        for t in held:
            dim = self.dims.get(names.get(id(t), ""))
            yield t.detach() if dim is None else torch.cat(tuple(self.across.parts(t.detach())), dim)

    def _as_dtensors(self, module: nn.Module, found: dict, prefix: str, metadata: dict) -> None:
        for name, _ in module.named_parameters():
            if prefix + name in found:
                placed = Shard(self.dims[name]) if name in self.dims else Replicate()
                found[prefix + name] = DTensor.from_local(
                    found[prefix + name], self.mesh, [placed], run_check=False
                )

    def _own_parts(self, module: nn.Module, given: dict, prefix: str, *_: Any) -> None:
        for name, p in module.named_parameters():
            t = given.get(prefix + name)
            if isinstance(t, DTensor):
                given[prefix + name] = t.to_local()
            elif isinstance(t, Tensor) and name in self.dims and t.shape != p.shape:
                given[prefix + name] = self.across.own(t, self.dims[name]).contiguous()
