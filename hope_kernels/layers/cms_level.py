"""One level of a ContinuumMemory as a module: its parameters, and a call that reads them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class CMSLevel(nn.ParameterDict):
    """Parameters by name, ``level["up"]``. ``level(x, read)`` is ``read(x, parameters)``: what a call
    computes with them is its caller's, but it takes them here, so hooks, wrappers, parametrizations and
    sharding of a level are seen."""

    __call__ = nn.Module.__call__  # a ParameterDict refuses calls

    def forward(self, x: Tensor, read: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Tensor:
        return read(x, self.parameters_by_name())

    def parameters_by_name(self) -> dict[str, Tensor]:
        """As a plain dict; access by name costs microseconds each, and is needed only where something is
        parametrized."""
        held = self._parameters
        return held if len(held) == len(self._keys) else dict(self.items())
