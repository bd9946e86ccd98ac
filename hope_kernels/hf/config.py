"""The configuration of a HOPE model as one of transformers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..config import HopeConfig
from ..hub import AUTO_MAP, KEY, MODEL_TYPE, common_fields

LEARN = ("off", "next_token")


class HopeHFConfig(PreTrainedConfig):
    """``hope``: the fields of our ``HopeConfig``; those beside it follow from them. ``learn``: what a call of
    the model, and so ``generate``, does unless told otherwise: "off" or "next_token"."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["cache"]

    hope: dict[str, Any] | None = None
    learn: str = "off"
    use_cache: bool = True
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.learn not in LEARN:
            raise ValueError(f"HopeHFConfig: learn is {self.learn!r}, expected one of {LEARN}")
        if self.hope is not None:
            self.set_core(HopeConfig.from_dict(self.hope))
        kwargs.setdefault("auto_map", AUTO_MAP)
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, config: HopeConfig, **fields: Any) -> HopeHFConfig:
        """Of one of our configurations."""
        return cls(**{KEY: config.to_dict()}, **fields)

    def core(self) -> HopeConfig:
        """Our configuration. Raises ValueError where there is none."""
        if self.hope is None:
            raise ValueError("HopeHFConfig: hope is None, expected the fields of a HopeConfig, as from "
                             "HopeHFConfig.of(config)")
        return HopeConfig.from_dict(self.hope)

    def set_core(self, config: HopeConfig) -> None:
        """Makes ``config`` the one that this describes."""
        self.hope = config.to_dict()
        for name, value in common_fields(config).items():
            setattr(self, name, value)
