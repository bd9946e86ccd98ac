"""Configurations: frozen dataclasses, validated at construction, with the presets as plain data.

The fields and their meaning are the glossary of the package README; shapes and equations are in
``ops/titans/README.md`` and ``ops/cms/README.md``. A configuration that two parts of the program would read
differently does not construct.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Self

ACTIVATIONS = ("gelu_tanh", "gelu", "silu")


def _require(condition: bool, where: str, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{where}: {field} is {value!r}, expected {expected}")


def _one_of(where: str, field: str, value: Any, options: tuple) -> None:
    _require(value in options, where, field, value, "one of " + ", ".join(map(repr, options)))


# the most that a width, a number of tokens, a number of blocks may be
SIZE, PERIOD, LAYERS = 2**31 - 1, 2**62, 2**16


def _flags(config: _Config, where: str, *fields: str) -> None:
    """Checks switches; 0, 1 and NumPy's become bools."""
    for field in fields:
        _require(
            getattr(getattr(config, field), "ndim", 0) == 0, where, field, getattr(config, field), "True or False"
        )
        _one_of(where, field, getattr(config, field), (True, False))
        object.__setattr__(config, field, bool(getattr(config, field)))


def _positive_int(where: str, field: str, value: Any, most: int = SIZE) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool)
    _require(ok and value > 0, where, field, value, "a positive integer")
    _require(value <= most, where, field, value, f"at most {most}")


def _finite(where: str, field: str, value: Any) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    _require(ok, where, field, value, "a finite number")


def _items(where: str, field: str, value: Any, expected: str) -> tuple:
    _require(isinstance(value, (list, tuple)), where, field, value, expected)
    return tuple(value)


@dataclass(frozen=True)
class _Config:
    """What the configurations share: presets, overrides, and plain-data form for files."""

    PRESETS: ClassVar[dict[str, dict]] = {}

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The named preset of this configuration, with ``overrides`` on top. Raises ValueError for an unknown
        name."""
        if not isinstance(name, str) or name not in cls.PRESETS:
            raise ValueError(
                f"{cls.__name__}.preset: unknown preset {name!r}, expected one of {sorted(cls.PRESETS)}"
            )
        return cls(**{**cls.PRESETS[name], **overrides})

    def replace(self, **overrides: Any) -> Self:
        return dataclasses.replace(self, **overrides)

    def to_dict(self) -> dict:
        """Plain data (JSON-ready); ``from_dict`` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Self:
        """The configuration of ``to_dict``. Raises ValueError for anything but a dict of its fields with all
        that have no default."""
        _require(isinstance(data, dict), cls.__name__, "its plain data", data, "a dict")
        fields = dataclasses.fields(cls)
        unknown = sorted(map(str, set(data) - {f.name for f in fields}))
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}; this file may come from a newer version")
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in data]
        if missing:
            raise ValueError(f"{cls.__name__}: fields {missing} are missing")
        return cls(**data)


@dataclass(frozen=True)
class TitansConfig(_Config):
    """One self-modifying Titans layer (Nested Learning eq 83-93), or with ``self_modifying=False`` a Titans LMM.

    ``num_heads`` heads of width ``D = d_model / num_heads``; each memory is an MLP with ``N = hidden_mult *
    D`` hidden units
    (or one matrix, ``memory="linear"``). ``chunk_memory`` and ``chunk_other`` are the update periods, in
    tokens, of M_memory and
    of all other memories. Raises ValueError on any value outside the documented range.
    """

    d_model: int
    num_heads: int = 1
    hidden_mult: int = 1
    memory: str = "mlp"
    activation: str = "gelu_tanh"
    chunk_memory: int = 16
    chunk_other: int = 16
    self_modifying: bool = True
    own_values: bool = True
    target_norm: bool = True
    step_clip: bool = True
    objective: str = "l2"
    grad_scale: float = 1.0
    dgd: bool = True
    retention: bool = True
    retain_to: str = "init"
    momentum: float | str | None = None
    adaptive_q: bool = False
    qk_l2norm: bool = True
    conv_window: int | None = 4
    in_proj: bool | None = None
    out_norm: bool = True
    gate: bool = True
    out_proj: bool = True
    eta_activation: str = "sigmoid"
    eta_scale: float = 0.5
    eta_bias: float = 0.0
    alpha_bias: float | None = None
    scalar_skip: bool = False

    PRESETS = {
        "default": {},
        "paper": dict(hidden_mult=4, activation="gelu", target_norm=False, step_clip=False, retain_to="zero"),
        "nested_learning": dict(
            activation="gelu", chunk_memory=1, chunk_other=1, grad_scale=2.0, target_norm=False, step_clip=False,
            retain_to="zero", in_proj=False, out_norm=False, gate=False, out_proj=False, eta_activation="softplus",
            eta_scale=1e-3, eta_bias=0.0, alpha_bias=0.0, scalar_skip=True,
        ),
        "titans": dict(self_modifying=False, own_values=False, target_norm=False, dgd=False, momentum="learned"),
    }

    def __post_init__(self) -> None:
        w = "TitansConfig"
        for field in ("d_model", "num_heads", "hidden_mult", "chunk_memory", "chunk_other"):
            _positive_int(w, field, getattr(self, field))
        _require(
            self.d_model % self.num_heads == 0, w, "d_model", self.d_model,
            f"a multiple of num_heads={self.num_heads}"
        )
        _one_of(w, "memory", self.memory, ("mlp", "linear"))
        _one_of(w, "activation", self.activation, ACTIVATIONS)
        _one_of(w, "objective", self.objective, ("l2", "dot"))
        _one_of(w, "retain_to", self.retain_to, ("init", "zero"))
        _one_of(w, "eta_activation", self.eta_activation, ("sigmoid", "softplus"))
        small, large = sorted((self.chunk_memory, self.chunk_other))
        _require(
            large % small == 0, w, "(chunk_memory, chunk_other)", (self.chunk_memory, self.chunk_other),
            "one dividing the other"
        )
        for field in ("grad_scale", "eta_scale", "eta_bias"):
            _finite(w, field, getattr(self, field))
        _require(self.grad_scale > 0, w, "grad_scale", self.grad_scale, "a positive number")
        _require(self.eta_scale >= 0, w, "eta_scale", self.eta_scale, "a number >= 0")
        if self.alpha_bias is not None:
            _finite(w, "alpha_bias", self.alpha_bias)
        if self.conv_window is not None:
            _positive_int(w, "conv_window", self.conv_window)
        _require(self.hidden <= SIZE, w, "hidden_mult", self.hidden_mult, f"at most {SIZE} hidden units a head")
        if self.momentum is not None and self.momentum != "learned":
            ok = (
                isinstance(self.momentum, (int, float)) and not isinstance(self.momentum, bool)
                and 0 <= self.momentum < 1
            )
            _require(ok, w, "momentum", self.momentum, "None, 'learned' or a float in [0, 1)")
        _flags(self, w, "self_modifying", "own_values", "target_norm", "step_clip", "dgd", "retention",
               "adaptive_q", "qk_l2norm",
               "out_norm", "gate", "out_proj", "scalar_skip", *(() if self.in_proj is None else ("in_proj",)))
        _require(
            self.self_modifying or not self.adaptive_q, w, "adaptive_q", True, "False when self_modifying=False"
        )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def hidden(self) -> int:
        return self.hidden_mult * self.head_dim

    @property
    def uses_in_proj(self) -> bool:
        return self.num_heads > 1 if self.in_proj is None else self.in_proj

    @property
    def memories(self) -> tuple[str, ...]:
        """Names of the memories that learn, in the order the stacked tensors hold them."""
        if not self.self_modifying:
            return ("memory",)
        full = ("memory", "k", "v") + (("q",) if self.adaptive_q else ())
        return full + ("eta",) + (("alpha",) if self.retention else ())


def default_rate(optimizer: str, C: int) -> float:
    """Inner learning rate of a level with period C.

    1 / (8 sqrt(C)) for gd, 1 / (64 sqrt(C)) for momentum, 0.03 min(2, sqrt(C / 256)) for muon. The gradient
    is a sum over C tokens, which muon normalises. Chosen by ``benchmarks.bench_rates``, from periods of 16 to
    8192 tokens; beyond, gd and momentum fall as 1 / C.
    """
    if optimizer == "muon":
        return 0.03 * min(2.0, math.sqrt(C / 256))
    return min(1.0, math.sqrt(8192 / C)) / ((64 if optimizer == "momentum" else 8) * math.sqrt(C))


@dataclass(frozen=True)
class CMSConfig(_Config):
    """A Continuum Memory System (Nested Learning eq 70-74): one MLP per level, level l refreshed every
    ``chunks[l-1]`` tokens.

    ``lr`` is None (``default_rate`` of each level's period), one float, or one per level; 0 freezes a level.
    """

    d_model: int
    chunks: tuple[int, ...]
    variant: str = "sequential"
    expansion: float = 4.0
    mlp: str = "gelu"
    bias: bool = False
    intermediate_size: int | None = None
    norm: str = "rmsnorm"
    lr: float | tuple[float, ...] | None = None
    optimizer: str = "gd"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        w = "CMSConfig"
        _positive_int(w, "d_model", self.d_model)
        chunks = (
            (self.chunks,) if isinstance(self.chunks, int)
            else _items(w, "chunks", self.chunks, "one period or a tuple of them")
        )
        object.__setattr__(self, "chunks", chunks)
        _require(len(chunks) > 0, w, "chunks", chunks, "at least one period")
        for c in chunks:
            _positive_int(w, "chunks", c, PERIOD)
        for a, b in zip(chunks, chunks[1:]):
            _require(
                a < b and b % a == 0, w, "chunks", chunks, "strictly increasing periods, each dividing the next"
            )
        _one_of(w, "variant", self.variant, ("sequential", "independent", "nested"))
        _one_of(w, "mlp", self.mlp, ("gelu", "swiglu"))
        _one_of(w, "norm", self.norm, ("rmsnorm", "layernorm"))
        _one_of(w, "optimizer", self.optimizer, ("gd", "momentum", "muon"))
        _flags(self, w, "bias")
        _finite(w, "expansion", self.expansion)
        _require(self.expansion > 0, w, "expansion", self.expansion, "a positive number")
        if self.intermediate_size is not None:
            _positive_int(w, "intermediate_size", self.intermediate_size)
        fits = self.intermediate_size is not None or 1 <= self.expansion * self.d_model <= SIZE
        _require(fits, w, "expansion", self.expansion, f"at least one hidden unit and at most {SIZE}")
        _finite(w, "momentum", self.momentum)
        _require(0 <= self.momentum < 1, w, "momentum", self.momentum, "a float in [0, 1)")
        if self.lr is not None and not isinstance(self.lr, (int, float)):
            object.__setattr__(self, "lr", _items(w, "lr", self.lr, "None, a number or one per level"))
            _require(len(self.lr) == len(chunks), w, "lr", self.lr, f"one value per level ({len(chunks)})")
        for value in self.learning_rates:
            _finite(w, "lr", value)
            _require(value >= 0, w, "lr", value, "a number >= 0")

    @property
    def num_levels(self) -> int:
        return len(self.chunks)

    @property
    def hidden(self) -> int:
        return self.intermediate_size if self.intermediate_size is not None else int(self.expansion * self.d_model)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """lr_l per level, level 1 first."""
        if self.lr is None:
            return tuple(default_rate(self.optimizer, c) for c in self.chunks)
        if isinstance(self.lr, tuple):
            return self.lr
        return (self.lr,) * len(self.chunks)


@dataclass(frozen=True)
class RopeScaling(_Config):
    """A change of RoPE's frequencies for longer contexts, with the field names of Llama's config.json.

    ``rope_type="linear"``: all of them / ``factor``. ``"llama3"``: those that turn fewer than
    ``low_freq_factor`` times within ``original_max_position_embeddings`` tokens / ``factor``, those that turn
    more than ``high_freq_factor`` times as they are, a blend of both between. Raises ValueError for another
    type, numbers out of range, and llama3's numbers missing or given to another type.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        w = "RopeScaling"
        _one_of(w, "rope_type", self.rope_type, ("linear", "llama3"))
        fields = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if self.rope_type == "linear":
            for field in fields:
                _require(
                    getattr(self, field) is None, w, field, getattr(self, field), "None for rope_type='linear'"
                )
            fields = ()
        for field in ("factor", *fields):
            _finite(w, field, getattr(self, field))
            _require(getattr(self, field) > 0, w, field, getattr(self, field), "a positive number")
        if self.rope_type == "llama3":
            _, low, high = self.llama3
            _require(high > low, w, "high_freq_factor", high, f"more than low_freq_factor={low}")

    @property
    def llama3(self) -> tuple[int, float, float]:
        """original_max_position_embeddings, low_freq_factor, high_freq_factor: what rope_type="llama3" has."""
        context, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
        assert context is not None and low is not None and high is not None
        return context, low, high


@dataclass(frozen=True)
class HopeConfig(_Config):
    """A HOPE language model: ``num_layers`` blocks, each a mixer and a CMS chain.

    ``mixer`` is ``"self_modifying"`` (HOPE), ``"titans"`` (static projections, Titans LMM) or ``"attention"``
    (HOPE-Attention). ``titans=None`` takes the default (or the ``titans`` preset) at ``d_model``; ``cms`` is
    None (blocks without a CMS), one
    CMSConfig for every block, or one per block. ``window``: sliding-window width in tokens, None for full
    attention. ``rope_scaling``: None, a RopeScaling or its fields as a dict. ``rope_dtype``: what RoPE's
    angles are computed in; "float32" gives the bits that other programs compute, at the price of the angle's
    fraction at far positions.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    mixer: str = "self_modifying"
    titans: TitansConfig | None = None
    cms: CMSConfig | tuple[CMSConfig, ...] | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    window: int | None = None
    rope_theta: float = 10000.0
    attention_bias: bool = False
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    rope_scaling: RopeScaling | None = None
    rope_dtype: str = "float64"

    def __post_init__(self) -> None:
        w = "HopeConfig"
        for field, most in (("vocab_size", SIZE), ("d_model", SIZE), ("num_layers", LAYERS)):
            _positive_int(w, field, getattr(self, field), most)
        _flags(self, w, "attention_bias", "tie_embeddings")
        _one_of(w, "mixer", self.mixer, ("self_modifying", "titans", "attention"))
        if isinstance(self.titans, dict):
            object.__setattr__(self, "titans", TitansConfig.from_dict(self.titans))
        ok = self.titans is None or isinstance(self.titans, TitansConfig)
        _require(ok, w, "titans", self.titans, "None, a TitansConfig or its fields as a dict")
        if self.titans is None and self.mixer != "attention":
            preset = "titans" if self.mixer == "titans" else "default"
            object.__setattr__(
                self, "titans", TitansConfig.preset(preset, d_model=self.d_model, num_heads=self.num_heads or 1)
            )
        if self.titans is not None:
            _require(
                self.titans.d_model == self.d_model, w, "titans.d_model", self.titans.d_model,
                f"d_model={self.d_model}"
            )
            _require(
                self.mixer != "titans" or not self.titans.self_modifying, w, "titans.self_modifying", True,
                "False for mixer='titans'"
            )
            _require(self.mixer != "self_modifying" or self.titans.self_modifying, w, "titans.self_modifying",
                     False,
                     "True for mixer='self_modifying' (mixer='titans' is the static one)")
        if self.num_heads is None:
            object.__setattr__(self, "num_heads", self.titans.num_heads if self.titans is not None else 1)
        heads = self.num_heads
        _positive_int(w, "num_heads", heads)
        assert heads is not None
        _require(self.d_model % heads == 0, w, "d_model", self.d_model, f"a multiple of num_heads={heads}")
        if self.titans is not None and self.mixer != "attention":
            _require(
                self.titans.num_heads == self.num_heads, w, "titans.num_heads", self.titans.num_heads,
                f"num_heads={self.num_heads}"
            )
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        _positive_int(w, "num_kv_heads", self.num_kv_heads)
        heads, kv_heads = self.heads
        _require(heads % kv_heads == 0, w, "num_heads", heads, f"a multiple of num_kv_heads={kv_heads}")
        if self.mixer == "attention":
            width = self.d_model // heads
            _require(width % 2 == 0, w, "d_model / num_heads", width, "an even width (RoPE)")
        if self.window is not None:
            _positive_int(w, "window", self.window, PERIOD)
        for field in ("rope_theta", "norm_eps"):
            _finite(w, field, getattr(self, field))
            _require(getattr(self, field) > 0, w, field, getattr(self, field), "a positive number")
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_dict(self.rope_scaling))
        ok = self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling)
        _require(ok, w, "rope_scaling", self.rope_scaling, "None, a RopeScaling or its fields as a dict")
        _one_of(w, "rope_dtype", self.rope_dtype, ("float64", "float32"))
        self._normalise_cms(w)

    def _normalise_cms(self, w: str) -> None:
        cms = self.cms
        if isinstance(cms, dict):
            cms = CMSConfig.from_dict(cms)
        elif isinstance(cms, (list, tuple)):
            cms = tuple(CMSConfig.from_dict(c) if isinstance(c, dict) else c for c in cms)
            _require(
                len(cms) == self.num_layers, w, "cms", f"{len(cms)} configurations",
                f"one per block ({self.num_layers})"
            )
        ok = all(c is None or isinstance(c, CMSConfig) for c in (cms if isinstance(cms, tuple) else (cms,)))
        _require(ok, w, "cms", self.cms, "None, a CMSConfig or its fields as a dict, or one per block")
        object.__setattr__(self, "cms", cms)
        for c in self.block_cms:
            if c is not None:
                _require(c.d_model == self.d_model, w, "cms.d_model", c.d_model, f"d_model={self.d_model}")
                _require(
                    c.chunks[0] % self.segment == 0, w, "cms.chunks", c.chunks,
                    f"multiples of the shortest period, {self.segment}"
                )

    @property
    def heads(self) -> tuple[int, int]:
        """num_heads and num_kv_heads, which are numbers once they are constructed."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        assert heads is not None and kv_heads is not None
        return heads, kv_heads

    @property
    def block_cms(self) -> tuple[CMSConfig | None, ...]:
        """The CMS of every block, first block first."""
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
