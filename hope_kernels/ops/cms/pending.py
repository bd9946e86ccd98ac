"""How many tokens' factors a level keeps before it folds them into dense weights.

A refresh of a matrix [r, c] costs 8 bytes a weight (fp32 read and written) whatever the level's period C.
Kept factors cost 2 C (r + c) numbers once; with R of them kept, every later token pays 2 R (r + c) FLOPs
more, and reads R (r + c) numbers beside the r c of the matrix. So with a small period a fold is paid once in
R / C refreshes, and rows that have not folded read one base together.
"""

from __future__ import annotations

import torch

from ...config import CMSConfig
from .relative import normalises

# (device type, longest period it holds for, slots); a period that no entry covers folds at once. On two CPU
# cores keeping factors was slower for every period and width tried ("pending" in
# benchmarks/results/cms.json), and it has not been measured on a GPU: so there is no entry yet.
TABLE: tuple[tuple[str, int, int], ...] = ()


def pending_tokens(config: CMSConfig, level: int, device: torch.device, asked: int | None = None) -> int:
    """Slots for the pending factors of ``level`` (index, level 1 is 0), ``asked`` or the table's; 0: every
    refresh is dense.

    Factors wait under plain gradient descent only, whose steps add up, and whose gradient nothing asks the size
    of; never where a segment's do not fit, and never with ``rank``, whose thin matrices cost less than factors.
    """
    period = config.chunks[level]
    slots = (
        next((s for kind, longest, s in TABLE if kind == device.type and period <= longest), 0)
        if asked is None else asked
    )
    adds_up = config.optimizer == "gd" and not normalises(config) and config.rank is None
    return slots if adds_up and slots >= config.chunks[0] else 0
