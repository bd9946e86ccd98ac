"""Language modelling against equals: what is read and judged, that arms are of one size, and the command."""

import json
import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_lm
from benchmarks import studies as s
from benchmarks.lm.arms import ABLATIONS, TITLES, build, configuration
from benchmarks.lm.reading import contexts, cut, judged
from benchmarks.synthetic.arms import WITHIN, size
from hope_kernels.layers.attention import CausalAttention

SMALL = ("--steps 6 --search-steps 2 --widest 1 --seeds 0 1 --d-model 16 --layers 1 --batch 2 --tokens 16 "
         "--lengths 32 64 --excerpts 2 --every 3").split()


def test_contexts_are_read_on_and_as_many_bytes_in_each_length():
    texts = [torch.arange(1000) % 251, 255 - torch.arange(700) % 251]
    found = list(islice(contexts(texts, [1.0, 3.0], 3, 16, (32, 64), 5), 16))
    lengths, before = [], None
    for ids, fresh in found:
        assert ids.shape == (3, 17)
        if fresh:
            lengths.append(0)
        else:
            assert torch.equal(ids[:, 0], before)
        before = ids[:, -1]
        lengths[-1] += 16
        for row in ids:
            assert any(torch.equal(row, t[i : i + 17]) for t in texts for i in range(len(t) - 16))
    assert sorted(lengths[:3]) == sorted(lengths[3:]) == [32, 32, 64]
    again = list(islice(contexts(texts, [1.0, 3.0], 3, 16, (32, 64), 5), 16))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found, again))
    with pytest.raises(ValueError, match="contexts: argument texts has one of 64 bytes, expected more than 64"):
        next(contexts([texts[0][:64]], [1.0], 1, 16, (32, 64), 0))


@pytest.mark.parametrize("length", [64, 256, 1024])
def test_the_same_bytes_are_judged_after_contexts_of_every_length(length):
    rows = torch.stack([torch.arange(1024), 5000 + torch.arange(1024)])
    found = cut(rows, length)
    assert found.shape == (2 * 1024 // length, length) and (found.diff(dim=1) == 1).all()
    assert sorted(found[:, -length // 4 :].flatten().tolist()) == rows[:, -256:].flatten().sort()[0].tolist()


@pytest.mark.parametrize("arm", ["hope", "attention_cms"])
def test_bits_are_those_of_the_last_quarter(arm):
    model = build(arm, 0, 16, 1).eval()
    with torch.no_grad():
        model.embed.weight.mul_(20.0)
        rows = torch.randint(0, 256, (2, 1024), generator=torch.Generator().manual_seed(0))
        ids = cut(rows, 512)
        nats = F.cross_entropy(model(ids)[0][:, 383:-1].flatten(0, 1), ids[:, 384:].flatten())
    off, on = (judged(model, rows, 512, learn) for learn in bench_lm.LEARN)
    assert off == pytest.approx(float(nats) / math.log(2), rel=1e-5) and abs(on - off) > 1e-4
    fresh = s.bits(model, ids[:, 384:], "off")[0]
    assert abs(sum(fresh) / len(fresh) - off) > 1e-4  # the context matters


def test_arms_are_of_one_size_and_ablations_lack_what_they_say():
    wanted = size(build("hope", 0, 64, 2))
    for arm in TITLES:
        model = build(arm, 0, 64, 2)
        assert abs(size(model) / wanted - 1) <= WITHIN
        assert model.learns == (arm not in ("attention", "attention_conv", "no_cms"))
    whole = configuration("hope", 64, 2, 128).titans
    for arm in ABLATIONS:
        titans = configuration(arm, 64, 2, 128).titans
        differ = {name for name, value in titans.to_dict().items() if value != whole.to_dict()[name]}
        assert differ == {"no_cms": set(), "no_conv": {"conv_window"}}.get(arm, {arm.removeprefix("no_")})


@torch.no_grad()
def test_convolved_attention_reads_what_a_convolution_of_the_whole_would_give():
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (2, 90))
    model, plain = build("attention_cms_conv", 0, 32, 2), build("attention_cms", 0, 32, 2)
    whole, state = model(ids)[0], None
    parts = []
    for part in ids.split([1, 2, 3, 50, 34], 1):
        logits, state = model(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    mixer, x = model.blocks[0].mixer, torch.randn(2, 9, 32)
    u = torch.stack([sum(mixer.conv[:, 3 - j] * x[:, t - j] for j in range(min(4, t + 1))) for t in range(9)], 1)
    torch.testing.assert_close(mixer(x)[0], CausalAttention.scan(mixer, u, mixer.init_state(2), [9, 9])[0])
    for block in model.blocks:  # of the token alone: attention as it was
        block.mixer.conv.zero_()[:, -1] = 1
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if not n.endswith("conv")})
    torch.testing.assert_close(model(ids)[0], plain(ids)[0])
    with pytest.raises(ValueError, match="ConvolvedAttention: argument lengths is .3, 9., expected 9 in every row"):
        mixer(x, lengths=[3, 9])


def test_the_command_searches_compares_resumes_and_tells(tmp_path, capsys):
    text = bytes(range(32, 127)) * 100
    for name in ("train.txt", "test.txt", "other.txt"):
        (tmp_path / name).write_bytes(text)
    out = tmp_path / "lm.json"
    command = [*SMALL, "--text", f"{tmp_path}/train.txt=2", "--test", f"T={tmp_path}/test.txt", "--other",
               f"O={tmp_path}/other.txt", "--arms", "no_dgd", "hope", "attention", "--out", str(out)]
    bench_lm.main(command)
    first = json.loads(out.read_text())
    cases = first["cases"]
    assert not any(name.startswith("search no_dgd") for name in cases)
    searched = {c["lr"]: c["bits"] for name, c in cases.items() if name.startswith("search hope ")}
    best = min(searched, key=searched.get)
    for arm in ("hope", "no_dgd"):
        run = cases[f"run {arm} seed 1"]
        assert len(searched) >= 2 and run["lr"] == best and run["curve"][-1][0] == 6
        assert run["bits"]["T"] == run["bits"]["O"] and set(run["bits"]["T"]["next_token"]) == {"32", "64"}
    assert list(cases["run attention seed 0"]["bits"]["T"]) == ["off"]
    gone = cases.pop("run no_dgd seed 1")
    out.write_text(json.dumps(first))
    capsys.readouterr()
    bench_lm.main(command)
    again, told = json.loads(out.read_text()), capsys.readouterr().out
    assert again["cases"]["run no_dgd seed 1"]["bits"] == gone["bits"]  # of seed and step alone
    assert sum(line.startswith(("run", "search")) for line in told.splitlines()) == 1
    bench_lm.main(["--table", "--out", str(out)])
    shown = capsys.readouterr().out
    assert shown == bench_lm.table(again) + "\n" and shown.count("| HOPE without DGD |") == 2
    assert "Of other domains (O):" in shown and "| attention with MLPs |" in shown
    with pytest.raises(SystemExit):
        bench_lm.main([*SMALL, "--out", str(out)])
    assert "--text: nothing to train on" in capsys.readouterr().err


def test_a_model_that_diverged_is_said_to(tmp_path):
    run = {"arm": "titans", "lr": 0.1, "seed": 0, "parameters": 5, "curve": [], "trained": False, "seconds": 0.1}
    setting = {"lengths": [32], "batch": 1, "tokens": 16, "test": {"T": ""}, "other": {}}
    assert "| diverged | diverged |" in bench_lm.table({"setting": setting, "cases": {"run titans seed 0": run}})
