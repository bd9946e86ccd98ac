"""A call in PyTorch, chunk after chunk: any device, dtype and switch, and chunks that do not divide each
other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.titans.evaluate import read
from ...ops.titans.state import FastWeights
from .config import engine
from .groups import Group
from .state import layout_of

if TYPE_CHECKING:
    from .layer import SelfModifyingTitans


class Chunked:
    """Reads and writes the convolved x [B, T, dim] with the static q [B, T, dim] (None with adaptive_q), both
    in the master dtype. w: the weights of all memories that learn, stacked; s: their momentum, or None; both
    may be written over. After ``run`` the groups have what was learned."""

    def __init__(
        self, layer: SelfModifyingTitans, x: Tensor, q: Tensor | None, w: FastWeights, s: FastWeights | None,
        other: int, memory: int,
    ):
        self.layer, self.config, self.x, self.q = layer, engine(layer.config), x, q
        names = self.config.memories
        whole, *self.layouts = (
            layout_of(self.config, part, layer.config.dim) for part in (names, names[:1], names[1:])
        )
        if other == memory:
            self.groups = [Group(self.config, whole, w, s, other)]
            return
        momentum = (None, None) if s is None else whole.split(s)
        self.groups = [
            Group(self.config, *part) for part in zip(self.layouts, whole.split(w), momentum, (memory, other))
        ]

    def _weights(self) -> tuple[FastWeights, FastWeights]:
        first = self.groups[0]
        return (first.w, self.groups[1].w) if len(self.groups) > 1 else first.layout.split(first.w)

    def _read(self, a: int, b: int) -> Tensor:
        """Reads tokens a..b-1 with the weights in force and queues what they will write; returns o [B, b-a,
        dim]."""
        c, layer, x = self.config, self.layer, self.x[:, a:b]
        memory_w, other_w = self._weights()
        out = read(x.mT, other_w, self.layouts[1], c.activation, x.dtype)
        full = out.full
        assert full is not None
        k, v = layer.unit(full[:, 0].mT), full[:, 1].mT
        q = layer.unit(full[:, 2].mT) if self.q is None else self.q[:, a:b]
        # with dim 1, eta and alpha are the last of the memories with D outputs
        scalar = full[:, 3 if self.q is None else 2 :, 0] if out.scalar is None else out.scalar
        eta = F.softplus(scalar[:, 0]) * c.eta_scale
        alpha = torch.sigmoid(scalar[:, 1]) if c.retention else None
        for group in self.groups:
            group.waiting.append((k, v, eta, alpha))
        read_out = read(q.mT, memory_w, self.layouts[0], c.activation, x.dtype).full
        assert read_out is not None
        return read_out[:, 0].mT

    def run(self) -> Tensor:
        """o [B, T, dim]."""
        T, at, outputs = self.x.shape[1], 0, []
        while at < T:
            end = min([T] + [(at // g.chunk + 1) * g.chunk for g in self.groups])
            outputs.append(self._read(at, end))
            for group in self.groups:
                if end % group.chunk == 0 or end == T:
                    group.commit(self.layer.config.stopgrad_vhat)
            at = end
        return torch.cat(outputs, 1)
