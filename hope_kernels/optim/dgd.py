"""Delta gradient descent (Nested Learning, eq 57): a step that first erases what weights say of an input."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..check import check_integer, check_number
from ..state import master_dtype
from . import divided
from .base import MatrixOptimizer

REDUCTIONS = ("mean", "sum")


class DGD(MatrixOptimizer):
    """W <- W (I - eta_1' x_1 x_1ᵀ) ... (I - eta_n' x_n x_nᵀ) - eta' grad,   eta_i' = eta / (1 + eta |x_i|^2)

    Eq 57 is the exact step of min |W x + dL/dy|^2 / 2 + |W - W_t|^2 / (2 eta) for one input x and normalised
    inputs. Here n inputs came before a step: their n decays are applied in order, then the gradient with the
    mean of the eta_i'. eta is lr for a loss that is a sum over the inputs (reduction="sum"). For one that is
    a mean, the default, each input has lr / n, so that the gradient's rate is n times their mean and close to
    lr. erase: multiplies the decays, W (I - erase eta_i' x_i x_iᵀ), at most 1; erase=0 also leaves eta' = lr,
    which is SGD.

    The inputs are those of ``nn.Linear`` layers: ``DGD(model)`` takes their weights, gives all other
    parameters to AdamW and watches the layers; ``DGD(params).watch(model)`` does so for parameters in groups
    of your own. An input counts once a backward pass has made of it a part of its weight's ``grad``: a reading
    without one leaves none, and neither does ``torch.autograd.grad``, with which a model learns while it reads.
    It is kept, not copied, until ``step``, and goes with ``zero_grad`` and wherever ``grad`` is set to None.
    Calls come in the order of their gradients, the inputs of one call in its order. Watching ends with
    ``unwatch``; a copied or unpickled optimizer has to watch again.

    With inputs X [n, c], e_i = erase eta_i' and R_i = W_{i-1} x_i, what the weights say of an input when its
    turn comes, all decays together are

        (I + L diag(e)) R = X Wᵀ,   W <- W - Rᵀ diag(e) X,   L the strictly lower part of X Xᵀ

    a triangular solve for each ``chunk`` of inputs; n of them cost n (2 c chunk + 4 c r + r chunk)
    operations.

    Refused by name: parameters that are divided over processes, and steps where several processes train: each
    has inputs of its own, and their weights would drift apart. State: inputs since the last step, in their
    order. Raises ValueError for options out of range, sparse gradients, parameters that are complex or empty,
    and at ``step``, before anything changes, for a matrix with a gradient and no input, and for inputs that
    were written to after they had been read.

    >>> layer = nn.Linear(8, 4, bias=False)
    >>> optimizer = DGD(layer, lr=0.1)
    >>> layer(torch.ones(3, 8)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self, params, lr: float | Tensor = 1e-3, erase: float = 1.0, *, reduction: str = "mean",
        chunk: int = 256, weight_decay: float = 0.0, **adamw,
    ) -> None:
        """params: as of any optimizer, or a model. adamw: ``adamw_lr``, ``adamw_betas``, ``adamw_eps``
        (``MatrixOptimizer``)."""
        self._begin()
        model = params if isinstance(params, nn.Module) else None
        super().__init__(params if model is None else _groups(model), {
            "lr": lr, "erase": erase, "reduction": reduction, "chunk": chunk, "weight_decay": weight_decay
        }, adamw)
        if model is not None:
            self.watch(model)

    def _begin(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._followed: set[Tensor] = set()
        # inputs whose gradients have arrived in a graph task that may yet reach their weight's grad
        self._arrived: dict[Tensor, dict[int, list[Tensor]]] = {}
        self._versions: list[tuple[Tensor, int]] = []  # of inputs, when they were read

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_number("DGD", "erase", group["erase"], lambda x: 0 <= x <= 1, "0 <= erase <= 1")
        check_integer("DGD", "chunk", group["chunk"], 1, "an integer >= 1")
        if group["reduction"] not in REDUCTIONS:
            raise ValueError(
                f"DGD: argument reduction is {group['reduction']!r}, expected one of {REDUCTIONS}"
            )
        for p in group["params"]:
            if self.is_matrix(group, p) and divided.is_divided(p):
                raise ValueError(
                    f"DGD: a parameter {list(p.shape)} is divided over processes (DTensor), and each of them "
                    "has inputs of its own; M3, DeltaMomentum and DeepMomentum serve such parameters"
                )

    def watch(self, model: nn.Module) -> DGD:
        """Keeps the inputs of the ``nn.Linear`` layers in ``model`` whose weights are this optimizer's."""
        self.unwatch()
        mine = {id(p) for group in self.param_groups for p in group["params"] if self.is_matrix(group, p)}
        for module in model.modules():
            if isinstance(module, nn.Linear) and id(module.weight) in mine:
                watcher = _Watcher(self, module.weight)
                self._handles.append(module.register_forward_hook(watcher, with_kwargs=True))
        return self

    def unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._followed = [], set()

    def follow(self, weight: Tensor) -> None:
        """Asks to be told where ``weight.grad`` has grown: of a leaf, which a frozen weight is not yet."""
        if weight not in self._followed:
            self._followed.add(weight)
            self._handles.append(weight.register_post_accumulate_grad_hook(_Accumulated(self)))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for kept in self.state.values():
            kept.pop("inputs", None)
        self._arrived, self._versions = {}, []

    def arrived(self, weight: Tensor, x: Tensor, version: int) -> None:
        """A gradient has arrived at a layer that read x [n, c] with ``weight``."""
        if weight.grad is None:  # whatever came before has gone with it
            self.state[weight].pop("inputs", None)
        self._versions.append((x, version))
        self._arrived.setdefault(weight, {}).setdefault(torch._C._current_graph_task_id(), []).append(x)

    def accumulated(self, weight: Tensor) -> None:
        """What has arrived in this graph task is in ``weight.grad``."""
        found = self._arrived.get(weight, {}).pop(torch._C._current_graph_task_id(), [])
        self.state[weight].setdefault("inputs", []).extend(found)

    def step(self, closure=None) -> Any:
        loss = super().step(closure)
        self._arrived, self._versions = {}, []
        return loss

    def check_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not group["erase"]:
            return
        for x, version in self._versions:
            if x._version != version:
                raise ValueError(
                    f"DGD: an input {list(x.shape)} was written to after a layer had read it, and it is kept "
                    "until step: give the layer a copy, x.clone()"
                )
        for p in params:
            if not self.state[p].get("inputs"):
                raise ValueError(
                    f"DGD: a matrix {list(p.shape)} has a gradient and no input: watch(model) where it is "
                    "the weight of an nn.Linear, or have it in a group with adamw=True"
                )
        if params and torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                raise ValueError(
                    "DGD: several processes train, and each has inputs of its own; erase=0 needs none"
                )

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr, erase, chunk = float(group["lr"]), group["erase"], group["chunk"]
        for p, grad in zip(params, grads):
            inputs = self.state[p].pop("inputs", None)
            if group["weight_decay"]:
                p.mul_(1 - lr * group["weight_decay"])
            if not erase:
                p.add_(grad, alpha=-lr)
                continue
            x = torch.cat([t.to(master_dtype(p.dtype)) for t in inputs])
            if not len(x):
                continue
            eta, n = (lr, 1) if group["reduction"] == "sum" else (lr / len(x), len(x))
            rates = eta / (1 + eta * x.square().sum(1))
            for i in range(0, len(x), chunk):
                erase_(p, x[i : i + chunk], erase * rates[i : i + chunk])
            p.sub_(grad * (n * rates.mean()))


class _Hook:
    """Holds its optimizer weakly. That of a copied or unpickled module does nothing: the optimizer does not have
    the copy's weights."""

    def __init__(self, optimizer: DGD | None = None) -> None:
        self.optimizer = (lambda: None) if optimizer is None else weakref.ref(optimizer)

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()


class _Watcher(_Hook):
    """A forward hook of a layer with ``weight``."""

    def __init__(self, optimizer: DGD | None = None, weight: Tensor | None = None) -> None:
        super().__init__(optimizer)
        self.weight = weight

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        optimizer, weight = self.optimizer(), self.weight
        if optimizer is None or weight is None or module.weight is not weight:
            return  # it was called with another's weight, by torch.func say
        if not output.requires_grad or not weight.requires_grad:
            return
        optimizer.follow(weight)
        x = (args[0] if args else kwargs["input"]).detach()
        x, version = x.reshape(-1, x.shape[-1]), x._version

        def arrived(grad: Tensor) -> None:
            if (optimizer := self.optimizer()) is not None:  # its state may have been loaded since
                optimizer.arrived(weight, x, version)

        output.register_hook(arrived)


class _Accumulated(_Hook):
    """A hook of a weight, after its ``grad`` has grown."""

    def __call__(self, weight: Tensor) -> None:
        if (optimizer := self.optimizer()) is not None:
            optimizer.accumulated(weight)


def _groups(model: nn.Module) -> list[dict[str, Iterable[Any]]]:
    linear = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    for table in (m for m in model.modules() if isinstance(m, nn.Embedding)):
        linear.pop(id(table.weight), None)  # of a head tied to it, whose gradient has other sources
    others = [p for p in model.parameters() if id(p) not in linear]
    found = [{"params": list(linear.values())}, {"params": others, "adamw": True}]
    return [group for group in found if group["params"]]


def erase_(weight: Tensor, x: Tensor, rates: Tensor) -> None:
    """In place: weight [r, c] times (I - e_1 x_1 x_1ᵀ) ... (I - e_n x_n x_nᵀ); x [n, c], rates e [n]."""
    lower = (x @ x.mT).tril(-1) * rates  # [i, j]: e_j x_i x_jᵀ for j < i
    reads = torch.linalg.solve_triangular(lower, x @ weight.to(x.dtype).mT, upper=False, unitriangular=True)
    weight.sub_((reads * rates[:, None]).mT @ x)
