"""The whole weights of a model that is divided over processes: their checksum, and a model that has them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..identity import Checksum, checksum_of, collect, divided, steps
from ..layers.wrapped import placement
from ..model import HopeForCausalLM

Marks = tuple[int, list[Tensor], list[int]]  # steps of all optimizers, parameters, and their versions


def full(t: Tensor) -> Tensor:
    """The whole of a DTensor, which takes all processes that have a part of it; any other tensor as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[attr-defined]


class WholeChecksum:
    """The checksum that a model has where it is not divided: what states and files of sessions carry.

    Gathered, tensor by tensor, when the parameters have changed since it was last asked for, which all
    processes notice alike: by PyTorch's version counters and the number of optimizer steps. Not while
    training: in grad mode there is none after weights have changed, until they are read under no_grad.
    whole: the tensors of a module, whole, in the order of ``identity.collect``. ``settled``: inside a call,
    where parameters come and go and do not change, the last one is good.
    """

    def __init__(
        self, model: HopeForCausalLM, whole: Callable[[nn.Module], Iterator[Tensor]], known: Checksum | None
    ):
        self._whole, self._known, self.settled = whole, known, False
        self._marks: Marks | None = None
        parts = [m for b in model.blocks for m in (b.mixer, b.cms) if m is not None]
        # what belongs to a part belongs to the model: one checksum serves both
        of = weakref.ref(model)
        for module in (model, *parts):
            divided(module, lambda anew: None if (held := of()) is None else self(held, anew))
        if known is not None:
            self._marks = self._now(model)

    def __call__(self, model: nn.Module, anew: bool = False) -> Checksum | None:
        if self.settled and not anew:
            return self._known
        now = self._now(model)
        if torch.is_grad_enabled() and not anew and not _alike(now, self._marks):
            self._known = self._marks = None
            return None
        if anew or self._known is None or not _alike(now, self._marks):
            found = checksum_of(self._whole(model))
            # one object as long as the values stay the same: who compares, compares objects
            if self._known is None or str(found) != str(self._known):
                self._known = found
            if not self.settled:
                self._marks = now
        return self._known

    def _now(self, model: nn.Module) -> Marks:
        held: list[Tensor] = []
        collect(model, held)
        return steps(), held, [-1 if t.is_inference() else t._version for t in held]


def _alike(now: Marks, before: Marks | None) -> bool:
    return before is not None and now[0] == before[0] and now[2] == before[2] and all(
        a is b for a, b in zip(now[1], before[1])
    )


def whole_model(model: HopeForCausalLM, device: torch.device | str = "cpu") -> HopeForCausalLM:
    """A plain model on ``device`` with the weights of ``model``, which is divided over processes: in each
    of them, all of which have to call this. It shares nothing with ``model``; save and consolidate that
    one."""
    plain = HopeForCausalLM(model.config, device="meta", dtype=placement(model.embed).dtype)
    tensors = {name: full(t.detach()).to(device, copy=True) for name, t in model.state_dict().items()}
    plain.load_state_dict(tensors, assign=True)
    for name, p in model.named_parameters():
        plain.get_parameter(name).requires_grad_(p.requires_grad)
    plain.text_files = dict(model.text_files)
    return plain.train(model.training)
