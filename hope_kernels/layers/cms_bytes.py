"""What a CMS keeps of sequences that have learned, in bytes."""

from __future__ import annotations

from ..ops.cms.relative import normalises
from ..state import master_dtype


def state_bytes(layer, batch: int, segment: int) -> list[dict[str, int]]:
    """``ContinuumMemory.state_bytes``."""
    config, dtype, found = layer.config, layer._like.dtype, []
    size, wide = dtype.itemsize, master_dtype(dtype).itemsize
    for l, period in enumerate(config.chunks):
        held = layer.start(l)
        shapes, inputs = [t.shape for t in held.values()], [held[n].shape[1] for n in ("up", "down")]
        numbers = batch * sum(s.numel() for s in shapes) * (config.learning_rates[l] > 0)
        slots = layer._slots(l) if period == segment else 0
        sides = batch * sum(sum(s) for s in shapes) * (config.learning_rates[l] > 0)
        known = config.precondition is not None and config.learning_rates[l] > 0
        squares = batch * sum(c * c for c in inputs) * known
        waits = period > segment or config.optimizer == "muon" or normalises(config)
        found.append({
            "weights": numbers * wide, "copies": numbers * size if size != wide else 0,
            "grads": numbers * wide if waits else 0,
            "moments": numbers * wide * {"momentum": 1, "adam": 2}.get(str(config.optimizer), 0),
            "pending": slots * sides * size, "preconditioners": squares * (2 if waits else 1) * wide,
        })
    return found
