"""What a mixer of memories has that is handed to C++ by a decoder's step (``native.py``) and by segments
(``native_reading.py``): the names of its tensors there and here are the same."""

from __future__ import annotations

from ..config import TitansConfig

MEMORY = ("delta2", "delta1", "delta1s", "s2", "s1", "s1s", "pending_k", "pending_v", "pending_eta", "pending_alpha",
          "pending_beta", "conv_tail")  # of a state
SQUARE = ("in_proj", "q_proj", "gate_proj", "out_proj", "k_proj", "v_proj")  # projections [d, d]
GATES = ("eta_proj", "alpha_proj", "beta_proj")  # [H, d]


def constant_momentum(config: TitansConfig) -> float:
    """The momentum that is the same for all tokens; 0 where there is none, or a learned one."""
    return 0.0 if config.momentum in (None, "learned") else float(config.momentum)
