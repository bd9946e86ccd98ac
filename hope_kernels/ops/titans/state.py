"""The fast weights of all memories of a layer as a few stacked tensors, and the state of a sequence over them.

Every row of a weight that sees the key as its input (the hidden rows of w2, the skip rows of eta and alpha,
all rows of a linear memory) obeys the same write rule, so all of them are one tensor ``w2 [.., R, D]`` and
one GEMM. The output sides are ``w1 [.., Mf, D, N]`` for the Mf memories with D outputs and ``w1s [.., Ms,
N]`` for the Ms scalar ones (eta, alpha).

    mlp:    R = M*N hidden rows, memory by memory in the order of config.memories, then Ms skip rows if scalar_skip
    linear: R = Mf*D rows, then Ms rows; no w1, no w1s

M_memory comes first, so the layer's two clocks own two contiguous row ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...check import check_batch, check_counters, check_part
from ...config import TitansConfig
from ...state import Counters, State, master_dtype

SCALARS = ("eta", "alpha")
MaybeTensor = Tensor | Any  # of what a configuration may do without: None where it has no such part
Shape = tuple[int, ...] | None


class FastWeights(NamedTuple):
    """w2 [.., R, D]; w1 [.., Mf, D, N] and w1s [.., Ms, N], or None where the layout has none."""

    w2: MaybeTensor
    w1: MaybeTensor
    w1s: MaybeTensor

    def map(self, fn, *others: FastWeights) -> FastWeights:
        return FastWeights(*(None if t is None else fn(t, *o) for t, *o in zip(self, *others)))


class Shapes(NamedTuple):
    """Of stacked FastWeights; None where the layout has none."""

    w2: Shape
    w1: Shape
    w1s: Shape


@dataclass(frozen=True)
class Layout:
    """Where each memory of ``names`` lives in stacked FastWeights. D: head width; N: hidden width. full,
    scalars: names with D outputs and with one."""

    names: tuple[str, ...]
    full: tuple[str, ...]
    scalars: tuple[str, ...]
    D: int
    N: int
    mlp: bool
    skip: bool

    @classmethod
    def of(cls, config: TitansConfig, names: tuple[str, ...] | None = None) -> Layout:
        mlp = config.memory == "mlp"
        names = config.memories if names is None else names
        full, scalars = (tuple(n for n in names if (n in SCALARS) == one) for one in (False, True))
        return cls(names, full, scalars, config.head_dim, config.hidden, mlp, mlp and config.scalar_skip)

    @property
    def hidden_rows(self) -> int:
        return len(self.names) * self.N if self.mlp else 0

    @property
    def rows(self) -> int:
        if not self.mlp:
            return len(self.full) * self.D + len(self.scalars)
        return self.hidden_rows + (len(self.scalars) if self.skip else 0)

    def shapes(self, *lead: int) -> Shapes:
        """Of the stacked tensors, after ``lead`` dimensions."""
        w1 = (*lead, len(self.full), self.D, self.N) if self.mlp and self.full else None
        w1s = (*lead, len(self.scalars), self.N) if self.mlp and self.scalars else None
        return Shapes((*lead, self.rows, self.D), w1, w1s)

    def split(self, w: FastWeights, at: int = 1) -> tuple[FastWeights, FastWeights]:
        """The first ``at`` memories (all with D outputs) and the rest, as views."""
        row = at * (self.N if self.mlp else self.D)
        head = FastWeights(w.w2[..., :row, :], None if w.w1 is None else w.w1[..., :at, :, :], None)
        tail_w1 = None if w.w1 is None or len(self.full) == at else w.w1[..., at:, :, :]
        return head, FastWeights(w.w2[..., row:, :], tail_w1, w.w1s)

    def views(self, w: FastWeights, name: str) -> dict[str, Tensor]:
        """One memory's weights by their names in the equations: w2, w1 (and w_skip), or w for a linear memory."""
        i = self.names.index(name)
        if not self.mlp:
            row = i * self.D if name in self.full else len(self.full) * self.D + self.scalars.index(name)
            return {"w": w.w2[..., row : row + (self.D if name in self.full else 1), :]}
        found = {"w2": w.w2[..., i * self.N : (i + 1) * self.N, :]}
        if name in self.full:
            found["w1"] = w.w1[..., i, :, :]
        else:
            j = self.scalars.index(name)
            found["w1"] = w.w1s[..., j : j + 1, :]
            if self.skip:
                found["w_skip"] = w.w2[..., self.hidden_rows + j : self.hidden_rows + j + 1, :]
        return found


def on_device(lengths: list[int], device) -> Tensor:
    """lengths as an int64 tensor [B]; equal ones are not copied from the host."""
    if len(set(lengths)) == 1:
        return torch.full((len(lengths),), lengths[0], dtype=torch.int64, device=device)
    return torch.tensor(lengths, dtype=torch.int64, device=device)


def moved(lengths: list[int], device) -> Tensor | int:
    """What a ``count`` [B] grows by: a number, where that is the same for all rows."""
    return lengths[0] if len(set(lengths)) == 1 else on_device(lengths, device)


@dataclass(eq=False)
class TitansState(State):
    """What a batch of sequences has learned in one layer. C = max(chunk_memory, chunk_other); all tensors
    batch first.

    delta2 [B, H, R, D], delta1 [B, H, Mf, D, N], delta1s [B, H, Ms, N]   deviations of the fast weights (fp32, or fp64)
    s2, s1, s1s                                    their momentum, or None
    pending_k, pending_v [B, C, H, D]              the open chunk's tokens, input dtype; slots past pos % C are zero
    pending_eta, pending_alpha, pending_beta [B, C, H]   fp32 (fp64); None where the layer has none
    conv_tail [B, W-1, d]                          the last inputs of the causal convolution, or None
    count [B] int64                                ``pos``, where kernels can see and advance it (``synchronize``)
    """

    delta2: Tensor
    delta1: MaybeTensor
    delta1s: MaybeTensor
    s2: MaybeTensor
    s1: MaybeTensor
    s1s: MaybeTensor
    pending_k: Tensor
    pending_v: Tensor
    pending_eta: Tensor
    pending_alpha: MaybeTensor
    pending_beta: MaybeTensor
    conv_tail: MaybeTensor
    count: MaybeTensor = None

    INPUT_DTYPE = frozenset({"pending_k", "pending_v", "conv_tail"})

    # What ``in_place`` was given: no fields, so no copy has them.
    _reads = None
    _rounded = None
    # Whether the call that reads it has made it, so that nobody misses it as it was: neither a field.
    made_here = False

    def __post_init__(self):
        if self.count is None:  # a new state, or one from a file written before there was a counter on the device
            self.count = torch.tensor(list(self.pos), dtype=torch.int64, device=self.delta2.device)

    def input_dtype(self) -> torch.dtype | None:
        return self.pending_k.dtype if isinstance(self.pending_k, Tensor) else None

    def check_tensors(self, where: str, dtype: torch.dtype | None, device: torch.device) -> None:
        """``validate`` without a look at the host's counters."""
        master = torch.float32 if dtype is None else master_dtype(dtype)
        for name, shape in _shapes(self.config, self.parts).items():
            wanted = dtype if name in self.INPUT_DTYPE else master
            check_part(
                where, name, getattr(self, name), None if shape is None else (self.batch, *shape), wanted, device
            )
        check_part(where, "count", self.count, (self.batch,), torch.int64, device)

    def _check(self, where: str, dtype: torch.dtype | None, device: torch.device, values: bool) -> None:
        if not torch.compiler.is_compiling():
            check_counters(where, "pos", self.pos, self.batch, 0)
        self.check_tensors(where, dtype, device)
        if values and self.count.tolist() != self.pos:
            raise ValueError(
                f"{where}: a TitansState with pos {list(self.pos)} and count {self.count.tolist()}, which must agree; "
                "after a kernel or a graph has advanced it alone, call state.synchronize()"
            )

    def advanced(self, lengths: list[int], **changes) -> TitansState:
        """The state with ``changes`` after row b has read ``lengths[b]`` more tokens."""
        pos = Counters([p + n for p, n in zip(self.pos, lengths)])
        if "count" not in changes:
            changes["count"] = self.count + moved(lengths, self.count.device)
        return replace(self, pos=pos, **changes)

    def in_place(self, reads: Tensor, rounded: Any = None) -> TitansState:
        """The same tensors, for one call of a backend of ``DEVICE_DECIDES`` that reads ``reads`` [B] int64
        tokens of each row: it writes them where they lie, instead of into copies, all but ``count`` and
        ``conv_tail``. ``count``, not ``pos``, says where the rows stand. rounded: a ``RoundedWeights`` of this
        state, for backend "cuda"."""
        made = replace(self)
        made._reads, made._rounded = reads, rounded
        return made

    @property
    def deviation(self) -> FastWeights:
        return FastWeights(self.delta2, self.delta1, self.delta1s)

    @property
    def momentum(self) -> FastWeights | None:
        return None if self.s2 is None else FastWeights(self.s2, self.s1, self.s1s)

    def memory(self, name: str) -> dict[str, Tensor]:
        """Deviations of one memory as views: ``{"w2": [B, H, N, D], "w1": [B, H, D_out, N], ...}``."""
        return Layout.of(self.config).views(self.deviation, name)


@cache
def _shapes(config: TitansConfig, parts: int = 1) -> dict[str, Shape]:
    """Of a TitansState's tensors after the batch dimension; None: the configuration has none. parts: over how
    many processes the heads are divided."""
    C, W = max(config.chunk_memory, config.chunk_other), config.conv_window
    H, D = config.num_heads // parts, config.head_dim
    fast = Layout.of(config).shapes(H)
    found: dict[str, Shape] = dict(zip(("delta2", "delta1", "delta1s"), fast))
    found |= dict(zip(("s2", "s1", "s1s"), fast if config.momentum is not None else (None,) * 3))
    return found | {
        "pending_k": (C, H, D), "pending_v": (C, H, D), "pending_eta": (C, H),
        "pending_alpha": (C, H) if config.retention else None,
        "pending_beta": (C, H) if config.momentum is not None else None,
        "conv_tail": None if W is None else (W - 1, config.d_model),
    }


def init_titans_state(
    config: TitansConfig, w_init: FastWeights, batch: int, device=None, dtype=torch.float32, parts: int = 1
) -> TitansState:
    """The state of ``batch`` sequences that have read nothing; ``dtype`` is that of the layer's input. parts:
    over how many processes the heads are divided. Raises ValueError."""
    check_batch("init_titans_state", batch)
    H, D, C = config.num_heads // parts, config.head_dim, max(config.chunk_memory, config.chunk_other)
    master = master_dtype(dtype)
    shapes = Layout.of(config).shapes(batch, H)

    def zeros(shape: Shape, dt: torch.dtype = master) -> MaybeTensor:
        return None if shape is None else torch.zeros(shape, device=device, dtype=dt)

    if config.retain_to == "init":
        delta: list[Any] = [zeros(s) for s in shapes]
    else:
        delta = [
            None if t is None else t.detach().to(device=device, dtype=master).expand(batch, *t.shape).clone()
            for t in w_init
        ]
    momentum = [zeros(s) for s in shapes] if config.momentum is not None else [None] * 3
    W = config.conv_window
    return TitansState(
        Counters([0] * batch), config, *delta, *momentum,
        pending_k=zeros((batch, C, H, D), dtype), pending_v=zeros((batch, C, H, D), dtype),
        pending_eta=zeros((batch, C, H)), pending_alpha=zeros((batch, C, H)) if config.retention else None,
        pending_beta=zeros((batch, C, H)) if config.momentum is not None else None,
        conv_tail=zeros((batch, W - 1, config.d_model), dtype) if W is not None else None, parts=parts,
    )
