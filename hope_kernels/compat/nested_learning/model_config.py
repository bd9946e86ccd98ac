"""The configuration of the package's language model, and the same model in this package's terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...config import CMSConfig, HopeConfig
from .config import SelfModifyingTitansConfig, engine

LAYER_NORM_EPS = 1e-5  # PyTorch's, which the package takes


@dataclass(frozen=True)
class LevelSpec:
    """One CMS level of the package. Of its fields ``name`` and ``update_period`` mean something here."""

    name: str
    update_period: int
    warmup_steps: int = 0
    jitter: int = 0
    optimizer_key: str | None = None


@dataclass
class ModelConfig:
    """Fields and defaults of the package's ModelConfig. What concerns its teach signals, optimizers, surprise
    gates and training (``optimizers``, ``teach_*``, ``surprise_*``, ``gradient_checkpointing``,
    ``freeze_backbone``, ``cms_flush_partial_at_end``, ``titan_level``) changes nothing here."""

    vocab_size: int
    dim: int
    num_layers: int
    heads: int
    titan_level: Any
    cms_levels: Sequence[Any]
    cms_flush_partial_at_end: bool = False
    cms_use_layernorm: bool = True
    optimizers: dict[str, dict] | None = None
    teach_scale: float = 1.0
    teach_clip: float = 0.0
    teach_schedule: dict[str, float] | None = None
    gradient_checkpointing: bool = False
    surprise_threshold: float | None = None
    surprise_metric: str = "l2"
    freeze_backbone: bool = False
    qk_l2_norm: bool = False
    local_conv_window: int | None = None
    self_mod_lr: float = 1e-3
    self_mod_hidden: int = 4
    self_mod_chunk_size: int = 1
    self_mod_chunk_size_memory: int | None = None
    self_mod_objective: str = "l2"
    self_mod_stopgrad_vhat: bool = True
    self_mod_use_rank1_precond: bool = True
    self_mod_use_alpha: bool = True
    self_mod_use_skip: bool = True
    self_mod_momentum: float = 0.0
    self_mod_adaptive_q: bool = False
    self_mod_local_conv_window: int | None = 4
    transformer_mlp_hidden_multiplier: int = 4
    transformer_activation: str = "gelu"
    block_variant: str = "hope_hybrid"


def hope_config(config: Any, **cms: Any) -> HopeConfig:
    """``config``, a ModelConfig of this module or of the package, as HopeConfig. cms: fields of CMSConfig
    that say how levels learn here (lr, optimizer, ...).

    Raises ValueError for what this engine has no equal of: block_variant "hope_hybrid" and "transformer",
    cms_use_layernorm=False, self_mod_stopgrad_vhat=False, self_mod_momentum, a convolution before attention,
    periods that do not divide each other, fastest first, and chunks of which neither divides the other.
    """
    w, variant = "compat.nested_learning.HOPEModel", str(config.block_variant).strip().lower()

    def require(condition: bool, field: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{w}: {field} is {getattr(config, field)!r}, expected {expected}")

    require(
        variant in ("hope_selfmod", "hope_attention"), "block_variant",
        "'hope_selfmod' or 'hope_attention': hope_hybrid's memory, which teach signals train, and plain "
        "transformers have no equal here"
    )
    require(config.cms_use_layernorm, "cms_use_layernorm", "True: a CMS level norms its input here")
    periods = tuple(int(level.update_period) for level in config.cms_levels)
    levels = CMSConfig(config.dim, periods, mlp="gelu_erf", norm="layernorm", bias=True, expansion=4.0, **cms)
    common = {
        "vocab_size": config.vocab_size, "d_model": config.dim, "num_layers": config.num_layers,
        "cms": levels, "norm_eps": LAYER_NORM_EPS,
    }
    if variant == "hope_attention":
        require(config.local_conv_window is None, "local_conv_window", "None: its key-value cache knows none")
        qk_norm = bool(config.qk_l2_norm)
        return HopeConfig(**common, mixer="attention", num_heads=config.heads, qk_norm=qk_norm)
    require(config.self_mod_stopgrad_vhat, "self_mod_stopgrad_vhat", "True: targets are constants here")
    require(config.self_mod_momentum == 0, "self_mod_momentum",
            "0: the package multiplies its momentum by eta, this engine every gradient by its own")
    layer = SelfModifyingTitansConfig(
        config.dim, eta_scale=config.self_mod_lr, chunk_size_other=config.self_mod_chunk_size,
        chunk_size_memory=config.self_mod_chunk_size_memory, objective=config.self_mod_objective,
        use_rank1_precond=config.self_mod_use_rank1_precond, use_alpha=config.self_mod_use_alpha,
        qk_l2_norm=config.qk_l2_norm, adaptive_q=config.self_mod_adaptive_q,
        use_skip=config.self_mod_use_skip,
        local_conv_window=config.self_mod_local_conv_window,
    )
    memory = layer.chunk_size_memory
    assert memory is not None
    return HopeConfig(**common, titans=engine(layer, int(layer.chunk_size_other), int(memory)))
