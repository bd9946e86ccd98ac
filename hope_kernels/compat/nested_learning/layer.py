"""The package's layer: its parameters, and the calls that read and write."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...check import check_tensor
from ...layers.wrapped import effective_weight, is_hooked, placement, project, write_weight
from .call import read_and_write
from .config import SelfModifyingTitansConfig, engine
from .evaluate import evaluate
from .kernels import fast_convolution, fast_unit, products
from .state import NAMES, ResidualMLPMemoryState, SelfModifyingTitansState


class ResidualMLPMemory(nn.Module):
    """Initial weights of one memory: M(z) = skip(z) + w1 gelu(w2 z)."""

    def __init__(self, dim: int, out: int, use_skip: bool):
        super().__init__()
        self.dim = dim
        self.w2 = nn.Linear(dim, dim, bias=False)
        self.w1 = nn.Linear(dim, out, bias=False)
        self.w_skip = nn.Linear(dim, out, bias=False) if use_skip and out != dim else None

    def forward(self, x: Tensor) -> Tensor:
        return evaluate(x, *self.weights())

    def weights(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """w1, w2 and w_skip, as adapters and parametrizations of the Linears have them."""
        w1, w2 = effective_weight(self.w1, self.dim), effective_weight(self.w2, self.dim)
        return w1, w2, None if self.w_skip is None else effective_weight(self.w_skip, self.dim)


class SelfModifyingTitans(nn.Module):
    """The package's layer; ``hope_kernels/compat/nested_learning/__init__.py`` says what is kept of it."""

    m_k: ResidualMLPMemory
    m_v: ResidualMLPMemory
    m_q: ResidualMLPMemory
    m_eta: ResidualMLPMemory
    m_alpha: ResidualMLPMemory
    m_memory: ResidualMLPMemory

    def __init__(self, config: SelfModifyingTitansConfig):
        super().__init__()
        self.config = config
        d, window = config.dim, config.local_conv_window
        self.local_conv = None if window is None else nn.Conv1d(d, d, int(window), groups=d, bias=False)
        self.w_q = nn.Linear(d, d, bias=False)
        for name in NAMES:
            setattr(self, f"m_{name}", ResidualMLPMemory(d, 1 if name in ("eta", "alpha") else d, config.use_skip))

    def init_fast_state(self) -> SelfModifyingTitansState:
        """A new context: the initial weights, unbatched."""
        def start(m: ResidualMLPMemory) -> ResidualMLPMemoryState:
            return ResidualMLPMemoryState(*m.weights()).clone()

        return SelfModifyingTitansState(**{name: start(getattr(self, f"m_{name}")) for name in NAMES})

    def forward(self, x: Tensor) -> Tensor:
        """Reads x [B, T, dim] with the initial weights; differentiable, nothing is written. Without a
        convolution x is [..., dim]."""
        if self.local_conv is not None:
            self._check(x)
        x = self._convolved(x)
        return self.m_memory(self.unit(self.m_q(x) if self.config.adaptive_q else self.w_q(x)))

    def forward_with_state(self, x: Tensor, state: SelfModifyingTitansState) -> Tensor:
        """Reads x [B, T, dim] with the state's weights. Gradients reach x and, straight through the state,
        the initial weights."""
        self._check(x)
        state = self._batched(state, x.shape[0], NAMES)
        x = self._convolved(x)

        def through(name: str, z: Tensor) -> Tensor:
            fast, meta = getattr(state, name), getattr(self, f"m_{name}")

            def joined(part: str) -> Tensor:
                weight = effective_weight(getattr(meta, part), meta.dim)
                return getattr(fast, part) + (weight - weight.detach())

            w1, w2 = joined("w1"), joined("w2")
            return evaluate(z, w1, w2, None if fast.w_skip is None else joined("w_skip"))

        return through("memory", self.unit(through("q", x) if self.config.adaptive_q else self.w_q(x)))

    @torch.no_grad()
    def forward_with_updates(
        self, x: Tensor, state: SelfModifyingTitansState, *, chunk_size_other: int | None = None,
        chunk_size_memory: int | None = None,
    ) -> tuple[Tensor, SelfModifyingTitansState]:
        """Reads and writes x [B, T, dim]: (outputs, state). A batched state is advanced in place; an
        unbatched one is expanded first.

        Chunk sizes override the configuration's and need not divide each other. Raises ValueError for shapes,
        dtypes and sizes.
        """
        self._check(x, None if torch.is_autocast_enabled(x.device.type) else placement(self.w_q).dtype)
        other = int(self.config.chunk_size_other if chunk_size_other is None else chunk_size_other)
        chunk_size_memory = self.config.chunk_size_memory if chunk_size_memory is None else chunk_size_memory
        assert chunk_size_memory is not None
        memory = int(chunk_size_memory)
        if other <= 0 or memory <= 0:
            raise ValueError(
                f"forward_with_updates: chunk sizes are {other} and {memory}, expected positive integers"
            )
        state = self._batched(state, x.shape[0], engine(self.config).memories)
        x = self._convolved(x)
        q = None if self.config.adaptive_q else self._query(project(self.w_q, x, products(self.config, x)))
        with torch.autocast(x.device.type, enabled=False):
            return read_and_write(self, x, q, state, other, memory), state

    @torch.no_grad()
    def apply_updates_inplace(
        self, x: Tensor, *, chunk_size_other: int | None = None, chunk_size_memory: int | None = None
    ) -> None:
        """Reads x from the initial weights and makes what was learned, averaged over the batch, the new
        initial weights. Raises ValueError, and changes none, where adapters or a parametrization stand
        between a Linear's parameters and its weight."""
        _, state = self.forward_with_updates(
            x, self.init_fast_state(), chunk_size_other=chunk_size_other, chunk_size_memory=chunk_size_memory
        )
        found = []
        for name in NAMES:
            if name == "q" and not self.config.adaptive_q or name == "alpha" and not self.config.use_alpha:
                continue
            meta, fast = getattr(self, f"m_{name}"), getattr(state, name)
            for part in ("w1", "w2", "w_skip"):
                if getattr(fast, part) is not None:
                    found.append((f"m_{name}.{part}", getattr(meta, part), getattr(fast, part).mean(0)))
        for keep in (False, True):  # all are asked before the first one is changed
            for where, linear, value in found:
                if is_hooked(linear):
                    raise ValueError(
                        f"apply_updates_inplace: {where} has hooks, expected a Linear that is its weight"
                    )
                write_weight(f"apply_updates_inplace: {where}", linear, "weight", value, keep)

    def _check(self, x: Tensor, dtype: torch.dtype | None = None) -> None:
        check_tensor("SelfModifyingTitans", "x", x, ("B", "T", self.config.dim), dtype)

    def _convolved(self, x: Tensor) -> Tensor:
        if self.local_conv is None:
            return x
        fast, kernel_size = self._fast_convolution(x), self.local_conv.kernel_size[0]
        if fast is not None:
            before = x.new_zeros(x.shape[0], kernel_size - 1, x.shape[-1])
            return fast(x, before, self.local_conv.weight[:, 0], None)[0]
        return self.local_conv(F.pad(x.mT, (kernel_size - 1, 0))).mT

    def _fast_convolution(self, x: Tensor) -> Callable | None:
        """A backend's, where the module is what its weight says and nothing asks for a graph or a cast."""
        module = self.local_conv
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or type(module) is not nn.Conv1d:
            return None
        weight = module._parameters.get("weight")
        if is_hooked(module) or type(weight) is not nn.Parameter or weight.dtype != x.dtype:
            return None
        return fast_convolution(self.config, x)

    def unit(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1, eps=self.config.eps) if self.config.qk_l2_norm else z

    def _query(self, z: Tensor) -> Tensor:
        """``unit`` where nothing asks for a gradient."""
        fast = fast_unit(self.config, z)
        return self.unit(z) if fast is None else fast(z)

    def _batched(
        self, state: SelfModifyingTitansState, batch: int, replaced: tuple[str, ...]
    ) -> SelfModifyingTitansState:
        """``state`` with a batch dimension. Of an unbatched state the memories in ``replaced``, of which the
        caller keeps no tensor, are views; the others are copies."""
        for name in NAMES:
            given, own = getattr(state, name).w_skip is not None, getattr(self, f"m_{name}").w_skip is not None
            if given != own:
                raise ValueError(f"SelfModifyingTitans: state.{name}.w_skip is {'given' if given else 'None'}, "
                                 f"but the layer's m_{name} has {'one' if own else 'none'}")
        if state.k.w1.dim() == 2:
            def expanded(name: str) -> ResidualMLPMemoryState:
                memory = getattr(state, name)
                batched = memory.map(lambda t: t.detach().expand(batch, *t.shape))
                return batched if name in replaced and memory.m_w1 is None else batched.clone()

            return SelfModifyingTitansState(**{name: expanded(name) for name in NAMES})
        if state.k.w1.dim() != 3:
            raise ValueError(f"SelfModifyingTitans: argument state has weights of {state.k.w1.dim()} dimensions, "
                             "expected 2 or 3")
        if state.k.w1.shape[0] != batch:
            raise ValueError(
                f"SelfModifyingTitans: argument state has {state.k.w1.shape[0]} rows, expected {batch}"
            )
        return state
