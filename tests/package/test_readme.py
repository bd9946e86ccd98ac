"""The Python examples of README.md and docs/*.md run as they stand, and what they promise holds."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.S | re.M)


def close(a, b, tolerance=1e-5) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) < tolerance


def readme(names):
    assert close(torch.cat([names["a"], names["b"]], 1), names["whole"])
    assert names["out"].tokens.shape == (1, 60)


def llama(names):
    with torch.no_grad():
        off, original = names["hope"](names["ids"])[0], names["llama"](names["ids"]).logits
    assert torch.equal(off, original) and torch.equal(names["logits"][:, :64], off[:, :64])
    assert (names["logits"][:, 64:] - off[:, 64:]).abs().max() > 1e-3


def streaming(names):
    whole, first, rest = names["whole"], names["first"], names["rest"]
    assert close(first[0], whole[0, :20]) and close(first[1, :7], whole[1, :7]) and not first[2].any()
    assert close(rest[0], whole[1, 7:]) and close(names["y"][1], whole[0, 33:43])
    assert [names[n].pos for n in ("one", "two")] == [[60], [43]]


def backends(names):
    assert close(names["chunked"], names["reference"], 1e-10)


def wrapping(names):
    assert close(names["wrapped"], names["merged"])


def generation(names):
    first, once = names["first"].tokens, names["once"].tokens
    assert first.shape == (1, 20) and torch.equal(once[:, 10:], first)
    assert names["seen"].predicted == [names["text"].shape[1] - 1] and names["seen"].finished


def continual(names):
    losses, learned = names["losses"], names["learned"]
    assert len(losses) == 10 and losses[-1] < losses[0] / 2
    assert learned["up"].shape == (128, 32) and not torch.equal(learned["up"], names["cms"].levels[0]["up"])
    assert not names["state"].own[0][0] and names["state"].own[1][0]


def replay(names):
    nats, once, both = names["nats"], names["once"], names["both"]
    assert float(nats[-1]) < 0.8 * float(nats[0]) and names["night"].finished
    assert once.state.kept.pos == both.state.kept.pos == [67] and once.nats == both.nats
    assert close(names["night"].nats, both.sleep.nats, 1e-3)
    model, read, notes = names["model"], names["hk"].generation.read, names["text"][:, :268]
    before = read(model, notes)
    model.consolidate(both.state)
    assert float(read(model, notes).nats) < 0.7 * float(before.nats)


def hf(names):
    out, again, rows = names["out"].sequences, names["again"], names["prompts"].attention_mask.sum(1).tolist()
    ours, T = names["hk"].HopeForCausalLM.from_pretrained("hope-byte"), max(rows)
    for b, n in enumerate(rows):
        first = ours.generate(out[b : b + 1, T - n : T], 40)
        assert torch.equal(first.tokens[0], out[b, T:])
        more = ours.generate(torch.tensor([[10]]), 20, first.state, unread="before")
        assert torch.equal(more.tokens[0], again[b, T + 41 :])
    assert names["losses"][-1] < names["losses"][0]
    names["hk"].HopeForCausalLM.from_pretrained("trained")


def optim(names):
    assert names["losses"][-1] < names["losses"][0] - 1


def training(names):
    fixed, model = names["fixed"], names["model"]
    assert any(names["state"].cms[0].own[0]) and model.blocks[0].cms.levels[0].log_rates.grad is not None
    names["state"].adopt(fixed)
    assert [type(rate) for rate in fixed.config.cms[0].lr] == [tuple, tuple]


HOLDS = {"README.md": readme, "docs/llama.md": llama, "docs/streaming.md": streaming, "docs/backends.md": backends,
         "docs/wrapping.md": wrapping, "docs/generation.md": generation, "docs/continual.md": continual,
         "docs/replay.md": replay, "docs/hf.md": hf, "docs/optim.md": optim,
         "docs/training.md": training}


SLOW = ("docs/replay.md",)  # whose dozens of passes take more than a minute


@pytest.mark.parametrize(
    "document", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in HOLDS]
)
def test_examples_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    for block in blocks(ROOT / document):
        exec(block, names)
    HOLDS[document](names)


def test_every_document_with_examples_is_run():
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert {p.relative_to(ROOT).as_posix() for p in found if blocks(p)} == set(HOLDS)
