"""What "Nested Learning" (arXiv 2512.24695) reports on the tasks that are measured here, in percent.

From public notes on the paper, which agree wherever two give a figure; its own tables were not at hand, and a figure
that no note gives is missing. Models, sizes and scores there are others than ours.
"""

from __future__ import annotations

# Table 5, (words of the lengths that trained, longer words) by language and arm of bench_languages
LANGUAGES: dict[tuple[str, str], tuple[float, float]] = {
    **{(name, "hope"): (100.0, 100.0)
       for name in ("parity", "(aa)*", "(abab)*", "a^n b^n", "a^n b^n c^n", "shuffle-2")},
    ("parity", "attention"): (46.4, 0.0),
    ("(aa)*", "attention"): (0.0, 0.0),
}

# Table 4, by task and arm of bench_mad
MAD: dict[tuple[str, str], float] = {
    ("compression", "hope"): 51.2, ("compression", "attention"): 49.4,
    ("fuzzy recall", "hope"): 52.1, ("fuzzy recall", "attention"): 47.9,
    ("selective copying", "hope"): 99.7, ("selective copying", "attention"): 96.2,
    ("memorisation", "hope"): 85.2, ("memorisation", "attention"): 83.7,
}

# Table 6: HOPE, then what it is without; (perplexity of language modelling, accuracy of common-sense reasoning)
ABLATIONS: dict[str, tuple[float, float]] = {
    "HOPE": (12.24, 58.1), "DGD": (13.41, 56.5), "momentum": (13.58, 56.9), "weight decay": (13.71, 57.2),
    "CMS": (13.04, 57.3), "own keys": (13.77, 56.9), "own values": (13.90, 55.1), "own queries": (12.19, 57.4),
}
