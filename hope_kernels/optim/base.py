"""What the optimizers share: which parameters are matrices, AdamW for the others, equal shapes together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..check import check_number
from . import divided, lists
from .adamw import adamw_
from .orthogonal import ADJUSTMENTS, adjusted, check_backend, orthogonalised

ADAMW = {"adamw": False, "adamw_lr": 1.0, "adamw_betas": (0.9, 0.999), "adamw_eps": 1e-8}
ORTHOGONAL = {"adjust_lr_fn": "original", "ns_dtype": None, "backend": None}
OUTER = ("embed", "embeddings", "embed_tokens", "wte", "wpe", "head", "lm_head")
EACH = ("norm_gain", "conv")  # a gain, and taps, of every channel: two dimensions that multiply no vector


def groups(model: nn.Module, adamw: tuple[str, ...] = OUTER) -> list[dict[str, Any]]:
    """Two groups of parameters: the matrices inside a model, and what AdamW trains better: embeddings, heads
    and all that is no matrix, a mixer's taps and gains of its heads among them. adamw: names of modules (a
    part of the parameter's name between dots) that count as such.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    >>> [len(g["params"]) for g in groups(model)]
    [1, 4]
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, others = [], []
    for name, p in model.named_parameters():
        parts = name.split(".")
        inside = p.ndim == 2 and id(p) not in tables and parts[-1] not in EACH and not set(parts) & set(adamw)
        (matrices if inside else others).append(p)
    found = [{"params": matrices}, {"params": others, "adamw": True}]
    return [group for group in found if group["params"]]


class MatrixOptimizer(Optimizer):
    """Steps of matrices by ``update``, which a subclass has; of everything else by AdamW.

    A matrix is a parameter of two dimensions outside the groups with ``adamw=True``. Options of every group,
    beside ``lr`` and ``weight_decay`` (decoupled): ``adamw``, ``adamw_lr`` (AdamW's rate as a multiple of lr,
    so that schedulers reach both), ``adamw_betas``, ``adamw_eps``. The state of a parameter has the
    parameter's dtype, as in torch.optim. Non-finite gradients are not looked for, as in torch.optim. A
    parameter that is divided over processes (DTensor) has a state divided alike. ``torch.compile`` leaves a
    step as it is: it runs eagerly.
    """

    def __init__(self, params, options: dict[str, Any], adamw: dict[str, Any]) -> None:
        for unknown in adamw.keys() - ADAMW.keys():
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {unknown!r}")
        super().__init__(params, {**ADAMW, **options, **adamw})

    def check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for an option, or a parameter, that cannot be."""
        name = type(self).__name__
        for option in ("lr", "weight_decay", "adamw_lr", "adamw_eps"):
            _at_least_zero(name, option, group[option])
        check_betas(name, "adamw_betas", group["adamw_betas"], 2)
        if not isinstance(group["adamw"], bool):
            raise ValueError(f"{name}: argument adamw is {group['adamw']!r}, expected a boolean")
        if "adjust_lr_fn" in group:
            if group["adjust_lr_fn"] not in ADJUSTMENTS:
                raise ValueError(
                    f"{name}: argument adjust_lr_fn is {group['adjust_lr_fn']!r}, "
                    f"expected one of {ADJUSTMENTS}"
                )
            if group["ns_dtype"] not in (None, torch.bfloat16):
                raise ValueError(
                    f"{name}: argument ns_dtype is {group['ns_dtype']}, expected None or torch.bfloat16"
                )
            check_backend(name, group["backend"])
        for p in group["params"]:
            if not p.dtype.is_floating_point:
                raise ValueError(f"{name}: a parameter {list(p.shape)} is {p.dtype}, expected real numbers")
            if not p.numel():
                raise ValueError(f"{name}: a parameter {list(p.shape)} has no elements")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self.check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def is_matrix(self, group: dict[str, Any], p: Tensor) -> bool:
        return p.ndim == 2 and not group["adamw"]

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """One step of matrices of one shape, dtype, device and division. grads: this process's parts."""
        raise NotImplementedError

    def check_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Before anything changes: raises ValueError for matrices that ``update`` cannot serve."""

    @lists.eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; closure: called first, with gradients, for the loss that is returned. Raises ValueError,
        before any parameter has changed, for sparse gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        split = []
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            for p in found:
                if p.grad.layout != torch.strided:
                    raise ValueError(
                        f"{type(self).__name__}: the gradient of a parameter {list(p.shape)} has layout "
                        f"{p.grad.layout}, expected torch.strided (dense)"
                    )
            matrices = [p for p in found if self.is_matrix(group, p)]
            self.check_step(group, matrices)
            split.append((group, matrices, [p for p in found if not self.is_matrix(group, p)]))
        for group, matrices, others in split:
            if others:
                adamw_(self.state, group, others, [divided.gradient(p) for p in others])
            for params in alike(matrices):
                self.update(group, params, [divided.part(divided.gradient(p)) for p in params])
        return loss

    def kept(self, name: str, params: list[Tensor]) -> list[Tensor]:
        """What the state of ``params`` has under ``name``, zeros at first: this process's parts, to be
        changed in place."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [divided.part(self.state[p][name]) for p in params]

    def orthogonal(self, group: dict[str, Any], params: list[Tensor], matrices: list[Tensor]) -> list[Tensor]:
        """About U V^T of ``matrices``, which are this process's parts, as the result is."""
        found = [divided.whole(m, p) for m, p in zip(matrices, params)]
        found = orthogonalised(found, group["ns_dtype"], group["backend"])
        return [divided.own(m, p) for m, p in zip(found, params)]

    def move(
        self, group: dict[str, Any], params: list[Tensor], steps: list[Tensor], orthogonal: bool = False
    ) -> None:
        """theta <- (1 - lr weight_decay) theta - lr step, at the rate of an orthogonal step if it is one."""
        lr, weights = float(group["lr"]), [divided.part(p) for p in params]
        if group["weight_decay"]:
            lists.mul_(weights, 1 - lr * group["weight_decay"])
        rate = adjusted(lr, group["adjust_lr_fn"], params[0].shape) if orthogonal else lr
        lists.add_(weights, steps, alpha=-rate)


def alike(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of parameters of one shape, dtype, device and division, in order of their first."""
    found: dict[tuple, list[Tensor]] = {}
    for p in params:
        found.setdefault((p.shape, p.dtype, p.device, divided.layout(p)), []).append(p)
    yield from found.values()


def _at_least_zero(name: str, option: str, value: Any) -> None:
    value = value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value
    check_number(name, option, value, lambda x: 0 <= x < math.inf, "a number >= 0")


def check_betas(name: str, option: str, values: Any, count: int) -> None:
    """Raises ValueError unless there are ``count`` numbers in [0, 1)."""
    if not isinstance(values, (tuple, list)) or len(values) != count:
        raise ValueError(f"{name}: argument {option} is {values!r}, expected {count} numbers")
    for i, value in enumerate(values):
        check_number(name, f"{option}[{i}]", value, lambda x: 0 <= x < 1, "0 <= beta < 1")
