"""The package's configuration, and the same rule in the terms of this one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ...config import TitansConfig


@dataclass(frozen=True)
class SelfModifyingTitansConfig:
    """Fields, defaults and ranges of the package's class; ValueError outside them. Sizes may be floats and
    are truncated."""

    dim: int
    eta_scale: float = 1e-3
    chunk_size_other: int = 1
    chunk_size_memory: int | None = None
    objective: str = "l2"
    stopgrad_vhat: bool = True
    use_rank1_precond: bool = True
    use_alpha: bool = True
    momentum: float = 0.0
    qk_l2_norm: bool = True
    adaptive_q: bool = False
    use_skip: bool = True
    local_conv_window: int | None = 4
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.chunk_size_memory is None:
            object.__setattr__(self, "chunk_size_memory", int(self.chunk_size_other))
        for name in ("dim", "eta_scale", "chunk_size_other", "chunk_size_memory", "local_conv_window"):
            value = getattr(self, name)
            if value is not None and (int(value) if name == "local_conv_window" else value) <= 0:
                raise ValueError(f"SelfModifyingTitansConfig: {name} is {value!r}, expected a positive number")
        if self.objective not in ("l2", "dot"):
            raise ValueError(f"SelfModifyingTitansConfig: objective is {self.objective!r}, expected 'l2' or 'dot'")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(
                f"SelfModifyingTitansConfig: momentum is {self.momentum!r}, expected a float in [0, 1)"
            )


@lru_cache(maxsize=1024)
def engine(config: SelfModifyingTitansConfig, other: int = 1, memory: int = 1) -> TitansConfig:
    """The rule of ``config`` in this package's terms, with chunks of these sizes, one of which divides the
    other."""
    return TitansConfig.preset(
        "nested_learning", d_model=config.dim, chunk_other=other, chunk_memory=memory,
        objective=config.objective, dgd=bool(config.use_rank1_precond), retention=bool(config.use_alpha),
        momentum=float(config.momentum) or None, qk_l2norm=bool(config.qk_l2_norm),
        adaptive_q=bool(config.adaptive_q), scalar_skip=bool(config.use_skip) and config.dim > 1,
        eta_scale=float(config.eta_scale),
        conv_window=None if config.local_conv_window is None else int(config.local_conv_window),
    )
