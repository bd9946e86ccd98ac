"""The class ``SelfModifyingTitans`` of the PyPI package nested-learning 0.2.0, on the closed-form chunk
updates and the kernels of this package.

    from hope_kernels.compat.nested_learning import SelfModifyingTitans, SelfModifyingTitansConfig

Same configuration, methods, state fields and state_dict keys; code and checkpoints of that package run by
changing the import. Its per-call semantics are kept too: every call pads the convolution with zeros, counts
chunks from its own first token and flushes the open chunk at its end, so here one call and two calls differ.
``hope_kernels.SelfModifyingTitans`` is the layer whose calls may be split anywhere.

``install()`` puts the class into that package's own blocks, so that its ``HOPEModel`` runs on it, unchanged.

Writes: w <- w (alpha I - eta k k^T) - eta g for w2 and w_skip, w1 <- alpha w1 - eta g, g the gradient of
|M(k) - M(v)|^2 (or -M(k).M(v)) at the chunk's start, or its momentum m <- momentum m + g. Source: Nested
Learning eq 83-93. ``kernels.py`` says which calls the kernels serve; ``chunked.py`` serves all.

In bf16 and fp16, and under autocast, a call computes in fp32 and rounds its outputs and the state once, at
its end; the package rounds every token's step.
"""

from .config import SelfModifyingTitansConfig
from .install import install, uninstall
from .layer import ResidualMLPMemory, SelfModifyingTitans
from .state import NAMES, ResidualMLPMemoryState, SelfModifyingTitansState

__all__ = [
    "NAMES", "ResidualMLPMemory", "ResidualMLPMemoryState", "SelfModifyingTitans", "SelfModifyingTitansConfig",
    "SelfModifyingTitansState", "install", "uninstall",
]
