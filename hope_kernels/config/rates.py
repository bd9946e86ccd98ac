"""Default inner learning rates of a CMS."""

from __future__ import annotations

import math

# Of a matrix's own size (the RMS of its initial weights), what one step of a level with period 256 moves a weight by.
STEPS = {"gd": 1e-4, "momentum": 1e-5, "muon": 1e-4, "adam": 5e-4}


def default_rate(optimizer: str, C: int) -> float:
    """Inner learning rate of a level with period C, relative to the size of its matrices: ``STEPS`` times
    min(1, sqrt(C / 256)).

    It knows nothing of a model's scale: see ``CMSConfig.relative``. Searched by ``benchmarks.bench_rates`` on a
    pre-trained Llama and on the bundled byte model, for periods of 16 to 4096 tokens.
    """
    return STEPS[optimizer] * min(1.0, math.sqrt(C / 256))
