"""The paper's equations to the letter, on ordinary text: where an untrained layer with an MLP memory stops
being finite.

    python examples/paper_preset.py [TEXT]
"""

import gzip
import os
import sys

import torch

import hope_kernels as hk


def first_bad_token(config: hk.TitansConfig, text: bytes) -> int | None:
    """Index of the first token whose output is not finite, or None."""
    torch.manual_seed(0)
    layer = hk.SelfModifyingTitans(config)
    embed = torch.randn(256, config.d_model)
    with torch.no_grad():
        y, _ = layer(embed[torch.tensor(list(text))].unsqueeze(0))
    bad = (~torch.isfinite(y[0]).all(-1)).nonzero()
    return int(bad[0]) if len(bad) else None


def main() -> None:
    if len(sys.argv) > 1:
        text = open(sys.argv[1], "rb").read()[:4096]
    else:
        asset = os.path.join(os.path.dirname(hk.__file__), "assets", "kjv-john-acts.txt.gz")
        text = gzip.open(asset).read()[:4096]
    for name in ("paper", "default"):
        for chunk in (1, 16, 64):
            config = hk.TitansConfig.preset(name, d_model=64, num_heads=2, chunk_memory=chunk, chunk_other=chunk)
            bad = first_bad_token(config, text)
            print(
                f"{name:8} chunk {chunk:3}: "
                + (f"finite over {len(text)} bytes" if bad is None else f"not finite from byte {bad}")
            )


if __name__ == "__main__":
    main()
