"""How many tokens' factors a level keeps before it folds them into dense weights.

A refresh of a level costs 8 bytes a weight (fp32 read and written) whatever its period C; kept factors cost 2 C (rows + cols) numbers
once, and every later token reads them: 2 R (rows + cols) FLOPs and as many numbers a row beside rows * cols. So a small period pays for
a fold every R / C refreshes only, and rows that have not folded read one base together.
"""

from __future__ import annotations

import torch

from ...config import CMSConfig

# (device type, longest period it holds for, slots): slots 0 folds at once. CPU: benchmarks/results/cms.json, "pending"; CUDA: not measured.
TABLE: tuple[tuple[str, int, int], ...] = ()


def pending_tokens(config: CMSConfig, level: int, dtype: torch.dtype, device: torch.device) -> int:
    """Slots for the pending factors of ``level`` (index, level 1 is 0); 0: every refresh is dense. Only plain gradient descent is linear
    in what it has seen, and nested levels return to their start anyway."""
    if config.optimizer != "gd":
        return 0
    period = config.chunks[level]
    return next((slots for kind, longest, slots in TABLE if kind == device.type and period <= longest and period <= slots), 0)
