"""The configuration of a Continuum Memory System."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Configuration
from .checks import PERIOD, SIZE, finite, flags, items, one_of, positive_int, require
from .rates import default_rate


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
    # inner rate, or one a level, or for a level one a matrix (up, gate, down); 0 freezes; None: ``default_rate``;
    # "learned": a parameter for each matrix, which training moves (docs/training.md), at first as None
    lr: float | tuple[float | tuple[float, ...], ...] | str | None = None
    # of a refresh: "gd" (gradient descent), "momentum", "muon" (orthogonalised) or "adam"; None: adam where lr is
    # None or "learned", else gd, as in the paper
    optimizer: str | None = None
    momentum: float = 0.9  # mu of m = mu m + g; for optimizer="momentum" only
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam's averages of g and g^2; for optimizer="adam" only
    precondition: float | None = None  # rho of ops/cms/precondition.py: steps keep what was learned; None: off
    rank: int | None = None  # a sequence learns W + L S, L [r, rank], S fixed (ops/cms/low_rank.py); None: all of W

    # rates count in sizes of the matrix (RMS of its initial weights), and gd and momentum normalise the gradient; None:
    # where lr is None or "learned"
    relative: bool | None = None

    NEXT_STEP = frozenset({"lr", "optimizer", "momentum", "betas", "precondition", "relative"})

    def __post_init__(self) -> None:
        w = "CMSConfig"
        positive_int(w, "d_model", self.d_model)
        chunks = (
            (self.chunks,) if isinstance(self.chunks, int)
            else items(w, "chunks", self.chunks, "one period or a tuple of them")
        )
        object.__setattr__(self, "chunks", chunks)
        require(len(chunks) > 0, w, "chunks", chunks, "at least one period")
        for c in chunks:
            positive_int(w, "chunks", c, PERIOD)
        for a, b in zip(chunks, chunks[1:]):
            require(
                a < b and b % a == 0, w, "chunks", chunks, "strictly increasing periods, each dividing the next"
            )
        one_of(w, "variant", self.variant, ("sequential", "independent", "nested"))
        one_of(w, "mlp", self.mlp, ("gelu", "gelu_erf", "swiglu", "geglu"))
        one_of(w, "norm", self.norm, ("rmsnorm", "layernorm"))
        if self.optimizer is None:
            object.__setattr__(self, "optimizer", "adam" if self._searched else "gd")
        one_of(w, "optimizer", self.optimizer, ("gd", "momentum", "muon", "adam"))
        if self.relative is None:
            object.__setattr__(self, "relative", self._searched)
        require(self.relative or not self._searched, w, "relative", self.relative,
                "True where lr is None or 'learned'")
        flags(self, w, "bias", "post_norm", "relative")
        finite(w, "expansion", self.expansion)
        require(self.expansion > 0, w, "expansion", self.expansion, "a positive number")
        if self.intermediate_size is not None:
            positive_int(w, "intermediate_size", self.intermediate_size)
        fits = self.intermediate_size is not None or 1 <= self.expansion * self.d_model <= SIZE
        require(fits, w, "expansion", self.expansion, f"at least one hidden unit and at most {SIZE}")
        finite(w, "momentum", self.momentum)
        require(0 <= self.momentum < 1, w, "momentum", self.momentum, "a float in [0, 1)")
        object.__setattr__(self, "betas", items(w, "betas", self.betas, "two floats in [0, 1)"))
        require(len(self.betas) == 2, w, "betas", self.betas, "two floats in [0, 1)")
        for beta in self.betas:
            finite(w, "betas", beta)
            require(0 <= beta < 1, w, "betas", self.betas, "two floats in [0, 1)")
        if self.precondition is not None:
            finite(w, "precondition", self.precondition)
            require(self.precondition > 0, w, "precondition", self.precondition, "None or a positive number")
        if self.rank is not None:
            positive_int(w, "rank", self.rank, min(self.d_model, self.hidden))
        self._check_rates(w)

    def _check_rates(self, w: str) -> None:
        if not self._searched and not isinstance(self.lr, (int, float)):
            rates = items(w, "lr", self.lr, "None, 'learned', a number or one per level")
            rates = tuple(tuple(r) if isinstance(r, (list, tuple)) else r for r in rates)
            object.__setattr__(self, "lr", rates)
            require(len(rates) == self.num_levels, w, "lr", rates, f"one value per level ({self.num_levels})")
            for own in rates:
                require(not isinstance(own, tuple) or len(own) == len(self.matrices), w, "lr", own,
                        f"a number, or one for each of {self.matrices}")
        for value in (r for l in range(self.num_levels) for r in self.matrix_rates(l).values()):
            finite(w, "lr", value)
            require(value >= 0, w, "lr", value, "a number >= 0")

    @property
    def _searched(self) -> bool:
        """Whether the rates are (at first) those of ``default_rate``."""
        return self.lr is None or isinstance(self.lr, str) and self.lr == "learned"

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices of one level: what a refresh may change."""
        return ("up", "gate", "down") if self.gated else ("up", "down")

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
        """lr_l per level, level 1 first; where matrices have rates of their own, the largest; where rates are
        learned, those at first."""
        return tuple(max(self.matrix_rates(l).values()) for l in range(self.num_levels))

    def matrix_rates(self, level: int) -> dict[str, float]:
        """The rates of ``level`` (index, level 1 is 0) by the name of the matrix; where they are learned, those at
        first."""
        if self._searched:
            assert self.optimizer is not None
            own: Any = default_rate(self.optimizer, self.chunks[level])
        else:
            own = self.lr[level] if isinstance(self.lr, tuple) else self.lr
        return dict(zip(self.matrices, own if isinstance(own, tuple) else (own,) * len(self.matrices)))
