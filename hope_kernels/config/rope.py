"""RoPE's frequencies in contexts longer than those of training."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Configuration
from .checks import finite, one_of, require


@dataclass(frozen=True)
class RopeScaling(Configuration):
    """A change of RoPE's frequencies for longer contexts, with the field names of Llama's config.json.

    Raises ValueError for another type, numbers out of range, and llama3's numbers missing or given to another
    type.
    """

    rope_type: str  # "linear": all frequencies are divided; "llama3": the low ones, with a blend between
    factor: float  # what frequencies are divided by
    low_freq_factor: float | None = None  # llama3: low are those that turn fewer times in the old context
    high_freq_factor: float | None = None  # llama3: those that turn more times stay as they are
    original_max_position_embeddings: int | None = None  # llama3: the old context, in tokens

    def __post_init__(self) -> None:
        w = "RopeScaling"
        one_of(w, "rope_type", self.rope_type, ("linear", "llama3"))
        fields = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if self.rope_type == "linear":
            for field in fields:
                require(
                    getattr(self, field) is None, w, field, getattr(self, field), "None for rope_type='linear'"
                )
            fields = ()
        for field in ("factor", *fields):
            finite(w, field, getattr(self, field))
            require(getattr(self, field) > 0, w, field, getattr(self, field), "a positive number")
        if self.rope_type == "llama3":
            _, low, high = self.llama3
            require(high > low, w, "high_freq_factor", high, f"more than low_freq_factor={low}")

    @property
    def llama3(self) -> tuple[int, float, float]:
        """original_max_position_embeddings, low_freq_factor, high_freq_factor: what rope_type="llama3" has."""
        context, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
        assert context is not None and low is not None and high is not None
        return context, low, high
