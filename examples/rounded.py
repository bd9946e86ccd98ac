"""Training in 16 bits: a rounded copy of the model computes, and the model itself, in fp32, takes the steps."""

from __future__ import annotations

import copy

import torch

from hope_kernels import HopeForCausalLM


class Rounded:
    """model: in fp32. computes: what reads and is differentiated; the model itself where ``dtype`` is fp32."""

    def __init__(self, model: HopeForCausalLM, dtype: torch.dtype):
        self.model = self.computes = model
        if dtype != torch.float32:
            self.computes = copy.deepcopy(model).to(dtype)

    @torch.no_grad()
    def round(self) -> None:
        """The copy becomes what the model is now."""
        if self.computes is not self.model:
            for own, exact in zip(self.computes.parameters(), self.model.parameters()):
                own.copy_(exact)

    def take_gradients(self) -> None:
        """The gradients of the copy become those of the model, in fp32; the copy has none afterwards."""
        if self.computes is not self.model:
            for own, exact in zip(self.computes.parameters(), self.model.parameters()):
                exact.grad = None if own.grad is None else own.grad.to(exact.dtype)
                own.grad = None
