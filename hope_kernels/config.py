"""Configurations: frozen dataclasses, validated at construction, with the presets as plain data.

Every field is explained where it is defined; NL: Nested Learning (arXiv 2512.24695), Titans: arXiv
2501.00663, with their equation numbers. Shapes and derivations are in ``ops/titans/README.md`` and
``ops/cms/README.md``. A configuration that two parts of the program would read differently does not
construct.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

ACTIVATIONS = ("gelu_tanh", "gelu", "silu")


def _require(condition: bool, where: str, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{where}: {field} is {value!r}, expected {expected}")


def _one_of(where: str, field: str, value: Any, options: tuple) -> None:
    _require(value in options, where, field, value, "one of " + ", ".join(map(repr, options)))


# the most that a width, a number of tokens, a number of blocks may be
SIZE, PERIOD, LAYERS = 2**31 - 1, 2**62, 2**16


def _flags(config: Configuration, where: str, *fields: str) -> None:
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
class Configuration:
    """What the configurations share: presets, overrides, and plain-data form for files."""

    PRESETS: ClassVar[dict[str, dict]] = {}
    # Fields that say what the next step does, and nothing about what a state holds: a sequence may be continued
    # with other values of them (``differences.py``). All others are of the sequence.
    NEXT_STEP: ClassVar[frozenset[str]] = frozenset()

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
class TitansConfig(Configuration):
    """One self-modifying Titans layer (NL eq 83-93), or with ``self_modifying=False`` a Titans LMM.

    The layer has the memories M_memory, M_k, M_v, M_eta and M_alpha, each for every head. Raises ValueError
    on any value outside the documented range.
    """

    d_model: int  # width d of the layer's input and output
    num_heads: int = 1  # H; a head is D = d_model / H wide and has memories of its own
    hidden_mult: int = 1  # a memory has N = hidden_mult * D hidden units; without meaning for memory="linear"
    memory: str = "mlp"  # "mlp": M(z) = z + w1 sigma(w2 z) (NL eq 89); "linear": M(z) = w z
    activation: str = "gelu_tanh"  # sigma; or "gelu" (erf), "silu"; one tanh gives sigma and sigma'
    chunk_memory: int = 16  # tokens between two writes of M_memory (NL eq 90); small chunks recall better
    chunk_other: int = 16  # tokens between two writes of all other memories; one of the two divides the other
    self_modifying: bool = True  # k, v, eta, alpha are outputs of memories that learn too; False: of projections
    own_values: bool = True  # target of a memory: its own reading M(v) (NL eq 84); False: v itself
    target_norm: bool = True  # targets of norm 1, scalar ones in [-1, 1]: else |M(v)| > |k| feeds back
    step_clip: bool = True  # steps divided by max(1, S_t): else repeated keys overshoot up to C times
    objective: str = "l2"  # error M(k) - target (NL eq 93); "dot": -target (NL eq 92)
    grad_scale: float = 1.0  # factor of the l2 error: 1 for |.|^2 / 2, 2 for |.|^2; without meaning for "dot"
    dgd: bool = True  # delta gradient descent (NL eq 88): a write first erases along its key, by eta k k^T
    retention: bool = True  # what was learned decays by alpha_t a token; False: alpha = 1, no M_alpha
    retain_to: str = "init"  # where decay leads: the learned initial weights, or "zero" (the paper's letter)
    momentum: float | str | None = None  # beta of Titans eq 9-10, in [0, 1); "learned": of x, per token
    adaptive_q: bool = False  # q comes from a memory M_q as well; the paper's ablation shows no effect
    qk_l2norm: bool = True  # q and k are unit vectors, so that eta alone says how far a write erases
    conv_window: int | None = 4  # taps of the causal depthwise convolution of the input; None: off
    in_proj: bool | None = None  # projection d -> d before the heads; None: where there are several
    out_norm: bool = True  # RMS norm of each head's output, with a learned gain (eps 1e-6)
    gate: bool = True  # the output is multiplied by silu(W_g x)
    out_proj: bool = True  # projection d -> d at the end
    eta_activation: str = "sigmoid"  # keeps eta below eta_scale; "softplus" does not bound it
    eta_scale: float = 0.5  # factor of the step size eta
    eta_bias: float = 0.0  # what eta's learned bias starts from, every head the same
    alpha_bias: float | None = None  # the same for alpha; None: half-lives of 16 to 16,384 tokens by head
    scalar_skip: bool = False  # M_eta and M_alpha are w_skip z + w1 sigma(w2 z), and w_skip learns too

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


# Of a matrix's own size (the RMS of its initial weights), what one step of a level with period 256 moves a weight by.
STEPS = {"gd": 1e-4, "momentum": 1e-5, "muon": 1e-4, "adam": 5e-4}


def default_rate(optimizer: str, C: int) -> float:
    """Inner learning rate of a level with period C, relative to the size of its matrices: ``STEPS`` times
    min(1, sqrt(C / 256)).

    It knows nothing of a model's scale: see ``CMSConfig.relative``. Searched by ``benchmarks.bench_rates`` on a
    pre-trained Llama and on the bundled byte model, for periods of 16 to 4096 tokens.
    """
    return STEPS[optimizer] * min(1.0, math.sqrt(C / 256))


@dataclass(frozen=True)
class CMSConfig(Configuration):
    """A Continuum Memory System (NL eq 70-74): K MLPs, of which level l takes a step every ``chunks[l-1]`` tokens.

    Raises ValueError on any value outside the documented range.
    """

    d_model: int  # width d of every level's input and output
    chunks: tuple[int, ...]  # periods in tokens, fastest level first; each divides the next (NL eq 71)
    variant: str = "sequential"  # NL eq 73; "independent": learned mixture (eq 74); "nested": resets (eq 72)
    expansion: float = 4.0  # hidden units of a level per unit of d_model
    mlp: str = "gelu"  # w_down gelu(w_up n), tanh form; "swiglu": w_down (silu(w_gate n) * (w_up n));
    #                    "geglu": gelu in place of silu; "gelu_erf": "gelu" in its exact form
    bias: bool = False  # biases in the levels: trained from outside, never refreshed
    intermediate_size: int | None = None  # hidden units, in place of ``expansion``: for pre-trained MLPs
    norm: str = "rmsnorm"  # of a level's input; or "layernorm"
    post_norm: bool = False  # an RMSNorm of a level's output, before the residual, as in Gemma
    lr: float | tuple[float, ...] | None = None  # inner rate, or one a level; 0 freezes; None: ``default_rate``
    # of a refresh: "gd" (gradient descent), "momentum", "muon" (orthogonalised) or "adam"; None: adam where lr is
    # None too, else gd, as in the paper
    optimizer: str | None = None
    momentum: float = 0.9  # mu of m = mu m + g; for optimizer="momentum" only
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam's averages of g and g^2; for optimizer="adam" only
    precondition: float | None = None  # rho of ops/cms/precondition.py: steps keep what was learned; None: off
    rank: int | None = None  # a sequence learns W + L S, L [r, rank], S fixed (ops/cms/low_rank.py); None: all of W

    # rates count in sizes of the matrix (RMS of its initial weights), and gd and momentum normalise the gradient; None:
    # where lr is None
    relative: bool | None = None

    NEXT_STEP = frozenset({"lr", "optimizer", "momentum", "betas", "precondition", "relative"})

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
        _one_of(w, "mlp", self.mlp, ("gelu", "gelu_erf", "swiglu", "geglu"))
        _one_of(w, "norm", self.norm, ("rmsnorm", "layernorm"))
        if self.optimizer is None:
            object.__setattr__(self, "optimizer", "adam" if self.lr is None else "gd")
        _one_of(w, "optimizer", self.optimizer, ("gd", "momentum", "muon", "adam"))
        if self.relative is None:
            object.__setattr__(self, "relative", self.lr is None)
        _require(self.relative or self.lr is not None, w, "relative", self.relative, "True where lr is None")
        _flags(self, w, "bias", "post_norm", "relative")
        _finite(w, "expansion", self.expansion)
        _require(self.expansion > 0, w, "expansion", self.expansion, "a positive number")
        if self.intermediate_size is not None:
            _positive_int(w, "intermediate_size", self.intermediate_size)
        fits = self.intermediate_size is not None or 1 <= self.expansion * self.d_model <= SIZE
        _require(fits, w, "expansion", self.expansion, f"at least one hidden unit and at most {SIZE}")
        _finite(w, "momentum", self.momentum)
        _require(0 <= self.momentum < 1, w, "momentum", self.momentum, "a float in [0, 1)")
        object.__setattr__(self, "betas", _items(w, "betas", self.betas, "two floats in [0, 1)"))
        _require(len(self.betas) == 2, w, "betas", self.betas, "two floats in [0, 1)")
        for beta in self.betas:
            _finite(w, "betas", beta)
            _require(0 <= beta < 1, w, "betas", self.betas, "two floats in [0, 1)")
        if self.precondition is not None:
            _finite(w, "precondition", self.precondition)
            _require(self.precondition > 0, w, "precondition", self.precondition, "None or a positive number")
        if self.rank is not None:
            _positive_int(w, "rank", self.rank, min(self.d_model, self.hidden))
        if self.lr is not None and not isinstance(self.lr, (int, float)):
            object.__setattr__(self, "lr", _items(w, "lr", self.lr, "None, a number or one per level"))
            _require(len(self.lr) == len(chunks), w, "lr", self.lr, f"one value per level ({len(chunks)})")
        for value in self.learning_rates:
            _finite(w, "lr", value)
            _require(value >= 0, w, "lr", value, "a number >= 0")

    @property
    def gated(self) -> bool:
        """Whether a level has a gate beside ``up``."""
        return self.mlp in ("swiglu", "geglu")

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
            assert self.optimizer is not None
            return tuple(default_rate(self.optimizer, c) for c in self.chunks)
        if isinstance(self.lr, tuple):
            return self.lr
        return (self.lr,) * len(self.chunks)


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
            _positive_int(w, field, getattr(self, field), most)
        _flags(self, w, "attention_bias", "tie_embeddings", "qk_norm", "post_norm")
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
        if self.head_dim is None:
            ok = self.d_model % heads == 0
            _require(ok, w, "d_model", self.d_model, f"a multiple of num_heads={heads}")
        else:
            _positive_int(w, "head_dim", self.head_dim)
            ok = self.mixer == "attention"
            _require(ok, w, "head_dim", self.head_dim, f"None for mixer={self.mixer!r}")
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
            field = "d_model / num_heads" if self.head_dim is None else "head_dim"
            _require(self.head_width % 2 == 0, w, field, self.head_width, "an even width (RoPE)")
        positive = {"norm_eps": self.norm_eps, "embed_scale": self.embed_scale}
        if self.attention_scale is not None:
            positive["attention_scale"] = self.attention_scale
        for field, value in positive.items():
            _finite(w, field, value)
            _require(value > 0, w, field, value, "a positive number")
        _one_of(w, "rope_dtype", self.rope_dtype, ("float64", "float32"))
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
                _require(len(given) == self.num_layers, w, field, given, expected)
                object.__setattr__(self, field, tuple(map(scaling, given)))
            else:
                object.__setattr__(self, field, scaling(given))
        for b in range(self.num_layers):
            window, sinks, theta, scaled = (self._of_block(field, b) for field in PER_BLOCK)
            if window is not None:
                _positive_int(w, "window", window, PERIOD)
            ok = isinstance(sinks, int) and not isinstance(sinks, bool) and 0 <= sinks <= PERIOD
            _require(ok, w, "sinks", sinks, "an integer >= 0")
            _require(sinks == 0 or window is not None, w, "sinks", self.sinks,
                     f"0 where nothing is cut off: window of block {b} is None")
            _finite(w, "rope_theta", theta)
            _require(theta > 0, w, "rope_theta", theta, "a positive number")
            _require(scaled is None or isinstance(scaled, RopeScaling), w, "rope_scaling", scaled,
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
        self._freeze(w)

    def _freeze(self, w: str) -> None:
        """``learn_blocks`` as ascending indices from 0, and ``block_cms`` with rates of 0 in all other blocks."""
        if self.learn_blocks is None:
            return
        L, blocks = self.num_layers, _items(w, "learn_blocks", self.learn_blocks, "None, or a tuple of block indices")
        for b in blocks:
            ok = isinstance(b, int) and not isinstance(b, bool) and -L <= b < L
            _require(ok, w, "learn_blocks", self.learn_blocks, f"indices from {-L} to {L - 1}")
        chosen = sorted({b % L for b in blocks})
        _require(len(chosen) == len(blocks), w, "learn_blocks", self.learn_blocks, "every block once")
        for b in chosen:
            _require(self.block_cms[b] is not None, w, "learn_blocks", self.learn_blocks,
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
    def rope(self) -> tuple[float, RopeScaling | None]:
        """rope_theta and rope_scaling, as ``sight``."""
        return self._one("rope_theta"), self._one("rope_scaling")

    def _one(self, field: str) -> Any:
        value = getattr(self, field)
        _require(not isinstance(value, tuple), "HopeConfig", field, value,
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
