"""One level of a ContinuumMemory as a module: its parameters, and a call that reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class CMSLevel(nn.ParameterDict):
    """Parameters by name, ``level["up"]``. ``level(x, read)`` is ``read(x, parameters)``: the caller says what
    is computed with them, but they are taken inside this call, so hooks, wrappers, parametrizations and
    sharding of a level take effect."""

    __call__ = nn.Module.__call__  # a ParameterDict refuses calls

    def forward(self, x: Tensor, read: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Tensor:
        return read(x, self.parameters_by_name())

    def parameters_by_name(self) -> dict[str, Tensor]:
        """As a plain dict; access by name costs microseconds each, and is needed only where something is
        parametrized."""
        held: dict[str, Any] = self._parameters
        return held if len(held) == len(self._keys) else dict(self.items())
