"""The configuration of a layer of memories."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Configuration
from .checks import SIZE, finite, flags, one_of, positive_int, require

ACTIVATIONS = ("gelu_tanh", "gelu", "silu")

RECALL = dict(retention=False, conv_window=2, eta_scale=2.0, eta_bias=-2.0, q_identity=True)  # see PRESETS


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
    q_identity: bool = False  # W_q starts as the identity: what asks is near what was written before any training
    scalar_skip: bool = False  # M_eta and M_alpha are w_skip z + w1 sigma(w2 z), and w_skip learns too

    PRESETS = {
        "default": {},
        "paper": dict(hidden_mult=4, activation="gelu", target_norm=False, step_clip=False, retain_to="zero"),
        "nested_learning": dict(
            activation="gelu", chunk_memory=1, chunk_other=1, grad_scale=2.0, target_norm=False, step_clip=False,
            retain_to="zero", in_proj=False, out_norm=False, gate=False, out_proj=False, eta_activation="softplus",
            eta_scale=1e-3, eta_bias=0.0, alpha_bias=0.0, scalar_skip=True,
        ),
        # pairs told in context: nothing decays, a pair is a token and the one before it, writes are large or none
        "recall": RECALL,
        # the same with W (I - eta k k^T) + eta v k^T for a memory: the newer of two values holds inside a chunk, too
        "delta": {**RECALL, "memory": "linear", "objective": "dot"},
        "titans": dict(self_modifying=False, own_values=False, target_norm=False, dgd=False, momentum="learned"),
    }

    def __post_init__(self) -> None:
        w = "TitansConfig"
        for field in ("d_model", "num_heads", "hidden_mult", "chunk_memory", "chunk_other"):
            positive_int(w, field, getattr(self, field))
        require(
            self.d_model % self.num_heads == 0, w, "d_model", self.d_model,
            f"a multiple of num_heads={self.num_heads}"
        )
        one_of(w, "memory", self.memory, ("mlp", "linear"))
        one_of(w, "activation", self.activation, ACTIVATIONS)
        one_of(w, "objective", self.objective, ("l2", "dot"))
        one_of(w, "retain_to", self.retain_to, ("init", "zero"))
        one_of(w, "eta_activation", self.eta_activation, ("sigmoid", "softplus"))
        small, large = sorted((self.chunk_memory, self.chunk_other))
        require(
            large % small == 0, w, "(chunk_memory, chunk_other)", (self.chunk_memory, self.chunk_other),
            "one dividing the other"
        )
        for field in ("grad_scale", "eta_scale", "eta_bias"):
            finite(w, field, getattr(self, field))
        require(self.grad_scale > 0, w, "grad_scale", self.grad_scale, "a positive number")
        require(self.eta_scale >= 0, w, "eta_scale", self.eta_scale, "a number >= 0")
        if self.alpha_bias is not None:
            finite(w, "alpha_bias", self.alpha_bias)
        if self.conv_window is not None:
            positive_int(w, "conv_window", self.conv_window)
        require(self.hidden <= SIZE, w, "hidden_mult", self.hidden_mult, f"at most {SIZE} hidden units a head")
        if self.momentum is not None and self.momentum != "learned":
            ok = (
                isinstance(self.momentum, (int, float)) and not isinstance(self.momentum, bool)
                and 0 <= self.momentum < 1
            )
            require(ok, w, "momentum", self.momentum, "None, 'learned' or a float in [0, 1)")
        flags(self, w, "self_modifying", "own_values", "target_norm", "step_clip", "dgd", "retention",
               "adaptive_q", "qk_l2norm",
               "out_norm", "gate", "out_proj", "q_identity", "scalar_skip",
               *(() if self.in_proj is None else ("in_proj",)))
        require(
            not (self.q_identity and self.adaptive_q), w, "q_identity", True, "False with adaptive_q, which has no W_q"
        )
        require(
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
