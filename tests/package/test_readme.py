"""The README's Python examples run as they stand, and what they promise holds."""

import os
import re

import torch

README = os.path.join(os.path.dirname(__file__), "..", "..", "README.md")


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with open(README, encoding="utf-8") as f:
        blocks = re.findall(r"```python\n(.*?)```", f.read(), re.S)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert (torch.cat([names["a"], names["b"]], 1) - names["whole"]).abs().max() < 1e-5
    assert names["out"].tokens.shape == (1, 60)
    with torch.no_grad():
        off, original = names["hope"](names["ids"])[0], names["llama"](names["ids"]).logits
    assert torch.equal(off, original) and torch.equal(names["logits"][:, :64], off[:, :64])
    assert (names["logits"][:, 64:] - off[:, 64:]).abs().max() > 1e-3
