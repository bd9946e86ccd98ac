"""How many tokens' factors a level keeps before it folds them into dense weights.

A refresh of a level costs 8 bytes a weight (fp32 read and written) whatever its period C; kept factors cost 2
C (rows + cols) numbers once, and every later token reads them: 2 R (rows + cols) FLOPs and as many numbers a
row beside rows * cols. So a small period pays for a fold every R / C refreshes only, and rows that have not
folded read one base together.
"""

from __future__ import annotations

import torch

from ...config import CMSConfig

# (device type, longest period it holds for, slots); periods that no row names fold at once. On two CPU cores
# keeping factors was slower for every period and width tried ("pending" in benchmarks/results/cms.json);
# nobody has measured it on a GPU, so there is no row yet.
TABLE: tuple[tuple[str, int, int], ...] = ()


def pending_tokens(config: CMSConfig, level: int, device: torch.device, asked: int | None = None) -> int:
    """Slots for the pending factors of ``level`` (index, level 1 is 0), ``asked`` or the table's; 0: every
    refresh is dense.

    Only plain gradient descent is linear in what it has seen, and a level whose period does not fit never waits.
    """
    period = config.chunks[level]
    slots = (
        next((s for kind, longest, s in TABLE if kind == device.type and period <= longest), 0)
        if asked is None else asked
    )
    return slots if config.optimizer == "gd" and slots >= config.chunks[0] else 0
