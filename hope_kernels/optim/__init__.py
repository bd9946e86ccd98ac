"""Optimizers as memories (Nested Learning, sections 4.4, 4.5 and 7.2), as torch.optim.Optimizer classes.

    from hope_kernels.optim import M3, groups
    optimizer = M3(groups(model), lr=0.02)

Matrices follow the optimizer's rule; everything else, and groups with ``adamw=True``, AdamW.
"""

from .base import MatrixOptimizer, groups
from .deep_momentum import DeepMomentum
from .delta_momentum import DeltaMomentum
from .dgd import DGD
from .m3 import M3

__all__ = ["DGD", "DeepMomentum", "DeltaMomentum", "M3", "MatrixOptimizer", "groups"]
