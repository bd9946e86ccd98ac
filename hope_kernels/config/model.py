"""The configuration of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from .base import Configuration
from .checks import LAYERS, PERIOD, SIZE, finite, flags, items, one_of, positive_int, require
from .cms import CMSConfig
from .rope import RopeScaling
from .titans import TitansConfig

PER_BLOCK = ("window", "sinks", "rope_theta", "rope_scaling")  # of HopeConfig: one value, or one per block


@dataclass(frozen=True)
class HopeConfig(Configuration):
    """A HOPE language model: ``num_layers`` blocks, each a mixer and a CMS chain.

    Dicts of their fields may stand for ``titans``, ``cms`` and ``rope_scaling``, lists for tuples. Raises
    ValueError for values out of range and for parts that do not fit together.
    """

    _block_cms: ClassVar[tuple[CMSConfig | None, ...] | None] = None  # an instance's own, with ``learn_blocks``

    vocab_size: int  # token ids are 0 .. vocab_size - 1
    d_model: int  # width of the residual stream; those of ``titans`` and ``cms`` are the same
    num_layers: int  # blocks
    mixer: str = "self_modifying"  # HOPE; "titans": Titans LMM, projections; "attention": HOPE-Attention
    titans: TitansConfig | None = None  # of every block; None: defaults, or that mixer's preset "titans"
    cms: CMSConfig | tuple[CMSConfig, ...] | None = None  # of every block, or one per block; None: no CMS
    num_heads: int | None = None  # of attention, or of the memories; None: ``titans.num_heads``, or 1
    num_kv_heads: int | None = None  # attention: heads of keys and values, for groups of queries; None: all
    # attention: how many tokens a token sees, itself included (None: all), or one per block
    window: int | None | tuple[int | None, ...] = None
    rope_theta: float | tuple[float, ...] = 10000.0  # attention: base of RoPE's frequencies, or one per block
    attention_bias: bool = False  # attention: biases of the query, key and value projections
    norm_eps: float = 1e-6  # eps of the norms of blocks, CMS levels and head
    tie_embeddings: bool = True  # the head multiplies by the embedding; False: by weights of its own
    # attention: frequencies for contexts longer than trained on, or one per block
    rope_scaling: RopeScaling | None | tuple[RopeScaling | None, ...] = None
    rope_dtype: str = "float64"  # of RoPE's angles; "float32": other programs' bits, coarse at far positions
    learn_blocks: tuple[int, ...] | None = None  # blocks whose CMS learns, -1 the last; None: all; others have lr 0
    sinks: int | tuple[int, ...] = 0  # attention: first tokens that stay visible beside a window, or one per block
    head_dim: int | None = None  # attention: width of a head; None: d_model / num_heads
    qk_norm: bool = False  # attention: an RMSNorm of every head's query and key, before RoPE
    attention_scale: float | None = None  # attention: factor of the scores; None: 1 / sqrt(width of a head)
    post_norm: bool = False  # an RMSNorm of the mixer's output, before the residual; of levels: CMSConfig's
    embed_scale: float = 1.0  # factor of the embedding as it is read, not of a tied head; rounded to the dtype

    NEXT_STEP = frozenset({"window", "sinks", "learn_blocks"})

    def __post_init__(self) -> None:
        w = "HopeConfig"
        for field, most in (("vocab_size", SIZE), ("d_model", SIZE), ("num_layers", LAYERS)):
            positive_int(w, field, getattr(self, field), most)
        flags(self, w, "attention_bias", "tie_embeddings", "qk_norm", "post_norm")
        one_of(w, "mixer", self.mixer, ("self_modifying", "titans", "attention"))
        if isinstance(self.titans, dict):
            object.__setattr__(self, "titans", TitansConfig.from_dict(self.titans))
        ok = self.titans is None or isinstance(self.titans, TitansConfig)
        require(ok, w, "titans", self.titans, "None, a TitansConfig or its fields as a dict")
        if self.titans is None and self.mixer != "attention":
            preset = "titans" if self.mixer == "titans" else "default"
            object.__setattr__(
                self, "titans", TitansConfig.preset(preset, d_model=self.d_model, num_heads=self.num_heads or 1)
            )
        if self.titans is not None:
            require(
                self.titans.d_model == self.d_model, w, "titans.d_model", self.titans.d_model,
                f"d_model={self.d_model}"
            )
            require(
                self.mixer != "titans" or not self.titans.self_modifying, w, "titans.self_modifying", True,
                "False for mixer='titans'"
            )
            require(self.mixer != "self_modifying" or self.titans.self_modifying, w, "titans.self_modifying",
                     False,
                     "True for mixer='self_modifying' (mixer='titans' is the static one)")
        if self.num_heads is None:
            object.__setattr__(self, "num_heads", self.titans.num_heads if self.titans is not None else 1)
        heads = self.num_heads
        positive_int(w, "num_heads", heads)
        assert heads is not None
        if self.head_dim is None:
            ok = self.d_model % heads == 0
            require(ok, w, "d_model", self.d_model, f"a multiple of num_heads={heads}")
        else:
            positive_int(w, "head_dim", self.head_dim)
            ok = self.mixer == "attention"
            require(ok, w, "head_dim", self.head_dim, f"None for mixer={self.mixer!r}")
        if self.titans is not None and self.mixer != "attention":
            require(
                self.titans.num_heads == self.num_heads, w, "titans.num_heads", self.titans.num_heads,
                f"num_heads={self.num_heads}"
            )
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        positive_int(w, "num_kv_heads", self.num_kv_heads)
        heads, kv_heads = self.heads
        require(heads % kv_heads == 0, w, "num_heads", heads, f"a multiple of num_kv_heads={kv_heads}")
        if self.mixer == "attention":
            field = "d_model / num_heads" if self.head_dim is None else "head_dim"
            require(self.head_width % 2 == 0, w, field, self.head_width, "an even width (RoPE)")
        positive = {"norm_eps": self.norm_eps, "embed_scale": self.embed_scale}
        if self.attention_scale is not None:
            positive["attention_scale"] = self.attention_scale
        for field, value in positive.items():
            finite(w, field, value)
            require(value > 0, w, field, value, "a positive number")
        one_of(w, "rope_dtype", self.rope_dtype, ("float64", "float32"))
        self._normalise_per_block(w)
        self._normalise_cms(w)

    def _normalise_per_block(self, w: str) -> None:
        """The fields that may hold one value per block."""
        def scaling(value: Any) -> Any:
            return RopeScaling.from_dict(value) if isinstance(value, dict) else value

        for field in PER_BLOCK:
            given = getattr(self, field)
            if isinstance(given, (list, tuple)):
                expected = f"one value, or one per block ({self.num_layers})"
                require(len(given) == self.num_layers, w, field, given, expected)
                object.__setattr__(self, field, tuple(map(scaling, given)))
            else:
                object.__setattr__(self, field, scaling(given))
        for b in range(self.num_layers):
            window, sinks, theta, scaled = (self._of_block(field, b) for field in PER_BLOCK)
            if window is not None:
                positive_int(w, "window", window, PERIOD)
            ok = isinstance(sinks, int) and not isinstance(sinks, bool) and 0 <= sinks <= PERIOD
            require(ok, w, "sinks", sinks, "an integer >= 0")
            require(sinks == 0 or window is not None, w, "sinks", self.sinks,
                     f"0 where nothing is cut off: window of block {b} is None")
            finite(w, "rope_theta", theta)
            require(theta > 0, w, "rope_theta", theta, "a positive number")
            require(scaled is None or isinstance(scaled, RopeScaling), w, "rope_scaling", scaled,
                     "None, a RopeScaling or its fields as a dict")

    def _of_block(self, field: str, b: int) -> Any:
        value = getattr(self, field)
        return value[b] if isinstance(value, tuple) else value

    def _normalise_cms(self, w: str) -> None:
        cms = self.cms
        if isinstance(cms, dict):
            cms = CMSConfig.from_dict(cms)
        elif isinstance(cms, (list, tuple)):
            cms = tuple(CMSConfig.from_dict(c) if isinstance(c, dict) else c for c in cms)
            require(
                len(cms) == self.num_layers, w, "cms", f"{len(cms)} configurations",
                f"one per block ({self.num_layers})"
            )
        ok = all(c is None or isinstance(c, CMSConfig) for c in (cms if isinstance(cms, tuple) else (cms,)))
        require(ok, w, "cms", self.cms, "None, a CMSConfig or its fields as a dict, or one per block")
        object.__setattr__(self, "cms", cms)
        for c in self.block_cms:
            if c is not None:
                require(c.d_model == self.d_model, w, "cms.d_model", c.d_model, f"d_model={self.d_model}")
                require(
                    c.chunks[0] % self.segment == 0, w, "cms.chunks", c.chunks,
                    f"multiples of the shortest period, {self.segment}"
                )
        self._freeze(w)

    def _freeze(self, w: str) -> None:
        """``learn_blocks`` as ascending indices from 0, and ``block_cms`` with rates of 0 in all other blocks."""
        if self.learn_blocks is None:
            return
        L, blocks = self.num_layers, items(w, "learn_blocks", self.learn_blocks, "None, or a tuple of block indices")
        for b in blocks:
            ok = isinstance(b, int) and not isinstance(b, bool) and -L <= b < L
            require(ok, w, "learn_blocks", self.learn_blocks, f"indices from {-L} to {L - 1}")
        chosen = sorted({b % L for b in blocks})
        require(len(chosen) == len(blocks), w, "learn_blocks", self.learn_blocks, "every block once")
        for b in chosen:
            require(self.block_cms[b] is not None, w, "learn_blocks", self.learn_blocks,
                     f"blocks with a CMS, which block {b} has not")
        frozen: dict[CMSConfig, CMSConfig] = {}  # one object for equal ones: states are compared by identity first
        held = tuple(
            c if c is None or b in chosen else frozen.setdefault(c, c.replace(lr=0.0))
            for b, c in enumerate(self.block_cms)
        )
        object.__setattr__(self, "learn_blocks", tuple(chosen))
        object.__setattr__(self, "_block_cms", held)

    @property
    def heads(self) -> tuple[int, int]:
        """num_heads and num_kv_heads, which are numbers once they are constructed."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        assert heads is not None and kv_heads is not None
        return heads, kv_heads

    @property
    def head_width(self) -> int:
        """Numbers of a head of attention."""
        return self.d_model // self.heads[0] if self.head_dim is None else self.head_dim

    @property
    def blocks(self) -> tuple[HopeConfig, ...]:
        """The configuration as each block's mixer has it, first block first: with that block's own value
        in every field that may hold one per block."""
        if any(isinstance(getattr(self, field), tuple) for field in PER_BLOCK):
            return self._blocks
        return (self,) * self.num_layers

    @cached_property
    def _blocks(self) -> tuple[HopeConfig, ...]:
        own = [{field: self._of_block(field, b) for field in PER_BLOCK} for b in range(self.num_layers)]
        made = {tuple(fields.values()): self.replace(**fields) for fields in own}
        return tuple(made[tuple(fields.values())] for fields in own)

    @property
    def sight(self) -> tuple[int | None, int]:
        """window and sinks of one of ``blocks``. Raises ValueError for the configuration of several."""
        return self._one("window"), self._one("sinks")

    @property
    def keeps_bits(self) -> bool:
        """Whether its attention has the bits of another program, with whose angles it was converted."""
        return self.mixer == "attention" and self.rope_dtype == "float32"

    @property
    def rope(self) -> tuple[float, RopeScaling | None]:
        """rope_theta and rope_scaling, as ``sight``."""
        return self._one("rope_theta"), self._one("rope_scaling")

    def _one(self, field: str) -> Any:
        value = getattr(self, field)
        require(not isinstance(value, tuple), "HopeConfig", field, value,
                 "one value, as in the configuration of one block (config.blocks)")
        return value

    @property
    def block_cms(self) -> tuple[CMSConfig | None, ...]:
        """The CMS of every block, first block first; with rates of 0 where ``learn_blocks`` leaves a block out."""
        if self._block_cms is not None:
            return self._block_cms
        return self.cms if isinstance(self.cms, tuple) else (self.cms,) * self.num_layers

    @property
    def segment(self) -> int:
        """Tokens in a learning segment: the shortest CMS period of the model (0 without a CMS)."""
        periods = [c.chunks[0] for c in self.block_cms if c is not None]
        return min(periods) if periods else 0

    @property
    def learns(self) -> bool:
        """Whether reading with learn="next_token" can change anything: some level has lr > 0."""
        return any(c is not None and any(c.learning_rates) for c in self.block_cms)
